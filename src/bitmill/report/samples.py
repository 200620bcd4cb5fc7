"""Answers of the float and of a quantized model next to each other, the first differing token marked."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from bitmill.report import formatting
from bitmill.report.results import Sample

_LAST_WORD = re.compile(r"\s*\S*\Z")  # of a text, with the space before it
_WORD = re.compile(r"\s*\S+|\s+")
_SPACES = str.maketrans({" ": "␣", "\n": "↵", "\t": "⇥"})  # which would be marked invisibly


@dataclass(frozen=True)
class MarkedText:
    """A text in three parts.

    Attributes:
        common: equal to the other text.
        marked: the first differing token as displayed, spaces alone as symbols; empty where nothing differs, or
            where the text ends.
        rest: what follows.
        ended: the text ends where the other one goes on.
        cut: it was cut off at the largest number of tokens.
        new_tokens: their number.
    """

    common: str
    marked: str
    rest: str
    ended: bool
    cut: bool
    new_tokens: int


@dataclass(frozen=True)
class AnswerPair:
    """Two answers to one prompt.

    verdict: `equal`, or where they differ first.
    """

    reference: MarkedText
    answer: MarkedText
    verdict: str

    @property
    def equal(self) -> bool:
        """True if nothing differs."""
        return self.verdict == "equal"


def pair_answers(reference: Sequence[Sample], answers: Sequence[Sample]) -> list[AnswerPair]:
    """Return a pair for each prompt that both models have answered."""
    return [compare_answers(*both) for both in zip(reference, answers)]


def recorded_pairs(report: dict[str, Any]) -> list[tuple[dict[str, Any], AnswerPair]]:
    """Return the `samples` of a report, each with its two answers compared."""

    def pair(entry: dict[str, Any]) -> AnswerPair:
        both = (entry["reference_answer"], entry["answer"])
        reference, answer = (Sample(**{key: of.get(key) for key in Sample.model_fields}) for of in both)
        return compare_answers(reference, answer)

    return [(entry, pair(entry)) for entry in report.get("samples", [])]


def compare_answers(reference: Sample, answer: Sample) -> AnswerPair:
    """Compare two answers by their tokens, or by words where these are not recorded.

    Args:
        reference: of the float model.
        answer: of the quantized model.
    """
    recorded = (reference.token_ids, reference.token_starts, answer.token_ids, answer.token_starts)
    return _by_word(reference, answer) if None in recorded else _by_token(reference, answer)


def _by_token(reference: Sample, answer: Sample) -> AnswerPair:
    floats, tokens = reference.token_ids or [], answer.token_ids or []
    at = _common_length(floats, tokens)
    if at == len(floats) == len(tokens):
        verdict = "equal"
    elif at == len(tokens):
        verdict = f"ends after {formatting.plural(at, 'token')}, float after {len(floats)}"
    else:
        verdict = f"differs at token {at + 1} of {len(tokens)}"
    differs = verdict != "equal"
    return AnswerPair(_mark_token(reference, at, differs), _mark_token(answer, at, differs), verdict)


def _mark_token(sample: Sample, at: int, differs: bool) -> MarkedText:
    starts = [*(sample.token_starts or []), len(sample.text)]
    # a part of a character is marked together with the tokens that complete it
    end = next((place for place in starts[at:] if place > starts[at]), len(sample.text))
    return _mark(sample, starts[at], end, differs)


def _by_word(reference: Sample, answer: Sample) -> AnswerPair:
    a, b = reference.text, answer.text
    at = _common_length(a, b)
    between_words = all(at == len(text) or text[at].isspace() for text in (a, b))
    if (inside := _LAST_WORD.search(b, 0, at)) and not between_words:
        at = inside.start()
    differs, before, words = a != b, len(b[:at].split()), len(b.split())
    verdict = (
        f"differs at word {before + 1} of {words}"
        if before < words
        else f"ends after {formatting.plural(words, 'word')}"
    )
    both = [_mark(sample, at, _word_end(sample.text, at), differs) for sample in (reference, answer)]
    return AnswerPair(both[0], both[1], verdict if differs else "equal")


def _word_end(text: str, start: int) -> int:
    word = _WORD.match(text, start)
    return word.end() if word else start


def _common_length(a: Sequence[Any], b: Sequence[Any]) -> int:
    """Count the leading entries that two sequences have in common."""
    shorter = min(len(a), len(b))
    return next((i for i in range(shorter) if a[i] != b[i]), shorter)


def _mark(sample: Sample, start: int, end: int, differs: bool) -> MarkedText:
    cut = sample.stopped == "length"
    if not differs:
        return MarkedText(sample.text, "", "", False, cut, sample.new_tokens)
    marked, rest = sample.text[start:end], sample.text[end:]
    if marked.isspace():
        rest = marked.lstrip(" ") + rest  # line breaks stay where they are
        marked = marked.translate(_SPACES)
    start += len(marked) - len(marked.lstrip())  # the space before a word is not marked
    return MarkedText(sample.text[:start], marked.lstrip(), rest, not marked, cut, sample.new_tokens)
