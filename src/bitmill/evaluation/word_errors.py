"""Word error rates of recognizers: interval by bootstrap, and the matched-pairs test of two of them.

    rate = (substitutions + deletions + insertions) / words said

Utterances are resampled, because the words of one are right or wrong together. The matched-pairs test (Gillick and
Cox, 1989) asks whether the mean difference of errors over utterances could be chance.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from bitmill.errors import UsageError
from bitmill.evaluation.intervals import SEED, bootstrap_means, percentile_interval

INSTALL = 'pip install "bitmill[speech]"'


@dataclass(frozen=True)
class WordErrors:
    """Errors and words said of every utterance."""

    errors: tuple[int, ...]
    words: tuple[int, ...]

    @property
    def rate(self) -> float:
        """The word error rate of all utterances."""
        return sum(self.errors) / sum(self.words)

    def interval(self) -> list[float]:
        """Return the ends of the 95 % interval of the rate."""
        return _interval(self.errors, self.words)

    def difference_interval(self, other: WordErrors) -> list[float]:
        """Return the ends of the 95 % interval of this rate minus another one, of the utterances in this order."""
        return _interval(self._differences(other), self.words)

    def matched_pairs(self, other: WordErrors) -> float:
        """Return the probability (two-sided p) of such a difference by chance; 1 where there is none.

        Args:
            other: of the utterances in this order.
        """
        differences = self._differences(other)
        count = len(differences)
        spread = statistics.stdev(differences) if count > 1 else 0.0
        if not spread:
            return 1.0
        z = abs(statistics.fmean(differences)) / (spread / math.sqrt(count))
        return 2 * statistics.NormalDist().cdf(-z)

    def _differences(self, other: WordErrors) -> tuple[int, ...]:
        return tuple(a - b for a, b in zip(self.errors, other.errors, strict=True))


def _interval(errors: Sequence[int], words: Sequence[int]) -> list[float]:
    # an utterance of n words is n positions with the errors of one word, the form that `bootstrap_means` reads
    positions = [torch.full((count,), error / count, dtype=torch.float64) for error, count in zip(errors, words)]
    return percentile_interval(bootstrap_means(positions, np.random.default_rng(SEED)))


def require_jiwer() -> None:
    """Import jiwer, before anything takes time. Raises UsageError where it is missing."""
    try:
        import jiwer  # noqa: F401
    except ImportError as error:
        raise UsageError(
            f"Word errors are counted by jiwer, which cannot be imported ({error}); install it with: {INSTALL}"
        ) from None


def count_errors(references: Sequence[str], texts: Sequence[str]) -> WordErrors:
    """Return the errors of texts against what was said, in lower or upper case as they are.

    Args:
        references: of every utterance; each has at least one word.
        texts: of every utterance.
    """
    import jiwer

    found = [jiwer.process_words(reference, text) for reference, text in zip(references, texts, strict=True)]
    errors = tuple(one.substitutions + one.deletions + one.insertions for one in found)
    return WordErrors(errors, tuple(len(reference.split()) for reference in references))
