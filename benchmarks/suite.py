"""Measure folders against their float model on the suite and on texts that are in no mixture.

The float model runs once for all folders. A folder is anything that transformers loads: bitmill's own, or the
dense weights of another program with a peer.json (benchmarks/peers). Figures are kept in a file, row by row, and a
folder that has a row is not measured again.

    python benchmarks/suite.py smollm2-135m FOLDER ... --beside brown,german,WIKITEXT-2/test.txt
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import bitmill
from bitmill.checkpoint.reader import is_checkpoint, open_checkpoint
from bitmill.data.packed import text_windows
from bitmill.data.text import windows_hash
from bitmill.evaluation.logits import pieces
from bitmill.evaluation.metrics import LanguageModelMetrics, batches
from bitmill.files import folder_bytes, write_json
from bitmill.models.split import recorded_output_fn, share_equal_parameters
from bitmill.progress import Progress
from bitmill.workflows.load import load, load_tokenizer
from bitmill.workflows.machine import describe_machine
from bitmill.workflows.sizes import stored_bits

RESULTS = Path(__file__).parent / "results"
TOGETHER = 4  # folders that are in memory together
LONG = 512  # tokens of a window whose float logits are kept for all folders: of 262144 words, 537 MB


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="the float model")
    parser.add_argument("folders", nargs="*", type=Path)
    parser.add_argument("--beside", default="brown,german", help="other texts (default: %(default)s)")
    parser.add_argument("--windows", type=int, default=40, help="of each domain and text (default: %(default)s)")
    parser.add_argument("--seqlen", type=int, default=512, help="tokens of a window (default: %(default)s)")
    parser.add_argument("-o", "--out", type=Path, help="default: results/suite-MODEL.json")
    arguments = parser.parse_args()
    out = arguments.out or RESULTS / f"suite-{arguments.model}.json"
    texts = ["suite", *(name for name in arguments.beside.split(",") if name)]
    measure(arguments.model, arguments.folders, texts, arguments.windows, arguments.seqlen, out)


@torch.no_grad()
def measure(model: str, folders: Sequence[Path], texts: list[str], windows: int, seqlen: int, out: Path) -> None:
    """Measure the folders that have no row yet.

    Args:
        model: the float model.
        folders: quantized models.
        texts: texts to measure on.
        windows: number of windows of each domain and text; fewer where a text is shorter.
        seqlen: tokens of a window.
        out: JSON file, extended.
    """
    cut = {Path(name).stem: Windows(name, load_tokenizer(model), windows, seqlen) for name in texts}
    terms: dict[str, Any] = {
        "model": model,
        "seqlen": seqlen,
        "texts": {name: text.terms for name, text in cut.items()},
    }
    document = json.loads(out.read_text(encoding="utf-8")) if out.exists() else {**terms, "rows": []}
    if {name: document[name] for name in terms} != terms:
        raise SystemExit(f"{out} holds measurements on other windows; choose another file with -o.")
    reference = Recorded(load(model), cut)
    measured = {row["name"] for row in document["rows"]}
    folders = [folder for folder in folders if folder.name not in measured]
    for start in range(0, len(folders), TOGETHER):
        group = folders[start : start + TOGETHER]
        for folder, figures in zip(group, score(group, reference, cut)):
            row = {"name": folder.name, **_origin(folder), "figures": figures, "machine": describe_machine("cpu")}
            document["rows"].append(row)
            mean = ", ".join(f"{name} {found['kl_divergence']:.4f}" for name, found in figures.items())
            print(f"{folder.name}: {row['bits_per_weight']:.3f} bits, KL {mean}", file=sys.stderr, flush=True)
        write_json(out, document)


@torch.no_grad()
def score(folders: Sequence[Path], reference: Recorded, texts: dict[str, Windows]) -> list[dict[str, Any]]:
    """Return the figures of folders by text; the float model's head runs once a window for all of them."""
    recorded = []
    for folder in folders:
        live = load(folder)
        share_equal_parameters(live, reference.model)
        recorded.append(Recorded(live, texts))
    figures: list[dict[str, Any]] = [{} for _ in folders]
    for name, text in texts.items():
        metrics = [LanguageModelMetrics() for _ in folders]
        for index, tokens in enumerate(batches(text.tokens, 1)):
            expected = reference.outputs[name][index]
            if tokens.shape[1] <= LONG:
                expected = torch.cat(list(pieces(expected, 0, tokens.shape[1])))[None]
            for metric, quantized in zip(metrics, recorded):
                metric.add(tokens, quantized.outputs[name][index], expected)
        for found, metric in zip(figures, metrics):
            found[name] = metric.result(text.domains or None)
    return figures


class Windows:
    """The held-out windows of a text.

    Attributes:
        tokens: (windows, seqlen).
        domains: domain -> windows; empty for a text that is one domain.
        terms: number and digest, as plain data.
    """

    def __init__(self, name: str, tokenizer: Any, windows: int, seqlen: int, split: str = "eval") -> None:
        source = text_windows(name, tokenizer)
        self.tokens = source.held_out(split, seqlen, windows)
        self.domains = source.domains(split, seqlen, windows) if name == "suite" else {}
        self.terms = {"windows": self.domains or len(self.tokens), "sha256": windows_hash(self.tokens)}


class Recorded:
    """A model's hidden states on all windows, which its head turns into logits when they are read.

    Attributes:
        model: the model, whose body is freed.
        outputs: text -> output of each window.
    """

    def __init__(self, model: torch.nn.Module, texts: dict[str, Windows]) -> None:
        self.model = model
        tokens = [batch for text in texts.values() for batch in batches(text.tokens, 1)]
        recorded = recorded_output_fn(model, tokens, Progress(), free_body=True)
        outputs = iter([recorded(batch) for batch in tokens])
        self.outputs = {name: [next(outputs) for _ in text.tokens] for name, text in texts.items()}


def _origin(folder: Path) -> dict[str, Any]:
    """Return what made a folder, with its bits per weight and size."""
    peer = folder / "peer.json"
    if peer.is_file():
        return dict(json.loads(peer.read_text(encoding="utf-8")))
    bits, size = stored_bits(folder, False)
    made: dict[str, Any] = {"tool": "bitmill", "version": bitmill.__version__, "bits_per_weight": bits}
    made |= {"size_bytes": size, "folder_bytes": folder_bytes(folder)}
    if is_checkpoint(folder):
        report = open_checkpoint(folder).report
        made |= {"recipe": report["recipe"], "calibration": report["identity"]["calibration"]}
        made |= {"trained": report["trained"]} if "trained" in report else {}
    return made


if __name__ == "__main__":
    main()
