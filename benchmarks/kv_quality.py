"""Measure perplexity through packed caches: methods at equal bits, and an ablation of KVQuant.

    python benchmarks/kv_quality.py [--seqlen 2048] [--windows 0] [--samples 16] [--steps] [--only TEXT]
        [--out FILE] [--develop] [--text suite]

Every row is calibrated on the first four fifths of Python's documentation and measured on the last fifth, or with
--text suite calibrated on the mixture and measured on five domains (--windows of each). Finished rows are written
to benchmarks/results/kv_quality.json (--out), with --text suite to kv_suite.json, or with --steps, which measures
the parts of KVQuant, to kv_steps.json; rows in the file are not measured again. --develop measures on windows
between those of the calibration, or on the suite's part that chooses, and writes nothing: settings were chosen
there.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch

from bitmill import api
from bitmill.data.packed import DocumentWindows, text_windows
from bitmill.evaluation.metrics import score_windows
from bitmill.kv.cache import PackedForward
from bitmill.kv.calibrate import KVRecording, fit_calibration, record_keys_values
from bitmill.kv.scheme import KVMethod, kv_method
from bitmill.kv.size import cache_size
from bitmill.models.block_call import output_fn
from bitmill.tasks.causal_lm import CausalLM

RESULTS = Path(__file__).parent / "results"

ONE = {"outliers": 0.01, "key_outliers": 0.01}
PAPER = {"channel_levels": False, "equalize": False, "residual": 0, **ONE}
NONE = {"pre_rope": False, "nuq": False, "fisher": False, "outliers": 0.0, "key_outliers": 0.0, "sink": 0}
AS_PUBLISHED, AS_LARGE = "kvquant, the paper's levels and shares", "kvquant, as many bits as kivi"
STEPS: list[tuple[str, dict[str, Any]]] = [
    ("keys per channel", {}),
    ("+ before RoPE", {"pre_rope": True}),
    ("+ learned levels", {"nuq": True}),
    ("+ squared gradients", {"fisher": True}),
    ("+ 1 % outliers", ONE),
    ("+ first token in float", {"sink": 1}),
    ("+ Q-Norm", {"q_norm": True}),
    ("levels of each key channel", {"q_norm": False, "channel_levels": True}),
    ("+ equalized values", {"equalize": True}),
    ("+ 2 % outliers of keys, 0.5 % of values", {"outliers": 0.005, "key_outliers": 0.02}),
]


def grid(steps: bool) -> list[tuple[str, KVMethod]]:
    """Return names and methods of all rows, the most compared ones first.

    steps: the parts of KVQuant instead, with the rows they are compared with.
    """
    if not steps:
        rows = [(name, kv_method(name, bits)) for bits in (4, 3, 2) for name in ("kvquant", "kivi")]
        rows += [(AS_LARGE, kv_method("kvquant", 4, outliers=0.02, key_outliers=0.055))]
        rows += [("per_token", kv_method("per_token", bits)) for bits in (8, 4, 3, 2)]
        rows += [("rotated", kv_method("rotated", bits)) for bits in (4, 3, 2)]
        rows += [(AS_PUBLISHED, kv_method("kvquant", bits, **PAPER)) for bits in (4, 3, 2)]
        return rows
    rows = [("per_token", kv_method("per_token", 3))]
    options = {**PAPER, **NONE}
    for name, change in STEPS:
        options |= change
        rows.append((name, kv_method("kvquant", 3, **options)))
    rows.append((AS_PUBLISHED, kv_method("kvquant", 2, **PAPER)))
    return [*rows, ("+ Q-Norm", kv_method("kvquant", 2, q_norm=True, **PAPER))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--seqlen", type=int, default=2048)
    parser.add_argument("--text", choices=("pydoc", "suite"), default="pydoc")
    parser.add_argument("--windows", type=int, default=0, help="0: all there are")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--only", default="", help="rows whose name and method contain this")
    parser.add_argument("--batch", type=int, default=3, help="windows at a time")
    parser.add_argument("--steps", action="store_true")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--develop", action="store_true")
    args = parser.parse_args()
    model, tokenizer = api.load(args.model), api.load_tokenizer(args.model)
    if args.text == "suite":
        calib, held_out, domains = suite_windows(tokenizer, args)
    else:
        calib, held_out = pydoc_windows(tokenizer, args)
        domains = None
    name = "kv_steps" if args.steps else {"pydoc": "kv_quality", "suite": "kv_suite"}[args.text]
    path = args.out or RESULTS / f"{name}.json"
    keep = path.is_file() and not args.develop
    results: dict[str, Any] = json.loads(path.read_text()) if keep else {"rows": {}}
    about = {"model": args.model, "seqlen": args.seqlen, "windows": len(held_out), "samples": args.samples}
    if results["rows"] and any(results[key] != value for key, value in about.items()):
        raise SystemExit(
            f"{path} was measured with other settings; move it away, or use its model, lengths and counts."
        )
    results |= about
    with torch.no_grad():  # 200 kB per token; computed once for all rows
        known = {window.numpy().tobytes(): output_fn(model)(window[None]) for window in held_out}

    def reference(tokens: torch.Tensor) -> torch.Tensor:
        return torch.cat([known[window.numpy().tobytes()] for window in tokens])

    if "float" not in results["rows"]:
        results["rows"]["float"] = score_windows(reference, held_out, batch=1, domains=domains)
    print(f"float {results['rows']['float']['perplexity']:.3f}", flush=True)
    recording: KVRecording | None = None  # for all rows
    for name, method in grid(args.steps):
        key = f"{name}: {json.dumps(method.to_dict())}"
        if key in results["rows"] or args.only not in key:
            continue
        started = time.perf_counter()
        calibration = None
        if method.scheme().is_calibrated:
            recording = recording or record_keys_values(model, calib, fisher=True)
            calibration = fit_calibration(model, method, recording)
        answers = PackedForward(model, method, calibration)
        measured = score_windows(answers, held_out, reference, batch=args.batch, domains=domains)
        results["rows"][key] = {
            "name": name,
            "method": method.to_dict(),
            **measured,
            "kv_bits_per_element": answers.bits_per_element,
            "kv_bits_at_8k": _bits_at(model, method, 8192),
            "time_s": round(time.perf_counter() - started, 1),
        }
        row = results["rows"][key]
        print(
            f"{method.bits} {name:35s} {row['perplexity']:10.3f} {row['kl_divergence']:8.4f} "
            f"{row['kv_bits_per_element']:6.3f} {row['time_s']:6.0f} s",
            flush=True,
        )
        if not args.develop:
            path.write_text(json.dumps(results, indent=1) + "\n")


def pydoc_windows(tokenizer: Any, args: argparse.Namespace) -> tuple[torch.Tensor, torch.Tensor]:
    """Return windows of Python's documentation that calibrate, and windows that are measured."""
    text = CausalLM().windows("pydoc", tokenizer)
    held_out = _stacked(text.held_out("eval", args.seqlen, args.windows or None))
    calib = _stacked(text.held_out("calib", args.seqlen, None))
    chosen = torch.linspace(0, len(calib) - 1, args.samples).long()
    if args.develop:
        rest = calib[[i for i in range(len(calib)) if i not in chosen]]
        held_out = rest[torch.linspace(0, len(rest) - 1, args.windows or 4).long()]
    return calib[chosen], held_out


def suite_windows(tokenizer: Any, args: argparse.Namespace) -> tuple[torch.Tensor, torch.Tensor, dict[str, int]]:
    """Return windows of the mixture that calibrate, windows of the suite, and their number by domain."""
    suite, split, most = (
        text_windows("suite", tokenizer),
        "choose" if args.develop else "eval",
        args.windows or None,
    )
    assert isinstance(suite, DocumentWindows)
    calib = text_windows("mix", tokenizer).calibration(args.samples, args.seqlen, 0)
    return calib, suite.held_out(split, args.seqlen, most), suite.domains(split, args.seqlen, most)


def _bits_at(model: Any, method: KVMethod, tokens: int) -> float:
    """Return the allocated bits per number after `tokens` tokens."""
    config = model.config
    heads, dim, layers = config.num_key_value_heads, config.head_dim, config.num_hidden_layers
    size = cache_size(method.scheme(), heads, dim, layers, tokens)
    return 8 * (size.total - size.tables) / (2 * heads * dim * layers * tokens)


def _stacked(windows: Any) -> torch.Tensor:
    return windows if isinstance(windows, torch.Tensor) else torch.stack(list(windows))


if __name__ == "__main__":
    main()
