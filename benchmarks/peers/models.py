"""The models of the comparison in the formats of all engines, made on first use and kept."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent
GGUF_TYPES = ("Q4_0", "Q4_1", "Q3_K", "Q8_0")
BITS = (4, 3, 2)


@dataclass(frozen=True)
class Model:
    """A float model, and how bitmill quantizes it.

    Attributes:
        name: Name of the model.
        about: Description in the page.
        options: Options of `bitmill quantize`.
        head_bits: Bits of the output matrix, as in llama.cpp's files.
        turns: Default number of turns of decode and prefill.
        least_cosine: Smallest cosine between the logits of an engine and the float model's that passes the check.
        text: Prompt; None for random weights, which have no words.
    """

    name: str
    about: str
    options: tuple[str, ...]
    head_bits: int
    turns: tuple[int, int]
    least_cosine: float
    text: str | None

    def source(self, folder: Path) -> str:
        """Return the name or folder that bitmill and transformers load."""
        if self.text is not None:
            return self.name
        sys.path.insert(0, str(HERE.parent))
        from memory import checkpoint  # of TinyLlama's shape, random weights

        return str(checkpoint(folder, 22))

    def words(self, tokens: list[int]) -> str:
        """Return the text of token ids, \"\" for random weights."""
        if self.text is None:
            return ""
        return str(_tokenizer(self.name).decode(tokens))

    def ids(self, text: str) -> list[int]:
        """Return the token ids of a text."""
        return list(_tokenizer(self.name)(text)["input_ids"])

    def folder(self, files: Path) -> str:
        """Return the float model as a folder in the format of transformers."""
        if self.text is None:
            return self.source(files)
        out = files / f"{self.name}-folder"
        if not (out / "config.json").is_file():
            import bitmill

            bitmill.load_tokenizer(self.name).save_pretrained(out)
            bitmill.load(self.name, dtype=torch.bfloat16).save_pretrained(out)
        return str(out)

    def packed(self, folder: Path, bits: int) -> Path:
        """Return bitmill's folder with so many bits, quantizing if needed.

        Args:
            folder: Folder of the files.
            bits: Bits of a weight.
        """
        out = folder / f"{self.name}-{bits}-bits-head-{self.head_bits}"
        if not out.is_dir():
            _say(f"quantizing {self.name} to {bits} bits")
            command = [
                sys.executable,
                "-P",
                "-m",
                "bitmill.cli.main",
                *self.command(bits, self.source(folder))[1:],
            ]
            command += ["--measure", "0", "-o", str(out)]
            command += ["--resume"] if out.with_name(out.name + ".partial").is_dir() else []
            _run(command)
        return out

    def command(self, bits: int, source: str | None = None) -> list[str]:
        """Return the command that quantizes it, without the output folder.

        Args:
            bits: Bits of a weight.
            source: Source in place of the name.
        """
        made = ["bitmill", "quantize", source or self.name, *self.options]
        return [*made, "--bits", str(bits), "--head-bits", str(self.head_bits)]

    def gguf(self, folder: Path, kind: str, python: str) -> Path:
        """Return llama.cpp's file, quantized by llama.cpp if needed.

        Args:
            folder: Folder of the files.
            kind: Type of the weights.
            python: Interpreter of its environment.
        """
        out = folder / f"{self.name}-{kind}.gguf"
        if not out.is_file():
            _say(f"quantizing {self.name} to {kind}")
            _run([python, str(HERE / "gguf_quantize.py"), str(self._float_gguf(folder)), str(out), kind])
        return out

    def _float_gguf(self, folder: Path) -> Path:
        out = folder / f"{self.name}-F16.gguf"
        if not out.is_file():
            from gguf_float import write_float

            from bitmill.sources.zoo import fetch

            write_float(fetch(self.name) if self.text is not None else Path(self.source(folder)), out)
        return out

    def tidy(self, folder: Path) -> None:
        """Remove the intermediate F16 file once the others exist."""
        if all((folder / f"{self.name}-{kind}.gguf").is_file() for kind in GGUF_TYPES):
            (folder / f"{self.name}-F16.gguf").unlink(missing_ok=True)


MODELS = {
    model.name: model
    for model in (
        Model(
            "smollm2-135m",
            "135 M weights, 30 blocks, the head tied to the embedding. Its rows of 576 are no multiple of the 256 "
            "that k-quants take together, so llama.cpp stores most of its Q3_K in other types.",
            ("--method", "gptq", "--samples", "16"),
            8,
            (5, 3),
            0.3,
            "The capital of France is",
        ),
        Model(
            "synthetic-1b",
            "1.1 B random weights in the shape of TinyLlama: 22 blocks, hidden 2048, intermediate 5632, 32 heads, "
            "4 of them for keys and values, 32000 tokens. Its text is meaningless; its speed is that of a trained "
            "model.",
            ("--method", "rtn"),
            6,
            (3, 2),
            0.05,  # random weights tolerate 2 bits badly; of 32000 logits, chance gives 0.006
            None,
        ),
    )
}


def types_of(file: Path) -> str:
    """Return the number of matrices of a GGUF file for each type."""
    import gguf

    found = Counter(t.tensor_type.name for t in gguf.GGUFReader(file).tensors if len(t.shape) > 1)
    return ", ".join(f"{count} {kind}" for kind, count in found.most_common())


@cache
def _tokenizer(name: str) -> Any:
    import bitmill

    return bitmill.load_tokenizer(name)


def _run(command: list[str]) -> None:
    threads = str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    variables = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", threads)}
    if subprocess.run(command, env=variables, stdout=sys.stderr).returncode:
        raise SystemExit(f"{' '.join(command)} failed.")


def _say(what: str) -> None:
    print(what, file=sys.stderr, flush=True)
