"""Perplexity and divergence of encoder-decoders, whose decoder is forced to write a given text."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bitmill.evaluation.logits import Output
from bitmill.evaluation.metrics import LanguageModelMetrics


@dataclass
class Seq2SeqMetrics(LanguageModelMetrics):
    """The figures of a language model, for logits that predict the token at their own position."""

    def add(self, tokens: Tensor, output: Output, reference: Output | None = None) -> None:
        """Add a batch.

        Args:
            tokens: (windows, length) token ids that the decoder writes.
            output: (windows, length, vocabulary) logits, of which those at position n predict token n.
            reference: logits of the float model.
        """
        behind_start = torch.cat([torch.zeros_like(tokens[:, :1]), tokens], 1)
        super().add(behind_start, output, reference)
        for window in self.windows[-len(tokens) :]:
            window.tokens -= 1
