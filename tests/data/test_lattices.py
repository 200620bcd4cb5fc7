"""Lattices become n-best lists: best paths in order, distinct, with acoustic scores; wrong lines are named."""

from __future__ import annotations

import itertools
import math
import random
from pathlib import Path

import pytest

from bitmill.data.lattices import Arc, Lattice, best_hypotheses, read_lattices
from bitmill.errors import UsageError

HTK = """# a comment
VERSION=1.0
UTTERANCE=u1
lmscale=2.0
start=0 end=3
N=4 L=4
I=0 t=0.0
I=1 t=0.5 W=the v=1
I=2 t=0.5 W="THE"
I=3 t=1.0 W=!NULL
J=0 S=0 E=1 a=-10.0 l=-1.0
J=1 S=0 E=2 a=-9.0 l=-2.0
J=2 S=1 E=3 a=-5.0 l=0.0 W=mill(2)
J=3 S=2 E=3 a=-5.5 l=0.0
"""
OPENFST = "0 1 the the 10\n0 1 a a 11.5\n1 2 mill mill 5\n2 0.5\n"
ACCEPTOR = "0 1 the 10\n0 1 a 11.5\n1 2 mill 5\n2 0.5\n"
KALDI = "u1\n0 1 the 1,10,4_5_6\n0 1 a 0.5,12,4\n1 2 mill 1,5,7\n2 0.5,0.25,\n\nu2\n0 1 <eps> 0,1,\n1\n\n"


def written(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_htk(tmp_path: Path) -> None:
    (utterance,) = read_lattices(written(tmp_path / "a.slf", HTK), 10)
    assert utterance.id == "u1"
    # totals with twice the language score: -10 - 2 - 5 and -9 - 4 - 5.5
    assert [(h.text, h.score) for h in utterance.hypotheses] == [("the mill", -15.0), ("THE", -14.5)]


def test_htk_scales_and_long_names(tmp_path: Path) -> None:
    header = "VERSION=1.0\nacscale=0.1 lmscale=1.0 wdpenalty={}\nN=3 L=3\n"
    nodes = "I=0\nI=1 WORD=a\nI=2 WORD=b\n"
    links = "J=0 START=0 END=1 acoustic=-10 language=-1\nJ=1 S=1 E=2 a=-10 l=0\nJ=2 S=0 E=2 a=-25 l=0\n"
    for penalty, expected in (("0", ["b", "a b"]), ("1", ["a b", "b"])):  # -2.5 against -3, then -1.5 against -1
        (utterance,) = read_lattices(written(tmp_path / "u.slf", header.format(penalty) + nodes + links), 5)
        assert [h.text for h in utterance.hypotheses] == expected


def test_htk_probabilities(tmp_path: Path) -> None:
    text = "VERSION=1.0\nbase=0\nN=2 L=2\nI=0\nI=1\nJ=0 S=0 E=1 W=x a=0.5\nJ=1 S=0 E=1 W=y a=0.25\n"
    (utterance,) = read_lattices(written(tmp_path / "u.slf", text), 5)
    assert [(h.text, round(math.exp(h.score), 9)) for h in utterance.hypotheses] == [("x", 0.5), ("y", 0.25)]


def test_a_path_longer_than_the_search(tmp_path: Path) -> None:
    chain = "".join(f"{n} {n + 1} w{n} 1\n" for n in range(400)) + "400\n"
    (utterance,) = read_lattices(written(tmp_path / "u.txt", chain), 1)
    assert len(utterance.hypotheses[0].text.split()) == 400


@pytest.mark.parametrize("text", [OPENFST, ACCEPTOR])
def test_openfst(tmp_path: Path, text: str) -> None:
    (utterance,) = read_lattices(written(tmp_path / "u7.txt", text), 10)
    assert utterance.id == "u7"
    assert [(h.text, h.score) for h in utterance.hypotheses] == [("the mill", -15.0), ("a mill", -16.5)]


def test_kaldi(tmp_path: Path) -> None:
    first, second = read_lattices(written(tmp_path / "lat.txt", KALDI), 10)
    assert [(h.text, h.score) for h in first.hypotheses] == [("the mill", -15.0), ("a mill", -17.0)]
    assert (second.id, [h.text for h in second.hypotheses]) == ("u2", [""])


def test_a_folder_and_the_number_of_paths(tmp_path: Path) -> None:
    written(tmp_path / "b.slf", HTK)
    written(tmp_path / "c.txt", ACCEPTOR)
    found = read_lattices(tmp_path, 1)
    assert [(one.id, len(one.hypotheses)) for one in found] == [("u1", 1), ("c", 1)]


@pytest.mark.parametrize("seed", range(5))
def test_best_paths_are_those_of_enumeration(seed: int) -> None:
    draw = random.Random(seed)
    arcs = []
    for a, b in itertools.combinations(range(6), 2):
        arcs += [
            Arc(str(a), str(b), draw.choice(["x", "y", ""]), -draw.random(), -draw.random()) for _ in range(2)
        ]
    lattice = Lattice("u", "0", arcs, {"5": -0.3, "4": -0.1}, language_scale=0.7)
    best: dict[str, float] = {}

    def walk(state: str, total: float, words: list[str]) -> None:
        if state in lattice.finals:
            text = " ".join(words)
            best[text] = max(best.get(text, -math.inf), total + lattice.finals[state])
        for arc in arcs:
            if arc.start == state:
                spoken = [*words, arc.word] if arc.word else words
                walk(arc.end, total + arc.acoustic + 0.7 * arc.language, spoken)

    walk("0", 0.0, [])
    expected = sorted(best, key=lambda text: -best[text])[:8]
    assert [h.text for h in best_hypotheses(lattice, 8)] == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (HTK.replace("a=-9.0", "a=x"), "Line 12 .* has 'x' where a finite number belongs"),
        (HTK.replace("S=1 ", ""), "Line 13 .* has no S="),
        (HTK.replace("E=3 a=-5.5", "E=9 a=-5.5"), "Line 14 .* names the node '9'"),
        (HTK.replace("E=3 ", "E=0 "), "no path|cycle"),
        ("0 1 a 1\n1 0 b 1\n1\n", "cycle"),
        ("0 1 a nan,1,\n1\n", "Line 1 .* finite number"),
        ("0 1 a 1\n1 2 b c 3\n2\n", "Line 2 .* has 5 columns"),
        ("0 1 a 1\n1 2 b x\n2\n", "Line 2 .* has 'x'"),
        ("0 1 a 1\n", "no path"),
        ("u1\n0 1 a 1,1,\n1\nu2\n0 1 a 1,1,\n1\n", "'u2', which no arc names"),
        (HTK.replace("lmscale=2.0", "base=-2"), "base .* is -2"),
        (HTK.replace("lmscale=2.0", "base=0"), "'-10.0' where a probability belongs"),
        ("", "holds no lattice"),
    ],
)
def test_refusals(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        read_lattices(written(tmp_path / "u.txt", text), 3)
