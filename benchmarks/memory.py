"""Peak resident memory of `bitmill quantize`, on synthetic checkpoints of TinyLlama-1.1B's shape.

Each run is the command line in a process of its own; the operating system reports how much of it was resident at
most. Depth must not matter: only one block is in memory at a time.

    python benchmarks/memory.py                         # rtn and gptq, 8 and 22 blocks; minutes
    python benchmarks/memory.py --blocks 2 --methods rtn
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

# torch stays out of this process: a child starts with the peak of its parent, so the parent must be small.

BOUND_BYTES = {"rtn": 1_500_000_000, "gptq": 3_000_000_000}
GROWTH_SHARE, GROWTH_BYTES = 0.05, 50_000_000  # what the deepest model may take beyond the shallowest
OPTIONS = {"rtn": [], "gptq": ["--samples", "16", "--seqlen", "256"]}
VOCABULARY = 32000
SHARDS = 4
SEED = 0


@dataclass(frozen=True)
class Shape:
    """Sizes of a block of Llama."""

    hidden: int = 2048
    intermediate: int = 5632
    heads: int = 32
    kv_heads: int = 4

    @property
    def kv(self) -> int:
        """Width of keys and of values."""
        return self.hidden // self.heads * self.kv_heads


TINYLLAMA, LLAMA_7B = Shape(), Shape(4096, 11008, 32, 32)


def build(folder: Path, blocks: int, shape: Shape = TINYLLAMA) -> None:
    """Write the checkpoint shard by shard, config.json last: a folder with a config.json is complete.

    Args:
        folder: Folder of the checkpoint.
        blocks: Number of blocks.
        shape: Sizes of a block.
    """
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig, PreTrainedTokenizerFast

    folder.mkdir(parents=True, exist_ok=True)
    config = LlamaConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        num_hidden_layers=blocks,
        vocab_size=VOCABULARY,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        dtype=torch.float16,
    )
    config.architectures = ["LlamaForCausalLM"]
    hidden, intermediate, kv = shape.hidden, shape.intermediate, shape.kv
    sizes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, hidden)}
    for i in range(blocks):
        for name, size in {
            "self_attn.q_proj": (hidden, hidden),
            "self_attn.k_proj": (kv, hidden),
            "self_attn.v_proj": (kv, hidden),
            "self_attn.o_proj": (hidden, hidden),
            "mlp.gate_proj": (intermediate, hidden),
            "mlp.up_proj": (intermediate, hidden),
            "mlp.down_proj": (hidden, intermediate),
            "input_layernorm": (hidden,),
            "post_attention_layernorm": (hidden,),
        }.items():
            sizes[f"model.layers.{i}.{name}.weight"] = size
    sizes |= {"model.norm.weight": (hidden,), "lm_head.weight": (VOCABULARY, hidden)}

    generator = torch.Generator().manual_seed(SEED)
    names = list(sizes)
    where: dict[str, str] = {}
    for shard in range(SHARDS):
        file = f"model-{shard + 1:05d}-of-{SHARDS:05d}.safetensors"
        part = names[len(names) * shard // SHARDS : len(names) * (shard + 1) // SHARDS]
        tensors = {}
        for name in part:
            tensor = torch.ones(sizes[name], dtype=torch.float16)
            if tensor.dim() == 2:
                tensor.normal_(0, 0.02, generator=generator)
            tensors[name] = tensor
            where[name] = file
        save_file(tensors, folder / file, {"format": "pt"})
    index = {"metadata": {}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    PreTrainedTokenizerFast(tokenizer_object=_byte_tokenizer()).save_pretrained(str(folder))
    config.save_pretrained(str(folder))


def _byte_tokenizer() -> Any:
    """Return a byte-level BPE tokenizer without merges: one token a byte."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def checkpoint(cache: Path, blocks: int, shape: Shape = TINYLLAMA) -> Path:
    """Return the checkpoint with so many blocks, building it if needed.

    Args:
        cache: Folder of checkpoints.
        blocks: Number of blocks.
        shape: Sizes of a block.
    """
    folder = cache / (f"llama-{blocks}-blocks" if shape == TINYLLAMA else f"llama-{shape.hidden}-{blocks}-blocks")
    if not (folder / "config.json").is_file():
        os.environ["PYTHONSAFEPATH"] = "1"  # spawned processes import nothing from the current directory either
        child = multiprocessing.get_context("spawn").Process(target=build, args=(folder, blocks, shape))
        child.start()
        child.join()
        if child.exitcode != 0:
            sys.exit(f"error: the checkpoint {folder} could not be built.")
    return folder


def quantize(source: Path, out: Path, method: str, measure: int | None) -> dict[str, Any]:
    """Run the command line.

    Args:
        source: The checkpoint.
        out: Folder of the result.
        method: Name of the method.
        measure: Windows to measure on.

    Returns:
        peak_bytes (resident) and time_s.
    """
    command = [sys.executable, "-P", "-m", "bitmill.cli.main"]
    command += ["quantize", str(source), "--method", method, "-o", str(out), "--json", *OPTIONS[method]]
    if measure is not None:
        command += ["--measure", str(measure)]
    shutil.rmtree(out, ignore_errors=True)
    started = time.perf_counter()
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(child.pid, 0)
    seconds = time.perf_counter() - started
    child.returncode = os.waitstatus_to_exitcode(status)
    shutil.rmtree(out, ignore_errors=True)
    if child.returncode != 0:
        shutil.rmtree(out.with_name(out.name + ".partial"), ignore_errors=True)
        sys.exit(f"error: {' '.join(command)} exited with {child.returncode}.")
    unit = 1 if sys.platform == "darwin" else 1024
    return {"peak_bytes": usage.ru_maxrss * unit, "time_s": round(seconds, 1)}


def judge(runs: list[dict[str, Any]]) -> list[str]:
    """Add the bound to every run; returns one sentence for each bound that was exceeded."""
    missed = []
    for run in runs:
        run["bound_bytes"] = BOUND_BYTES[run["method"]]
        same = [r for r in runs if (r["method"], r["measure"]) == (run["method"], run["measure"])]
        shallow = min(same, key=lambda r: r["blocks"])
        if run is not shallow:
            allowed = int(shallow["peak_bytes"] * (1 + GROWTH_SHARE)) + GROWTH_BYTES
            run["bound_bytes"] = min(run["bound_bytes"], allowed)
        if run["peak_bytes"] > run["bound_bytes"]:
            missed.append(
                f"{run['method']} of {run['blocks']} blocks took {run['peak_bytes'] / 1e9:.2f} GB, "
                f"more than {run['bound_bytes'] / 1e9:.2f} GB."
            )
    return missed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--blocks", type=int, nargs="+", default=[8, 22], help="depths to measure")
    parser.add_argument("--methods", nargs="+", choices=sorted(BOUND_BYTES), default=["rtn", "gptq"])
    parser.add_argument("--measure", type=int, help="held-out windows; quantize's own default if absent")
    parser.add_argument(
        "--folder",
        type=Path,
        default=Path(tempfile.gettempdir()) / "bitmill-benchmark-memory",
        help="where checkpoints are kept for the next time; 22 blocks take 2.2 GB",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    arguments = parser.parse_args()

    runs = []
    for method in arguments.methods:
        for blocks in sorted(arguments.blocks):
            source = checkpoint(arguments.folder, blocks)
            result = quantize(source, arguments.folder / f"out-{os.getpid()}", method, arguments.measure)
            runs.append({"method": method, "blocks": blocks, "measure": arguments.measure, **result})
    missed = judge(runs)
    if arguments.json:
        print(json.dumps({"runs": runs, "missed": missed}))
    else:
        table = Table(title="Peak resident memory of bitmill quantize, 1.1B shape", title_justify="left")
        for column in ("method", "blocks", "peak GB", "bound GB", "time s"):
            table.add_column(column, justify="left" if column == "method" else "right")
        for run in runs:
            colour = "red" if run["peak_bytes"] > run["bound_bytes"] else "green"
            peak = f"[{colour}]{run['peak_bytes'] / 1e9:.3f}[/]"
            table.add_row(
                run["method"], str(run["blocks"]), peak, f"{run['bound_bytes'] / 1e9:.3f}", f"{run['time_s']:.1f}"
            )
        Console().print(table)
    for sentence in missed:
        print(f"missed: {sentence}", file=sys.stderr)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
