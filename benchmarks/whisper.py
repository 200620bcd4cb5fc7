"""Word errors of Whisper-base in float and quantized, on recordings and on sentences in synthetic voices.

    apt-get install flite pocketsphinx-testdata; pip install jiwer
    python benchmarks/whisper.py out --sentences 195      # recordings of LibriVox are added

Calibration reads sentences that one voice speaks, and the evaluation other sentences in two other voices, so
neither voice nor text is shared. The interval of a change of word errors is of a paired bootstrap over utterances.
Results go to OUT/whisper.json.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

import bitmill
from bitmill.data.domain import domain_documents
from bitmill.data.recordings import RATE, samples_of

RECORDINGS = Path("/usr/share/pocketsphinx/test/data/librivox")
CALIBRATION_VOICE, VOICES = "awb", ("slt", "rms")
TRIED = (("rtn", 4), ("gptq", 4), ("gptqt", 4), ("rtn", 3), ("gptq", 3), ("gptqt", 3))
RESAMPLES = 2000
Utterance = tuple[Path, str]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", default="whisper-base")
    parser.add_argument("--sentences", type=int, default=195, help="spoken by synthetic voices, to evaluate on")
    parser.add_argument("--samples", type=int, default=8, help="windows of 30 seconds that calibrate")
    parser.add_argument("--minutes", type=float, default=20, help="of CPU, after which no further model is tried")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    arguments.out.mkdir(parents=True, exist_ok=True)
    calib = calibration_list(arguments.out / "calib", 10 * arguments.samples)
    utterances = recordings() + spoken(arguments.out / "eval", "eval", arguments.sentences, VOICES)
    processor = processor_of(arguments.model)
    document: dict[str, Any] = {"utterances": len(utterances), "recordings": len(recordings()), "models": {}}
    reference, cost = errors(bitmill.load(arguments.model), processor, utterances)
    document |= {"words": int(reference[:, 1].sum())}
    document["models"]["float"] = {"word_errors": rate(reference), "cpu_s": cost}
    for method, bits in TRIED:
        if time.process_time() > 60 * arguments.minutes:
            break
        folder = arguments.out / f"{method}{bits}"
        calibration = bitmill.CalibrationData(str(calib), samples=arguments.samples, seqlen=256)
        outcome = bitmill.quantize(
            arguments.model, method, bits=bits, out=folder, calib=calibration, measure=0, overwrite=True
        )
        found, cost = errors(bitmill.load(folder), processor, utterances)
        document["models"][f"{method}{bits}"] = {
            "word_errors": rate(found),
            "change": rate(found) - rate(reference),
            "change_interval": paired_interval(found, reference),
            "recordings": rate(found[: document["recordings"]]),
            "bits_per_weight": outcome.summary["bits_per_weight"],
            "size_bytes": outcome.summary["size_bytes"],
            "cpu_s": cost,
        }
        print(f"{method}{bits}", json.dumps(document["models"][f"{method}{bits}"]), flush=True)
        (arguments.out / "whisper.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def processor_of(model: str) -> Any:
    """Return the processor of a model."""
    from bitmill.sources.open import open_source
    from bitmill.tasks.base import task_of

    source = open_source(model)
    return task_of(source).reader(source)


def recordings() -> list[Utterance]:
    """Return the recordings of pocketsphinx-testdata that have a transcript."""
    found = []
    for line in (RECORDINGS / "transcription").read_text(encoding="utf-8").splitlines():
        words, _, name = line.rpartition("(")
        text = re.sub(r"<[^>]*>|\[[^]]*\]|\+\+\S*", " ", words)
        found.append((RECORDINGS / f"{name.rstrip(') ')}.wav", " ".join(text.split())))
    return [(path, text) for path, text in found if path.is_file()]


def spoken(folder: Path, part: str, count: int, voices: tuple[str, ...]) -> list[Utterance]:
    """Return sentences of prose, spoken by flite's voices in turn.

    Args:
        folder: for the sound.
        part: part of the domain "prose".
        count: number of sentences.
        voices: of flite.
    """
    folder.mkdir(parents=True, exist_ok=True)
    text = " ".join(domain_documents("prose", part))
    sentences = [s for s in re.split(r"(?<=[.!?])\s+", " ".join(text.split())) if 5 <= len(s.split()) <= 20]
    plain = [s for s in sentences if re.fullmatch(r"[A-Za-z ,.'!?;-]+", s)]
    found = []
    for number, sentence in enumerate(dict.fromkeys(plain)):
        if len(found) == count:
            break
        path = folder / f"{number:04}.wav"
        if not path.is_file():
            subprocess.run(
                ["flite", "-voice", voices[number % len(voices)], "-t", sentence, "-o", str(path)], check=True
            )
        found.append((path, sentence))
    return found


def calibration_list(folder: Path, count: int) -> Path:
    """Return the list of sentences that calibrate, `count` of them in the part "calib" about."""
    lines = [
        json.dumps({"audio": path.name, "text": text})
        for path, text in spoken(folder, "calib", 5 * count // 3, (CALIBRATION_VOICE,))
    ]
    path = folder / "list.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@torch.no_grad()
def errors(model: Any, processor: Any, utterances: list[Utterance]) -> tuple[np.ndarray, float]:
    """Return word errors and words of every utterance, (n, 2), and the CPU seconds of recognizing them."""
    import jiwer

    began, rows = time.process_time(), []
    for path, text in utterances:
        features = processor.feature_extractor(samples_of(path), sampling_rate=RATE, return_tensors="pt")
        ids = model.generate(features["input_features"], language="en", task="transcribe", max_new_tokens=80)
        heard = processor.tokenizer.decode(ids[0], skip_special_tokens=True)
        words = jiwer.process_words(normal(text), normal(heard) or "-")
        rows.append((words.substitutions + words.deletions + words.insertions, len(normal(text).split())))
    return np.array(rows, dtype=float), time.process_time() - began


def normal(text: str) -> str:
    """Return a text in lower case without punctuation, titles written out."""
    titles = {"mr": "mister", "mrs": "missus", "dr": "doctor"}
    words = re.sub(r"[^a-z0-9' ]", " ", text.lower().replace("'", "")).split()
    return " ".join(titles.get(word, word) for word in words)


def rate(rows: np.ndarray) -> float:
    """Return word errors over words."""
    return float(rows[:, 0].sum() / rows[:, 1].sum())


def paired_interval(found: np.ndarray, reference: np.ndarray) -> list[float]:
    """Return the 95 % interval of the change of word errors, over utterances."""
    generator = np.random.default_rng(0)
    draws = generator.integers(0, len(found), (RESAMPLES, len(found)))
    changes = (found[draws, 0].sum(1) - reference[draws, 0].sum(1)) / found[draws, 1].sum(1)
    return [float(end) for end in np.quantile(changes, [0.025, 0.975])]


if __name__ == "__main__":
    main()
