"""Text encoders: they read a text as a whole and return hidden states, which pooling turns into one embedding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bitmill.data.sentences import SentenceWindows
from bitmill.data.text import TextSource
from bitmill.data.windows import TextWindows
from bitmill.evaluation.embedding import DEFAULT_POOLING, EmbeddingMetrics, embed
from bitmill.evaluation.metrics import Metric
from bitmill.tasks.base import TASKS, Loss, Task


@TASKS.register("text_encoder")
class TextEncoder(Task):
    """An encoder of sentences, measured by how far its embeddings move from those of the float model."""

    description = "a text encoder"
    auto_class_name = "AutoModel"
    generates = False
    batch_size = 32  # sentences of one length

    def __init__(self, read_pooling: Callable[[], str] | None = None) -> None:
        self._read_pooling = read_pooling or (lambda: DEFAULT_POOLING)

    @classmethod
    def for_model(cls, read_pooling: Callable[[], str] | None = None) -> Task:
        """Return the task of one model, whose pooling is read when it is needed."""
        return cls(read_pooling)

    def windows(self, text: TextSource, tokenizer: Any) -> TextWindows:
        """Return windows between special tokens to calibrate on, and sentences to evaluate on.

        Args:
            text: see `Task.windows`.
            tokenizer: the model's tokenizer.
        """
        return SentenceWindows(text, tokenizer)

    def metric(self) -> Metric:
        """Return similarities of pooled embeddings. Raises SourceError for a pooling that is not supported."""
        return EmbeddingMetrics(self._read_pooling())

    def loss(self) -> Loss:
        """Return the projection of the embedding onto a direction from N(0, I), drawn anew for every window.

        The mean of squared gradients over directions is |de/dW|^2, the Fisher diagonal of a model that returns the
        embedding e plus unit Gaussian noise.
        """
        generator = torch.Generator().manual_seed(0)
        pooling = self._read_pooling()

        def projection(tokens: Tensor, hidden: Tensor) -> Tensor:
            direction = torch.randn(hidden.shape[-1], generator=generator)
            return embed(hidden, pooling)[0] @ direction.to(hidden.device)

        return projection
