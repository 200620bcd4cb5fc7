"""Lattices of speech recognizers: the standard lattice format of HTK, and OpenFst's text with Kaldi's weights.

    HTK       J=3 S=1 E=2 a=-512.1 l=-4.2 on a link, W=word on it or on the node that it enters; log-probabilities
    OpenFst   3 5 word 516.3, or 3 5 word word 516.3, and 5 or 5 0.0 for a final state; the weight is a cost
    Kaldi     a line with the utterance, such lines with the weight graph,acoustic,transitions, an empty line

A lattice becomes an n-best list: the distinct word sequences of its best paths, by the recognizer's own total of
acoustic and language model scores. The score of a hypothesis is then its acoustic one, as the language model that
rescores takes the place of the other.
"""

from __future__ import annotations

import heapq
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

from bitmill.config.arguments import check_characters
from bitmill.config.documents import read_document
from bitmill.data.nbest import MAX_BYTES, Hypothesis, Utterance
from bitmill.errors import UsageError, quoted

_SILENT = re.compile(r"!NULL|!SENT_START|!SENT_END|<s>|</s>|<eps>|<sil>|#\d+|-", re.IGNORECASE)
_FIELD = re.compile(r'(\w+)=("[^"]*"|\S+)')
_HEADER = {"acscale": "1", "lmscale": "1", "wdpenalty": "0"}  # of HTK, in the order of `Lattice`
_EXPANSIONS = 200  # partial paths that are followed for each hypothesis, beyond one for each arc
_SHORT = {"WORD": "W", "START": "S", "END": "E", "acoustic": "a", "language": "l"}  # of HTK's fields


@dataclass(frozen=True)
class Arc:
    """A word between two states; "" without a word. Scores are log-probabilities in nats."""

    start: str
    end: str
    word: str
    acoustic: float
    language: float


@dataclass
class Lattice:
    """An acyclic graph of words.

    finals: state -> score of ending there.  acoustic_scale, language_scale, word_score: of the recognizer's total,
    in which the last one counts for every word.
    """

    id: str
    start: str
    arcs: list[Arc] = field(default_factory=list)
    finals: dict[str, float] = field(default_factory=dict)
    acoustic_scale: float = 1.0
    language_scale: float = 1.0
    word_score: float = 0.0

    def total(self, arc: Arc) -> float:
        """Return the score of an arc in the recognizer's total."""
        words = self.word_score if arc.word else 0.0
        return self.acoustic_scale * arc.acoustic + self.language_scale * arc.language + words


def read_lattices(path: Path, paths: int) -> list[Utterance]:
    """Read lattices as n-best lists.

    Args:
        path: a file, or a folder of files; a file of HTK or OpenFst is the utterance of its name.
        paths: most hypotheses of an utterance.

    Raises:
        UsageError: a line is wrong, which the message names by its number, or a lattice has no path.
    """
    files = sorted(one for one in path.iterdir() if one.is_file()) if path.is_dir() else [path]
    found: dict[str, Utterance] = {}
    for file in files:
        for lattice in _lattices(file):
            if lattice.id in found:
                raise UsageError(
                    f"{file} repeats the utterance {quoted(lattice.id)}; give every one its own name."
                )
            hypotheses = best_hypotheses(lattice, paths)
            if not hypotheses:
                raise UsageError(f"The lattice {quoted(lattice.id)} of {file} has no path from start to end.")
            found[lattice.id] = Utterance(lattice.id, tuple(hypotheses))
    if not found:
        raise UsageError(f"{path} holds no lattice.")
    return list(found.values())


def _lattices(path: Path) -> Iterator[Lattice]:
    """Yield the lattices of a file, by its form."""
    lines = list(enumerate(read_document(path, "lattice", UsageError, MAX_BYTES).splitlines(), 1))
    lines = [(number, line) for number, line in lines if not line.startswith("# ")]
    for number, line in lines:
        check_characters(line, f"Line {number} of {path}", UsageError)
    filled = [(number, line.split()) for number, line in lines if line.strip()]
    first = next((line for _, line in lines if line.strip() and not line.startswith("#")), "")  # "#" alone
    if _FIELD.match(first):
        yield _htk(path, lines)
    elif filled and len(filled[0][1]) == 1:
        yield from _kaldi(path, lines)
    elif filled:
        yield _openfst(path.stem, path, filled)


def _htk(path: Path, lines: list[tuple[int, str]]) -> Lattice:
    """Read a lattice of HTK."""
    header: dict[str, str] = {}
    words: dict[str, str] = {}
    links: list[tuple[int, dict[str, str]]] = []
    for number, line in lines:
        if line.startswith("#"):
            continue
        fields = {key: value.strip('"') for key, value in _FIELD.findall(line)}
        if "J" in fields or "I" in fields:
            fields = {_SHORT.get(key, key): value for key, value in fields.items()}
        if "J" in fields:
            links.append((number, fields))
        elif "I" in fields:
            words[fields["I"]] = fields.get("W", "")
        else:
            header |= fields
    base = _number(header.get("base", str(math.e)), f"The base of {path}")
    if base < 0 or base == 1:
        raise UsageError(f"The base of {path} is {base:g}; use that of its logarithms, or 0 for probabilities.")
    scales = [_number(header.get(key, default), f"The header of {path}") for key, default in _HEADER.items()]
    lattice = Lattice(header.get("UTTERANCE", path.stem), "", [], {}, *scales)
    for number, link in links:
        where = f"Line {number} of {path}"
        start, end = _entry(link, "S", where), _entry(link, "E", where)
        for state in (start, end):
            if state not in words:
                raise UsageError(f"{where} names the node {quoted(state)}, which no line I={state} describes.")
        scores = [_nats(link.get(key), base, where) for key in "al"]
        lattice.arcs.append(Arc(start, end, _spoken(link.get("W", words[end])), *scores))
    entered, left = {arc.end for arc in lattice.arcs}, {arc.start for arc in lattice.arcs}
    lattice.start = header.get("start") or next((state for state in words if state not in entered), "")
    lattice.finals = {state: 0.0 for state in words if state == header.get("end", state) and state not in left}
    return lattice


def _nats(score: str | None, base: float, where: str) -> float:
    """Return a score of HTK as a log-probability in nats: a logarithm of a base, or a probability with base 0."""
    if score is None:
        return 0.0
    value = _number(score, where)
    if base:
        return value * math.log(base)
    if not 0 < value <= 1:
        raise UsageError(f"{where} has {quoted(score)} where a probability belongs.")
    return math.log(value)


def _kaldi(path: Path, lines: list[tuple[int, str]]) -> Iterator[Lattice]:
    """Yield the lattices of an archive of Kaldi in text."""
    part: list[tuple[int, list[str]]] = []
    for number, line in [*lines, (len(lines) + 1, "")]:
        if line.strip():
            part.append((number, line.split()))
        elif part:
            yield _openfst(part[0][1][0], path, part[1:])
            part = []


def _openfst(name: str, path: Path, lines: list[tuple[int, list[str]]]) -> Lattice:
    """Read the states and arcs of a lattice; the first arc leaves the start."""
    lattice = Lattice(name, lines[0][1][0] if lines else "")
    first = next((words for _, words in lines if len(words) > 2), [])
    labels = 2 if len(first) == 5 or (len(first) == 4 and not _is_weight(first[3])) else 1
    for number, words in lines:
        where = f"Line {number} of {path}"
        if len(words) <= 2:
            lattice.finals[words[0]] = sum(_costs(words[1:], where))
        elif len(words) in (2 + labels, 3 + labels):
            acoustic, language = _costs(words[2 + labels :], where)
            lattice.arcs.append(Arc(words[0], words[1], _spoken(words[1 + labels]), acoustic, language))
        else:
            raise UsageError(f"{where} has {len(words)} columns, and the first arc of the lattice {len(first)}.")
    named = {state for arc in lattice.arcs for state in (arc.start, arc.end)}
    if lattice.arcs and (strange := next((state for state in lattice.finals if state not in named), None)):
        raise UsageError(
            f"The lattice {quoted(name)} of {path} ends in {quoted(strange)}, which no arc names; put an empty "
            "line between two utterances."
        )
    return lattice


def _costs(weight: list[str], where: str) -> tuple[float, float]:
    """Return acoustic and language score of a weight: a cost, or graph,acoustic,transitions."""
    parts = weight[0].split(",") if weight else ["0"]
    costs = [-_number(part, where) for part in parts[:2]]
    return (costs[1], costs[0]) if len(costs) == 2 else (costs[0], 0.0)


def _is_weight(word: str) -> bool:
    """Return True for a number, or numbers with commas."""
    try:
        return "," in word or isinstance(float(word), float)
    except ValueError:
        return False


def _entry(fields: dict[str, str], key: str, where: str) -> str:
    """Return a field of a link. Raises UsageError without it."""
    if key not in fields:
        raise UsageError(f"{where} has no {key}=; a link needs S=, the node it leaves, and E=, the one it enters.")
    return fields[key]


def _number(text: str, where: str) -> float:
    """Return a finite number. Raises UsageError."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise UsageError(f"{where} has {quoted(text)} where a finite number belongs.")
    return value


def _spoken(word: str) -> str:
    """Return a word, "" for marks of silence and of the ends; HTK and PocketSphinx number pronunciations: a(2)."""
    return "" if _SILENT.fullmatch(word) or word.startswith("++") else re.sub(r"\(\d+\)$", "", word)


def best_hypotheses(lattice: Lattice, limit: int) -> list[Hypothesis]:
    """Return the distinct word sequences of the best paths, best first, with their acoustic scores.

    Best-first search of paths, with the exact score of the best way to the end: paths appear in order.

    Fewer than `limit` are returned where the lattice has no more, or where many paths have equal words.

    Raises:
        UsageError: the lattice has a cycle.
    """
    leaving: dict[str, list[Arc]] = {}
    for arc in lattice.arcs:
        leaving.setdefault(arc.start, []).append(arc)
    rest = _best_to_the_end(lattice, leaving)
    if rest.get(lattice.start, -math.inf) == -math.inf:
        return []
    order = count()  # ties are broken by age
    queue: list[tuple[float, int, str | None, float, float, tuple[str, ...]]]
    queue = [(-rest[lattice.start], next(order), lattice.start, 0.0, 0.0, ())]
    found: dict[str, float] = {}
    for _ in range(len(lattice.arcs) + _EXPANSIONS * limit):
        if not queue or len(found) == limit:
            break
        _, _, state, total, acoustic, words = heapq.heappop(queue)
        if state is None:
            found.setdefault(" ".join(words), acoustic)
            continue
        if state in lattice.finals:
            end = total + lattice.finals[state]
            heapq.heappush(queue, (-end, next(order), None, end, acoustic, words))
        for arc in leaving.get(state, ()):
            so_far = total + lattice.total(arc)
            if rest[arc.end] > -math.inf:
                spoken = (*words, arc.word) if arc.word else words
                entry = (-(so_far + rest[arc.end]), next(order), arc.end, so_far, acoustic + arc.acoustic, spoken)
                heapq.heappush(queue, entry)
    return [Hypothesis(text, acoustic) for text, acoustic in found.items()]


def _best_to_the_end(lattice: Lattice, leaving: dict[str, list[Arc]]) -> dict[str, float]:
    """Return the best score from every state that the start reaches to an end, -inf without a way."""
    rest: dict[str, float] = {}
    open_states: set[str] = set()
    pending = [lattice.start]
    while pending:
        state = pending[-1]
        if state in rest:
            pending.pop()
            continue
        ahead = [arc.end for arc in leaving.get(state, ()) if arc.end not in rest]
        if not ahead:
            ways = [lattice.total(arc) + rest[arc.end] for arc in leaving.get(state, ())]
            rest[state] = max([*ways, lattice.finals.get(state, -math.inf)])
            open_states.discard(state)
            pending.pop()
            continue
        if state in open_states or open_states & {*ahead}:
            cycle = next((one for one in ahead if one in open_states), state)
            raise UsageError(f"The lattice {quoted(lattice.id)} has a cycle through the state {quoted(cycle)}.")
        open_states.add(state)
        pending += ahead
    return rest
