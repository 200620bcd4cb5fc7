"""Causal language models: they predict the next token of a stream."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from bitmill.data.packed import text_windows
from bitmill.data.text import TextSource
from bitmill.data.windows import TextWindows
from bitmill.evaluation.metrics import LanguageModelMetrics, Metric
from bitmill.tasks.base import TASKS, Loss, Task


@TASKS.register("causal_lm")
class CausalLM(Task):
    """A decoder, measured by perplexity and by its divergence from the float model."""

    description = "a language model"
    auto_class_name = "AutoModelForCausalLM"
    generates = True
    batch_size = 2

    def windows(self, text: TextSource, tokenizer: Any) -> TextWindows:
        """Return windows of one stream of tokens.

        Args:
            text: see `Task.windows`.
            tokenizer: the model's tokenizer.
        """
        return text_windows(text, tokenizer)

    def metric(self) -> Metric:
        """Return perplexity, KL divergence and top-1 agreement."""
        return LanguageModelMetrics()

    def loss(self) -> Loss:
        """Return the mean next-token cross entropy of a window."""
        return _cross_entropy


def _cross_entropy(tokens: Tensor, logits: Tensor) -> Tensor:
    """Return the mean next-token loss of tokens (1, n) under logits (1, n, vocabulary)."""
    return nn.functional.cross_entropy(logits[0, :-1].float(), tokens[0, 1:].to(logits.device))
