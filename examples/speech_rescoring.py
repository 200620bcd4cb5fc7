"""Recognize speech with PocketSphinx, and let language models of any precision choose among its hypotheses.

    pip install pocketsphinx jiwer                     # and, of Debian: flite, pocketsphinx-testdata
    python examples/speech_rescoring.py speech-out --text speech-lm-text/heldout.txt --lm speech-lm --lm LM-2bit

The recordings are those of LibriVox in Debian's pocketsphinx-testdata, and sentences of held-out text (--text; see
train_speech_lm.py) that flite speaks in several synthetic voices, which are easier and duller than people. The
score of a hypothesis is the recognizer's: the acoustic score of its best path through the lattice, in nats, plus
the trigram of the recognizer, weighted as the recognizer weights it (--trigram 0 leaves it out).
"""

from __future__ import annotations

import argparse
import json
import random
import re
import subprocess
import tempfile
import wave
from collections import defaultdict
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from pocketsphinx import Decoder

from bitmill.workflows.rescore import rescore

RECORDINGS = Path("/usr/share/pocketsphinx/test/data/librivox")
VOICES = ("slt", "rms", "awb")
BASE = 1e-4  # nats of a unit of PocketSphinx, whose logarithms have the base 1.0001
FILLER = re.compile(r"<.*>|\[.*\]|\+\+.*\+\+")
Utterance = tuple[str, str, bytes]  # id, what is said, 16-bit samples at 16 kHz


def recordings() -> Iterator[Utterance]:
    """Yield the recordings of pocketsphinx-testdata."""
    for line in (RECORDINGS / "transcription").read_text(encoding="utf-8").splitlines():
        words, _, name = line.rpartition("(")
        text = " ".join(word for word in words.split() if not FILLER.fullmatch(word))
        yield name.rstrip(") "), text, samples(RECORDINGS / f"{name.rstrip(') ')}.wav")


def spoken(sentences: list[str]) -> Iterator[Utterance]:
    """Yield sentences, spoken by flite's voices in turn."""
    with tempfile.TemporaryDirectory() as folder:
        for number, sentence in enumerate(sentences):
            voice, file = VOICES[number % len(VOICES)], Path(folder) / "spoken.wav"
            subprocess.run(["flite", "-voice", voice, "-t", sentence, "-o", str(file)], check=True)
            yield f"{voice}-{number:04}", sentence, samples(file)


def samples(file: Path) -> bytes:
    """Return the samples of a file of 16 kHz."""
    with wave.open(str(file)) as sound:
        if (sound.getframerate(), sound.getnchannels(), sound.getsampwidth()) != (16_000, 1, 2):
            raise SystemExit(f"{file} is not 16-bit mono sound at 16 kHz.")
        return sound.readframes(sound.getnframes())


class Lattice:
    """A word lattice of PocketSphinx: nodes are words, edges have the acoustic score of the word they leave."""

    def __init__(self, text: str) -> None:
        nodes, edges = text.split("Nodes", 1)[1].split("Edges", 1)
        self.words, self.start = {}, {}
        for line in nodes.splitlines()[1:]:
            fields = line.split()
            if len(fields) > 3 and fields[0].isdigit():
                self.words[int(fields[0])], self.start[int(fields[0])] = plain(fields[1]), int(fields[2])
            elif fields[:1] == ["Initial"]:
                self.first = int(fields[1])
            elif fields[:1] == ["Final"]:
                self.last = int(fields[1])
        self.edges: dict[int, list[tuple[int, float]]] = defaultdict(list)
        for line in edges.splitlines()[1:]:
            fields = line.split()
            if len(fields) == 3:
                self.edges[int(fields[0])].append((int(fields[1]), int(fields[2]) * BASE))

    def acoustic_score(self, words: list[str]) -> float | None:
        """Return the score of the best path that says these words; None where no path does."""
        best: dict[tuple[int, int], float] = {(self.first, 0): 0.0}  # node, words said before it
        for node in sorted(self.words, key=self.start.__getitem__):
            for said in range(len(words) + 1):
                score = best.get((node, said))
                if score is None:
                    continue
                word = self.words[node]
                after = said + 1 if word else said
                if word and (said == len(words) or words[said] != word):
                    continue
                for target, acoustic in self.edges[node]:
                    key = (target, after)
                    best[key] = max(best.get(key, -float("inf")), score + acoustic)
        ends = [best.get((self.last, count)) for count in (len(words), len(words) - 1)]
        word = self.words[self.last]
        return ends[1] if word and word == words[-1:] else ends[0]


def plain(word: str) -> str:
    """Return a word without the number of its pronunciation; "" for silence and noise."""
    return "" if FILLER.fullmatch(word) else re.sub(r"\(\d+\)$", "", word)


def hypotheses(decoder: Any, sound: bytes, count: int, trigram: float) -> list[dict[str, Any]]:
    """Return the recognizer's best text first, and others, with their scores."""
    decoder.start_utt()
    decoder.process_raw(sound, full_utt=True)
    decoder.end_utt()
    best = decoder.hyp()
    texts = [best.hypstr if best else ""]
    texts += [one.hypstr for one in islice(decoder.nbest(), 5 * count) if one is not None]
    cleaned = dict.fromkeys(" ".join(filter(None, map(plain, text.split()))) for text in texts)
    with tempfile.NamedTemporaryFile("r", suffix=".lat", encoding="utf-8") as file:
        decoder.get_lattice().write(file.name)
        lattice = Lattice(Path(file.name).read_text(encoding="utf-8"))
    model, found = decoder.get_lm(), []
    for text in islice(cleaned, count):
        words = text.split()
        acoustic = lattice.acoustic_score(words)
        if acoustic is not None:
            language = BASE * sum(model.prob([w, *reversed(h)]) for h, w in histories(words)) if trigram else 0.0
            found.append({"text": text, "score": acoustic + trigram * language})
    return found


def histories(words: list[str]) -> Iterator[tuple[list[str], str]]:
    """Yield every word, and the end, behind up to two words before it."""
    whole = ["<s>", *words, "</s>"]
    for index in range(1, len(whole)):
        yield whole[max(0, index - 2) : index], whole[index]


def main() -> None:
    """Write the n-best lists, rescore them with every model, and print word error rates."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("out", type=Path)
    options.add_argument("--lm", action="append", required=True, help="folder of a language model; repeatable")
    options.add_argument("--text", type=Path, required=True, help="sentences, one on each line")
    options.add_argument("--sentences", type=int, default=25, help="held-out sentences that flite speaks")
    options.add_argument("--hypotheses", type=int, default=20)
    options.add_argument("--trigram", type=float, default=6.5, help="weight of the recognizer's language model")
    options.add_argument("--lm-weight", type=float, help="tuned on the first utterances without it")
    options.add_argument("--seed", type=int, default=0)
    given = options.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    nbest = given.out / "nbest.jsonl"
    if not nbest.exists():
        heldout = given.text.read_text(encoding="utf-8").replace("<s> ", "").splitlines()
        suited = [line for line in heldout if 6 <= len(line.split()) <= 20]
        drawn = random.Random(given.seed).sample(suited, given.sentences)
        decoder = Decoder(samprate=16000, loglevel="FATAL")
        lines = []
        for name, reference, sound in [*spoken(drawn), *recordings()]:
            found = hypotheses(decoder, sound, given.hypotheses, given.trigram)
            if found:
                lines.append(json.dumps({"id": name, "hypotheses": found, "reference": reference}))
        nbest.write_text("\n".join(lines) + "\n", encoding="utf-8")
    for number, lm in enumerate(given.lm):
        out = given.out / f"best-{number}.jsonl"
        result = rescore(nbest, lm, out=out, lm_weight=given.lm_weight, score_end=True, overwrite=True)
        print(json.dumps({"lm": lm, **result}, indent=1))


if __name__ == "__main__":
    main()
