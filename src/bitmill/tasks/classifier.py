"""Classifiers of texts and of their tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bitmill.data.labelled import labelled_windows
from bitmill.data.sentences import SentenceWindows
from bitmill.data.text import TextSource
from bitmill.data.windows import TextWindows
from bitmill.evaluation.classes import ClassMetrics
from bitmill.evaluation.metrics import Metric
from bitmill.tasks.base import TASKS, Loss, Task


class _Classifier(Task):
    """A model that gives logits of classes, measured by how often its class is the float model's."""

    generates = False
    batch_size = 32

    def metric(self) -> Metric:
        """Return divergence and agreement of classes, and accuracy where texts have labels."""
        return ClassMetrics()

    def loss(self) -> Loss:
        """Return a projection of the logits whose squared gradient has their Fisher information as its mean.

        See `bitmill.tasks.image.ImageClassifier.loss`; logits of tokens are averaged.
        """
        generator = torch.Generator().manual_seed(0)

        def projection(tokens: Tensor, output: Tensor) -> Tensor:
            logits = output[0].float().reshape(-1, output.shape[-1])
            p = logits.detach().softmax(-1)
            noise = p.sqrt() * torch.randn(p.shape, generator=generator).to(p.device)
            return (logits * (noise - p * noise.sum(-1, keepdim=True))).sum(-1).mean()

        return projection


@TASKS.register("sequence_classifier")
class SequenceClassifier(_Classifier):
    """A classifier of whole texts."""

    description = "a classifier of texts"
    auto_class_name = "AutoModelForSequenceClassification"

    def windows(self, text: TextSource, tokenizer: Any) -> TextWindows:
        """Return windows between special tokens to calibrate on, and texts, or sentences, to measure on.

        Args:
            text: see `Task.windows`; a .jsonl file whose lines have a `label` gives an accuracy.
            tokenizer: the model's tokenizer.
        """
        return labelled_windows(text, tokenizer)


@TASKS.register("token_classifier")
class TokenClassifier(_Classifier):
    """A classifier of every token, such as a tagger."""

    description = "a classifier of tokens"
    auto_class_name = "AutoModelForTokenClassification"

    def windows(self, text: TextSource, tokenizer: Any) -> TextWindows:
        """Return windows between special tokens to calibrate on, and sentences to measure on.

        Args:
            text: see `Task.windows`.
            tokenizer: the model's tokenizer.
        """
        return SentenceWindows(text, tokenizer)
