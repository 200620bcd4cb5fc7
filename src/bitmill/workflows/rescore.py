"""Rescore the hypotheses of a speech recognizer with a language model.

    score = recognizer's score + lm_weight * log P(text) + insertion_penalty * words

The weight is tuned on the first utterances, which then do not count in the word error rates.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from bitmill.config.arguments import checked_arguments
from bitmill.config.paths import user_path
from bitmill.data.lattices import read_lattices
from bitmill.data.nbest import Utterance, read_nbest, with_references
from bitmill.errors import OutputError, UsageError, quoted
from bitmill.evaluation.generate import check_can_generate
from bitmill.evaluation.text_scores import log_probabilities
from bitmill.evaluation.word_errors import WordErrors, count_errors, require_jiwer
from bitmill.files import write_text
from bitmill.models.block_call import output_fn
from bitmill.progress import Progress
from bitmill.progress.terminal import displayed
from bitmill.workflows.load import live_model, tokenizer_of
from bitmill.workflows.machine import seconds_since

DEV_SHARE = 0.3
WEIGHTS = (0.0, *(2.0 ** (step / 2) for step in range(-16, 17)))  # that are tried, 0.004 to 256
Choice = list[int]  # of every utterance, the index of a hypothesis


@dataclass(frozen=True)
class Scored:
    """Utterances and the log-probability (nats) of every hypothesis under the language model."""

    utterances: list[Utterance]
    lm_scores: list[list[float]]

    def combined(self, lm_weight: float, insertion_penalty: float) -> list[list[float]]:
        """Return the score of every hypothesis."""
        return [
            [
                hypothesis.score + lm_weight * lm + insertion_penalty * len(hypothesis.text.split())
                for hypothesis, lm in zip(utterance.hypotheses, scores, strict=True)
            ]
            for utterance, scores in zip(self.utterances, self.lm_scores, strict=True)
        ]

    def best(self, lm_weight: float, insertion_penalty: float) -> Choice:
        """Return the first hypothesis of the highest score of every utterance."""
        combined = self.combined(lm_weight, insertion_penalty)
        return [max(range(len(scores)), key=scores.__getitem__) for scores in combined]

    def errors(self, choice: Choice) -> WordErrors:
        """Return the word errors of chosen hypotheses."""
        texts = [one.hypotheses[index].text for one, index in zip(self.utterances, choice, strict=True)]
        return count_errors([one.reference or "" for one in self.utterances], texts)

    def part(self, start: int, stop: int) -> Scored:
        """Return some of the utterances."""
        return Scored(self.utterances[start:stop], self.lm_scores[start:stop])


@checked_arguments("lm", "tokenizer", "progress")
def rescore(
    nbest: str | Path,
    lm: str | Path | nn.Module,
    *,
    out: str | Path,
    lm_weight: float | None = None,
    insertion_penalty: float = 0.0,
    references: str | Path | None = None,
    costs: str | Path | None = None,
    paths: int | None = None,
    dev_share: float = DEV_SHARE,
    score_end: bool = False,
    batch_size: int = 16,
    overwrite: bool = False,
    tokenizer: Any = None,
    device: str = "cpu",
    trust_remote_code: bool = False,
    progress: Progress | bool | None = None,
) -> dict[str, Any]:
    """Choose among the hypotheses of a recognizer with the help of a language model.

    Args:
        nbest: n-best lists, see `bitmill.data.nbest`.
        lm: a language model: a quantized folder, any float model, or a live module.
        out: JSON lines to write, with the chosen text and all scores of every utterance.
        lm_weight: weight of the language model; tuned on the first utterances without it.
        insertion_penalty: added for every word; positive values favour longer texts.
        references: lines `id words`, in place of those in a JSON file.
        costs: of the hypotheses, where `nbest` is Kaldi's text.
        paths: hypotheses of each utterance, where `nbest` is a file or a folder of lattices; see
            `bitmill.data.lattices`.
        dev_share: share of the utterances, the first ones, on which the weight is tuned.
        score_end: count the end-of-text token after each hypothesis.
        batch_size: hypotheses that run together.
        overwrite: replace `out`.
        tokenizer: of a live module.

    Returns:
        `utterances`, `hypotheses`, `lm_weight`, `insertion_penalty`, `tuned_on` (utterances), `out`, `time_s`, and
        with references `word_errors`, see `_word_errors`.

    Raises:
        UsageError: a line of a file is wrong, or there is nothing to tune the weight with.
        OutputError: `out` exists.
    """
    started = time.perf_counter()
    path = user_path(out)
    _check(path, overwrite, dev_share, batch_size, lm_weight, insertion_penalty)
    files = [None if file is None else user_path(file) for file in (costs, references)]
    if paths is None:
        utterances = read_nbest(user_path(nbest), *files)
    else:
        utterances = _from_lattices(user_path(nbest), paths, *files)
    tuned_on = _tuned_on(utterances, lm_weight, dev_share)
    tokenizer = tokenizer_of(lm, tokenizer, trust_remote_code)
    with displayed(progress) as shown:
        shown.start("opening the model", 0)
        model = live_model(lm, device, trust_remote_code)
        check_can_generate(model, "" if isinstance(lm, nn.Module) else str(lm))
        scored = _score(model, tokenizer, utterances, batch_size, score_end, shown)
    weight = _tuned(scored.part(0, tuned_on), insertion_penalty) if lm_weight is None else lm_weight
    result: dict[str, Any] = {
        "utterances": len(utterances),
        "hypotheses": sum(len(utterance.hypotheses) for utterance in utterances),
        "lm_weight": weight,
        "insertion_penalty": insertion_penalty,
        "tuned_on": tuned_on,
    }
    if utterances[0].reference is not None:
        measured = scored.part(tuned_on, len(utterances))
        result["word_errors"] = _word_errors(measured, weight, insertion_penalty)
    write_text(path, "".join(_lines(scored, weight, insertion_penalty)))
    return {**result, "out": str(path), "time_s": seconds_since(started)}


def _check(
    path: Path, overwrite: bool, dev_share: float, batch_size: int, lm_weight: float | None, penalty: float
) -> None:
    """Raise an error for arguments out of range, before anything takes time."""
    if path.exists() and not (overwrite and path.is_file()):
        raise OutputError(f"{path} exists; choose another file with -o, or replace a file with --overwrite.")
    if not path.parent.is_dir():
        raise OutputError(f"There is no folder {path.parent}; make it, or choose another file with -o.")
    if not 0 < dev_share < 1:
        raise UsageError(f"dev_share is {dev_share}; use a share between 0 and 1.")
    if batch_size < 1:
        raise UsageError(f"batch_size is {batch_size}; use at least 1.")
    for name, value in {"lm_weight": lm_weight or 0.0, "insertion_penalty": penalty}.items():
        if not abs(value) < 1e6:
            raise UsageError(f"{name} is {value}; use a number below a million.")


def _from_lattices(path: Path, paths: int, costs: Path | None, references: Path | None) -> list[Utterance]:
    """Return the best paths of lattices as n-best lists. Raises UsageError."""
    if paths < 1:
        raise UsageError(f"paths is {paths}; use at least 1.")
    if costs is not None:
        raise UsageError("--costs belongs to Kaldi's n-best lists, and lattices hold their scores; leave it out.")
    found = read_lattices(path, paths)
    return found if references is None else with_references(found, references)


def _tuned_on(utterances: list[Utterance], lm_weight: float | None, dev_share: float) -> int:
    """Return the number of utterances to tune the weight on; 0 with a weight. Raises UsageError."""
    known = [utterance for utterance in utterances if utterance.reference is not None]
    if known and len(known) < len(utterances):
        absent = next(utterance.id for utterance in utterances if utterance.reference is None)
        raise UsageError(f"The utterance {quoted(absent)} has no reference, and others have; give all or none.")
    if known:
        require_jiwer()
        if empty := next((one.id for one in known if not (one.reference or "").split()), None):
            raise UsageError(f"The reference of the utterance {quoted(empty)} has no words; leave it out.")
    if lm_weight is not None:
        return 0
    count = max(1, round(dev_share * len(utterances)))
    if not known or count >= len(utterances):
        raise UsageError(
            "The weight of the language model is tuned on utterances with references, and others are measured; "
            "give --references and at least two utterances, or --lm-weight."
        )
    return count


def _score(
    model: nn.Module,
    tokenizer: Any,
    utterances: list[Utterance],
    batch_size: int,
    score_end: bool,
    shown: Progress,
) -> Scored:
    """Score every different text once."""
    texts = list(dict.fromkeys(one.text for utterance in utterances for one in utterance.hypotheses))
    shown.start("scoring", len(texts))

    def advance(count: int) -> None:
        for _ in range(count):
            shown.advance()

    found = log_probabilities(
        output_fn(model),
        getattr(model, "config", None),
        tokenizer,
        texts,
        batch_size=batch_size,
        score_end=score_end,
        on_scored=advance,
    )
    shown.finish()
    scores = dict(zip(texts, found, strict=True))
    return Scored(utterances, [[scores[one.text] for one in utterance.hypotheses] for utterance in utterances])


def _tuned(dev: Scored, insertion_penalty: float) -> float:
    """Return the weight of the fewest word errors; of several the smallest one."""
    errors = {weight: sum(dev.errors(dev.best(weight, insertion_penalty)).errors) for weight in WEIGHTS}
    return min(errors, key=lambda weight: (errors[weight], weight))


def _word_errors(scored: Scored, weight: float, insertion_penalty: float) -> dict[str, Any]:
    """Return the word error rates of utterances that tuned nothing.

    Returns:
        `utterances`, `words`; `first`: the first hypotheses; `rescored`; `oracle`: the best hypotheses; `interval`
        of `rescored`; `difference_interval` and `p` of `rescored` minus `first`.
    """
    first = scored.errors([0] * len(scored.utterances))
    rescored = scored.errors(scored.best(weight, insertion_penalty))
    oracle = [_fewest_errors(utterance) for utterance in scored.utterances]
    return {
        "utterances": len(scored.utterances),
        "words": sum(first.words),
        "first": first.rate,
        "rescored": rescored.rate,
        "oracle": sum(oracle) / sum(first.words),
        "interval": rescored.interval(),
        "difference_interval": rescored.difference_interval(first),
        "p": rescored.matched_pairs(first),
    }


def _fewest_errors(utterance: Utterance) -> int:
    """Return the errors of the best hypothesis."""
    texts = [one.text for one in utterance.hypotheses]
    return min(count_errors([utterance.reference or ""] * len(texts), texts).errors)


def _lines(scored: Scored, weight: float, insertion_penalty: float) -> Sequence[str]:
    """Return the JSON lines of the output."""
    lines = []
    combined = scored.combined(weight, insertion_penalty)
    choice = scored.best(weight, insertion_penalty)
    for utterance, lm, scores, best in zip(scored.utterances, scored.lm_scores, combined, choice):
        rows = [
            {"text": one.text, "score": one.score, "lm_score": log_p, "combined": score}
            for one, log_p, score in zip(utterance.hypotheses, lm, scores, strict=True)
        ]
        reference = {} if utterance.reference is None else {"reference": utterance.reference}
        line = {"id": utterance.id, "text": rows[best]["text"], "hypotheses": rows, **reference}
        lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    return lines
