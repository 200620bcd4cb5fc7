"""Answers are compared by tokens where these are recorded, and by words elsewhere."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from bitmill.report.results import Sample
from bitmill.report.samples import compare_answers, pair_answers


def by_token(*pieces: str, stopped: str = "length", ids: list[int] | None = None) -> Sample:
    """An answer of these tokens; equal texts have equal ids unless `ids` says otherwise."""
    starts = [len("".join(pieces[:n])) for n in range(len(pieces))]
    ids = ids or [hash(piece) for piece in pieces]
    counted = {"new_tokens": len(pieces), "stopped": stopped}
    return Sample(text="".join(pieces), token_ids=ids, token_starts=starts, **counted)


def plain(text: str) -> Sample:
    return Sample(text=text, new_tokens=9, stopped="length")


def parts(marked) -> tuple[str, str, str]:
    return marked.common, marked.marked, marked.rest


def test_first_differing_token():
    pair = compare_answers(by_token("It", " is", " Par", "is."), by_token("It", " is", " Lon", "don", "."))
    assert pair.verdict == "differs at token 3 of 5"
    assert parts(pair.reference) == ("It is ", "Par", "is.")
    assert parts(pair.answer) == ("It is ", "Lon", "don.")


def test_equal_answers():
    pair = compare_answers(by_token("It", " is"), by_token("It", " is"))
    assert pair.equal
    assert parts(pair.answer) == ("It is", "", "")
    assert compare_answers(plain("It is"), plain("It is")).equal


def test_end_of_text():
    long, short = by_token("It", " is", " so"), by_token("It", " is", stopped="eos")
    pair = compare_answers(long, short)
    assert pair.verdict == "ends after 2\u00a0tokens, float after 3"
    assert (pair.reference.ended, pair.answer.ended) == (False, True)
    assert parts(pair.reference) == ("It is ", "so", "")
    pair = compare_answers(short, long)
    assert pair.verdict == "differs at token 3 of 3"
    assert (pair.reference.ended, pair.answer.ended) == (True, False)


def test_other_tokens_of_one_text():
    """The token is marked though no letter differs."""
    pair = compare_answers(by_token("a", "b c", ids=[1, 2]), by_token("ab", " c", ids=[3, 4]))
    assert pair.verdict == "differs at token 1 of 2"
    assert (pair.reference.marked, pair.answer.marked) == ("a", "ab")


def test_parts_of_a_character():
    """The first of three tokens of one character has no text of its own."""
    answer = Sample(
        text="a€b", new_tokens=5, stopped="eos", token_ids=[1, 2, 3, 4, 5], token_starts=[0, 1, 1, 1, 2]
    )
    pair = compare_answers(by_token("a", "x", ids=[1, 9]), answer)
    assert parts(pair.answer) == ("a", "€", "b")


def test_spaces_are_visible():
    pair = compare_answers(by_token("a", "\n\n", "b"), by_token("a", " ", "b"))
    assert parts(pair.reference) == ("a", "↵↵", "\n\nb")
    assert parts(pair.answer) == ("a", "␣", "b")


@pytest.mark.parametrize(
    ("reference", "answer", "marked", "verdict"),
    [
        ("Paris is old", "Paris was old", ("is", "was"), "differs at word 2 of 3"),
        ("Paris is", "Paris in", ("is", "in"), "differs at word 2 of 2"),
        ("Paris is", "Paris", ("is", ""), "ends after 1\u00a0word"),
        ("", "Paris", ("", "Paris"), "differs at word 1 of 1"),
    ],
)
def test_words_without_recorded_tokens(reference, answer, marked, verdict):
    pair = compare_answers(plain(reference), plain(answer))
    assert (pair.reference.marked, pair.answer.marked) == marked
    assert pair.verdict == verdict


def test_answers_without_partner():
    assert len(pair_answers([plain("a")], [plain("a"), plain("b")])) == 1
    assert pair_answers([], [plain("a")]) == []


@pytest.mark.parametrize(
    "change", [{"token_ids": [1]}, {"token_starts": [0]}, {"token_starts": [0, 3]}, {"token_starts": [-1, 1]}]
)
def test_wrong_tokens_are_refused(change):
    sample = {"text": "ab", "new_tokens": 2, "stopped": "eos", "token_ids": [1, 2], "token_starts": [0, 1]}
    with pytest.raises(ValidationError):
        Sample.model_validate({**sample, **change})
