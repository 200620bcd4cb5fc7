"""Logits that are computed when they are read, a few positions at a time.

Logits of one window of 512 tokens over 262,144 words are 537 MB in fp32. The hidden states that they are computed
from are a thousandth of that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import Tensor

POSITIONS = 128  # that a head computes at a time: over 262,144 words 134 MB in fp32


@dataclass(frozen=True)
class DeferredLogits:
    """Logits of windows; `logits[window, positions]` computes some of them, as it indexes a tensor of logits.

    read: function of the number of a window and a slice of its positions; returns logits (n, vocabulary).
    """

    read: Callable[[int, slice], Tensor]

    def __getitem__(self, at: tuple[int, slice]) -> Tensor:
        return self.read(*at)


# Logits (windows, length, vocabulary) of a language model, or an encoder's hidden states (windows, length, width).
Output = Tensor | DeferredLogits
OutputFn = Callable[[Tensor], Output]  # of tokens (windows, length)


def slices(length: int) -> Iterator[slice]:
    """Yield consecutive slices of up to POSITIONS positions, of nearly equal size.

    A short remainder would take another path in packed layers, which compute few rows more coarsely than many.
    """
    count = -(-length // POSITIONS)
    for index in range(count):
        yield slice(length * index // count, length * (index + 1) // count)


def pieces(output: Output, window: int, length: int) -> Iterator[Tensor]:
    """Yield the logits (n, vocabulary) of consecutive positions of a window.

    Args:
        output: logits of windows.
        window: number of the window.
        length: positions that are read.
    """
    for positions in slices(length):
        yield output[window, positions]
