"""Classes that a classifier gives texts or tokens, against those of the float model and against labels.

kl_divergence         mean KL(reference || model) of the probabilities of classes, in nats
top1_agreement        share of texts, or tokens, whose class is that of the float model
confidence            mean probability of the class that is chosen; that of the float model in reference_confidence
top1_accuracy         share of texts whose class is their label; labels, sorted, are the classes in order
accuracy_change       top1_accuracy less that of the float model, and its 95 % bootstrap interval over texts
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bitmill.errors import CalibrationError, NumericsError, UsageError
from bitmill.evaluation.intervals import SEED, bootstrap_means, percentile_interval
from bitmill.evaluation.logits import Output
from bitmill.evaluation.pictures import labels_of


@dataclass
class ClassMetrics:
    """Logits of classes, (n, classes) in pieces, and the number of texts and tokens."""

    texts: int = 0
    tokens: int = 0
    own: list[Tensor] = field(default_factory=list)
    reference: list[Tensor] = field(default_factory=list)

    def add(self, tokens: Tensor, output: Output, reference: Output | None = None) -> None:
        """Add texts of one length.

        Args:
            tokens: (texts, length) token ids.
            output: logits (texts, classes), or (texts, length, classes) of tokens.
            reference: those of the float model.

        Raises:
            UsageError: both models have different classes.
        """
        assert isinstance(output, Tensor)
        assert reference is None or isinstance(reference, Tensor)
        self.texts += len(tokens)
        self.tokens += tokens.numel()
        self.own.append(output.reshape(-1, output.shape[-1]).float().cpu())
        if reference is None:
            return
        if reference.shape[-1] != output.shape[-1]:
            raise UsageError(
                f"The reference has {reference.shape[-1]} classes and the model {output.shape[-1]}, so they "
                "cannot be compared; give the float model it was made from."
            )
        self.reference.append(reference.reshape(-1, reference.shape[-1]).float().cpu())

    def result(self, domains: Mapping[str, int] | None = None) -> dict[str, Any]:
        """Return the measures as plain data.

        Args:
            domains: label -> number of its texts, in the order in which they were added; empty without labels.

        Raises:
            CalibrationError: there are no texts.
            NumericsError: the logits are not finite.
        """
        if not self.texts:
            raise CalibrationError("No text was read, so there are no classes; give more text.")
        own = torch.cat(self.own)
        if not bool(torch.isfinite(own).all()):
            raise NumericsError("The logits of the model are NaN or infinite; quantize it again.")
        classes = own.argmax(-1)
        result: dict[str, Any] = {}
        if self.reference:
            other = torch.cat(self.reference)
            log_p, log_q = own.double().log_softmax(-1), other.double().log_softmax(-1)
            result["kl_divergence"] = float((log_q.exp() * (log_q - log_p)).sum(-1).mean())
            result["top1_agreement"] = float((classes == other.argmax(-1)).double().mean())
            result["reference_confidence"] = float(log_q.amax(-1).exp().mean())
        result["confidence"] = float(own.double().softmax(-1).amax(-1).mean())
        result |= {"classes": own.shape[-1], "texts": self.texts, "tokens": self.tokens}
        if domains and len(domains) == own.shape[-1] and sum(domains.values()) == len(own):
            result |= self._accuracy(classes, labels_of(domains))
        return result

    def _accuracy(self, classes: Tensor, labels: Tensor) -> dict[str, Any]:
        """Return the share of texts whose class is their label, and its change from the float model's."""
        right = (classes == labels).double()
        figures: dict[str, Any] = {"top1_accuracy": float(right.mean())}
        if self.reference:
            reference = (torch.cat(self.reference).argmax(-1) == labels).double()
            change = right - reference
            means = bootstrap_means(list(change[:, None]), np.random.default_rng(SEED))
            figures["reference_top1_accuracy"] = float(reference.mean())
            figures["accuracy_change"] = float(change.mean())
            figures["accuracy_change_interval"] = percentile_interval(means)
        return figures
