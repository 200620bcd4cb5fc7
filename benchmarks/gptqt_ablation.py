"""Ablation of GPTQT: the contribution of each ingredient, on layers of SmolLM2.

    python benchmarks/gptqt_ablation.py [--windows 32] [--blocks 1,9,18,26] [--json]

Every arm quantizes the same linear layers against the same Gram matrices of the float model's inputs
(`--windows` x 512 tokens of the calibration split). The figure is the relative squared error of the layers'
outputs on *other* windows of the calibration split, geometric mean over the stages of the blocks; the
evaluation split is never read. Prints a markdown table.
"""

from __future__ import annotations

import argparse
import json
import math
import time

import torch
from torch import Tensor

from bitmill.calibration.staged_forward import StagedForward
from bitmill.data import text
from bitmill.formats import Format
from bitmill.formats.binary_coding import BinaryCoding
from bitmill.formats.uniform import Uniform
from bitmill.models.streamed import StreamedModel
from bitmill.numerics.gram import RunningGram
from bitmill.recipes.method import build_recipe
from bitmill.solvers import Solver, Statistics
from bitmill.solvers.alternating import Alternating
from bitmill.solvers.base import output_error
from bitmill.solvers.gptq import GPTQ
from bitmill.solvers.nearest import Nearest
from bitmill.sources.open import open_source

SEQLEN = 512
Stage = tuple[Tensor, Tensor, Tensor]  # weights of a stage stacked, Gram to calibrate on, Gram to judge on
Arm = tuple[str, Format, Solver]


@torch.no_grad()
def stages(model: str, blocks: list[int], windows: int) -> list[Stage]:
    """Return weights and Gram matrices of every stage of the chosen blocks.

    Args:
        model: Name of the model.
        blocks: Indices of the blocks.
        windows: Number of calibration windows.
    """
    source = open_source(model)
    streamed = StreamedModel(source)
    ids = text.split_stream(text.token_stream("pydoc", source.tokenizer()), "calib")
    calibrate = text.calibration_windows(ids, windows, SEQLEN, seed=0)
    judge = text.calibration_windows(ids, windows // 2, SEQLEN, seed=1)
    with streamed.outside():
        entered = [streamed.embed(batch) for batch in (*calibrate.split(4), *judge.split(4))]
    hidden, calls = [h for h, _ in entered], [c for _, c in entered]
    count = len(calibrate.split(4))
    found = []
    for index in range(max(blocks) + 1):
        block = streamed.load_block(index)
        names = streamed.adapter.stages
        forward = StagedForward(block, hidden, [c[index] for c in calls], [s[0] for s in names])
        for stage in names:
            weights = [block.get_submodule(name).weight for name in stage]
            W = torch.cat([w.data.clone() for w in weights])  # type: ignore[operator, union-attr]
            grams = RunningGram(W.shape[1]), RunningGram(W.shape[1])
            for number, X in enumerate(forward.inputs(stage[0])):
                if index in blocks:
                    grams[number >= count].add(X)
            if index in blocks:
                found.append((W, grams[0].mean(), grams[1].mean()))
        hidden = forward.outputs()
        forward.close()
        streamed.free_block(index)
    return found


def gptqt(label: str, **options: object) -> Arm:
    recipe = build_recipe("gptqt", options)
    return label, recipe.weight, recipe.solver


def arms() -> list[Arm]:
    """Return the variants, from rounding to nearest to the full method and alternatives to its parts."""
    loop = GPTQ(damp=0.03, importance="inverse")
    table: list[Arm] = []
    for bits in (3, 2):
        table += [
            (f"rtn, {bits} bits", Uniform(bits, 64), Nearest()),
            (f"gptq, natural order, min-max, {bits} bits", Uniform(bits, 64), GPTQ(act_order=False, search=False)),
            (f"gptq, natural order, clip search, {bits} bits", Uniform(bits, 64), GPTQ(act_order=False)),
            (
                f"gptq, natural order, clip search, local grids, {bits} bits",
                Uniform(bits, 64),
                GPTQ(act_order=False, static_groups=False),
            ),
            (f"gptq, act-order, min-max, {bits} bits", Uniform(bits, 64), GPTQ(search=False)),
            (f"gptq, act-order, clip search (the default), {bits} bits", Uniform(bits, 64), GPTQ()),
            (f"gptq, act-order, clip by 1/diag(G^-1), {bits} bits", Uniform(bits, 64), loop),
            (f"bcq (alternating, data-free), {bits} bits", BinaryCoding(bits, 32 * bits * 2), Alternating()),
            (f"alternating binary coding inside GPTQ, {bits} bits", BinaryCoding(bits, 32 * bits * 2), loop),
            gptqt(
                f"one fixed coding, 8-bit scales, no passes (step two left out), {bits} bits",
                bits=bits,
                codings=1,
                scale_bits=8,
                scale_step=0.03125,
                group_passes=0,
                column_passes=0,
            ),
            gptqt(
                f"first coding, scale not re-explored, no passes, {bits} bits",
                bits=bits,
                search="false",
                group_passes=0,
                column_passes=0,
            ),
            gptqt(
                f"search weighted by diag(G), no passes, {bits} bits",
                bits=bits,
                importance="diagonal",
                group_passes=0,
                column_passes=0,
            ),
            gptqt(
                f"search weighted by 1/diag(G^-1), no passes, {bits} bits",
                bits=bits,
                group_passes=0,
                column_passes=0,
            ),
            gptqt(
                f"+ natural order instead of act-order, {bits} bits",
                bits=bits,
                act_order="false",
                group_passes=0,
                column_passes=0,
            ),
            gptqt(f"+ 2 column passes, {bits} bits", bits=bits, group_passes=0),
            gptqt(f"+ 2 column passes, 1 group pass (gptqt's default), {bits} bits", bits=bits),
            gptqt(f"+ 3 column passes, 2 group passes, {bits} bits", bits=bits, group_passes=2, column_passes=3),
            gptqt(f"default on a 4-bit grid, {bits} bits", bits=bits, grid_bits=4),
            gptqt(f"default with 8 codings, {bits} bits", bits=bits, codings=8),
            gptqt(f"default with 64 codings, {bits} bits", bits=bits, codings=64),
            gptqt(f"default in groups of 64, {bits} bits", bits=bits, group_size=64),
            gptqt(f"default in groups of 16, {bits} bits", bits=bits, group_size=16),
        ]
    table.append(gptqt("default on a 6-bit grid, 2 bits", bits=2, grid_bits=6))
    return table


def measure(arm: Arm, layers: list[Stage]) -> dict[str, object]:
    """Return one row: bits per weight, held-out and calibration error (geometric means), seconds.

    Args:
        arm: The variant.
        layers: Weights and Gram matrices.
    """
    label, format, solver = arm
    started, logs, seen, bits, weights = time.perf_counter(), [], [], 0, 0
    for W, gram, held_out in layers:
        solved = solver.solve(W, Statistics(gram, 1), format)
        decoded = solved.dequantize()
        logs.append(math.log(output_error(W, decoded, held_out)))
        seen.append(math.log(output_error(W, decoded, gram)))
        bits += format.stored_bits(solved.shape)
        weights += W.numel()
    return {
        "arm": label,
        "bits_per_weight": bits / weights,
        "held_out_error": math.exp(sum(logs) / len(logs)),
        "calibration_error": math.exp(sum(seen) / len(seen)),
        "time_s": time.perf_counter() - started,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--blocks", default="1,9,18,26")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    layers = stages(arguments.model, [int(b) for b in arguments.blocks.split(",")], arguments.windows)
    if not arguments.json:
        print("| arm | bits per weight | held-out output error | on the calibration text |\n|---|---|---|---|")
    rows = []
    for arm in arms():
        row = measure(arm, layers)
        rows.append(row)
        if not arguments.json:
            print(
                f"| {row['arm']} | {row['bits_per_weight']:.3f} | {row['held_out_error']:.5f} "
                f"| {row['calibration_error']:.5f} |",
                flush=True,
            )
    if arguments.json:
        print(json.dumps(rows))


if __name__ == "__main__":
    main()
