"""N-best lists of speech recognizers: JSON lines, or the text and cost files of Kaldi.

A JSON line is one utterance:

    {"id": "u1", "hypotheses": [{"text": "he was not", "score": -812.5}, ...], "reference": "he was not"}

Kaldi writes `u1-1 he was not` for the first hypothesis of u1, and in other files `u1-1 812.5`, its cost, which is
the negative of a score.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bitmill.config.arguments import check_characters
from bitmill.config.documents import load_json, read_document
from bitmill.errors import UsageError, one_line, quoted

MAX_BYTES = 1 << 31


@dataclass(frozen=True)
class Hypothesis:
    """A text that the recognizer proposes.

    score: log-probability of the recognizer, without that of the language model that rescores; higher is better.
    """

    text: str
    score: float


@dataclass(frozen=True)
class Utterance:
    """The hypotheses of one utterance, best first, and what was said, where that is known."""

    id: str
    hypotheses: tuple[Hypothesis, ...]
    reference: str | None = None


def read_nbest(path: Path, costs: Path | None = None, references: Path | None = None) -> list[Utterance]:
    """Read n-best lists.

    Args:
        path: JSON lines; with `costs` Kaldi's text.
        costs: Kaldi's costs of every hypothesis, such as ac_cost.
        references: lines `id words`, in place of those in a JSON file.

    Raises:
        UsageError: a line is wrong, which the message names by its number.
    """
    found = _json_lists(path) if costs is None else _kaldi_lists(path, costs)
    if not found:
        raise UsageError(f"{path} holds no utterance; give one n-best list on each line.")
    return found if references is None else with_references(found, references)


def with_references(utterances: list[Utterance], path: Path) -> list[Utterance]:
    """Return utterances with what was said, from a file of lines `id words`.

    Raises:
        UsageError: a line is wrong, or an utterance has none.
    """
    said = {name: words for _, name, words in _lines(path, "file of references")}
    if absent := next((utterance.id for utterance in utterances if utterance.id not in said), None):
        raise UsageError(f"{path} has no reference for the utterance {quoted(absent)}; add a line.")
    return [replace(utterance, reference=said[utterance.id]) for utterance in utterances]


def _json_lists(path: Path) -> list[Utterance]:
    """Return the utterances of JSON lines."""
    text = read_document(path, "n-best list", UsageError, MAX_BYTES)
    found: dict[str, Utterance] = {}
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        where = f"Line {number} of {path}"
        try:
            data = load_json(line)
        except ValueError as error:
            raise UsageError(f"{where} is no JSON ({one_line(error)}); write one object on each line.") from None
        utterance = _utterance(data, where)
        if utterance.id in found:
            raise UsageError(f"{where} repeats the id {quoted(utterance.id)}; give every utterance its own.")
        found[utterance.id] = utterance
    return list(found.values())


def _utterance(data: Any, where: str) -> Utterance:
    """Return the utterance of a JSON object. Raises UsageError."""
    keys = {"id": str, "hypotheses": list}
    for key, kind in keys.items():
        if not isinstance(data, dict) or not isinstance(data.get(key), kind):
            noun = "a text" if kind is str else "a list"
            raise UsageError(f"{where} has no {key!r} that is {noun}; write {{'id': ..., 'hypotheses': [...]}}.")
    reference = data.get("reference")
    if reference is not None and not isinstance(reference, str):
        raise UsageError(f"{where} gives the reference {quoted(reference)}; it must be a text.")
    if not data["hypotheses"]:
        raise UsageError(f"{where} has no hypotheses; leave the utterance out, or give the recognizer's best.")
    numbered = enumerate(data["hypotheses"], 1)
    hypotheses = tuple(_hypothesis(one, f"{where}, hypothesis {rank},") for rank, one in numbered)
    for text in (data["id"], reference or ""):
        check_characters(text, where, UsageError)
    return Utterance(data["id"], hypotheses, reference)


def _hypothesis(data: Any, where: str) -> Hypothesis:
    """Return the hypothesis of a JSON object. Raises UsageError."""
    text = data.get("text") if isinstance(data, dict) else None
    score = data.get("score") if isinstance(data, dict) else None
    if not isinstance(text, str):
        raise UsageError(f"{where} has no 'text'; write {{'text': ..., 'score': ...}}.")
    check_characters(text, where, UsageError)
    if isinstance(score, bool) or not isinstance(score, (int, float)) or not math.isfinite(score):
        raise UsageError(f"{where} has the score {quoted(score)}; it must be a finite number.")
    return Hypothesis(text, float(score))


def _kaldi_lists(path: Path, costs: Path) -> list[Utterance]:
    """Return the utterances of Kaldi's text and costs."""
    lines = _lines(costs, "file of costs")
    scores = {name: _score(cost, f"Line {number} of {costs}") for number, name, cost in lines}
    found: dict[str, list[Hypothesis]] = {}
    for number, name, words in _lines(path, "n-best list"):
        utterance, dash, rank = name.rpartition("-")
        if not dash or not rank.isdigit():
            raise UsageError(f"Line {number} of {path} begins with {quoted(name)}; write the id, -, and a number.")
        if name not in scores:
            raise UsageError(f"Line {number} of {path}: {costs} has no cost of {quoted(name)}; add a line.")
        found.setdefault(utterance, []).append(Hypothesis(words, scores[name]))
    return [Utterance(name, tuple(hypotheses)) for name, hypotheses in found.items()]


def _score(cost: str, where: str) -> float:
    """Return the score of a cost. Raises UsageError."""
    try:
        score = -float(cost)
    except ValueError:
        score = math.nan
    if not math.isfinite(score):
        raise UsageError(f"{where} has the cost {quoted(cost)}; it must be a finite number.")
    return score


def _lines(path: Path, noun: str) -> Iterator[tuple[int, str, str]]:
    """Yield number, first word and the rest of every line that is not empty. Raises UsageError for repetitions."""
    names: set[str] = set()
    for number, line in enumerate(read_document(path, noun, UsageError, MAX_BYTES).splitlines(), 1):
        name, _, rest = line.strip().partition(" ")
        if not name:
            continue
        if name in names:
            raise UsageError(f"Line {number} of {path} repeats {quoted(name)}; give every line its own.")
        names.add(name)
        check_characters(line, f"Line {number} of {path}", UsageError)
        yield number, name, " ".join(rest.split())
