"""Features of pictures against those of the float model, and against labels.

cosine_similarity       mean cosine between the features of one picture in both models
neighbour_agreement     share of pictures whose nearest other picture agrees between both models
knn_accuracy            share of pictures whose label is that of most of their 10 nearest others, by cosine
knn_change              knn_accuracy less that of the float model
knn_change_interval     ends of its 95 % bootstrap interval, over pictures
top1_accuracy           of a classifier: share of pictures whose largest logit is their label's
pair_cosine             mean cosine between two different pictures of one model

Features are those of the class token, or the logits of a classifier. Labels are those of the folder, see
`bitmill.data.pictures`; those of a classifier are in the order of its classes, as ImageFolder of torchvision has
them. A picture is never a neighbour of itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import one_hot

from bitmill.errors import CalibrationError
from bitmill.evaluation.embedding import EmbeddingMetrics
from bitmill.evaluation.intervals import SEED, bootstrap_means, percentile_interval
from bitmill.evaluation.logits import Output

NEIGHBOURS = 10
_ROWS = 1024


@dataclass
class PictureMetrics(EmbeddingMetrics):
    """A metric that collects the features of all pictures and compares them in `result`."""

    pooling: str = "cls"
    classes: list[Tensor] = field(default_factory=list)
    reference_classes: list[Tensor] = field(default_factory=list)

    def add(self, tokens: Tensor, output: Output, reference: Output | None = None) -> None:
        """Add pictures.

        Args:
            tokens: (pictures, channels, height, width).
            output: hidden states (pictures, tokens, width), or logits (pictures, classes).
            reference: those of the float model.
        """
        assert isinstance(output, Tensor)
        assert reference is None or isinstance(reference, Tensor)
        if output.dim() == 2:
            self.classes.append(output.argmax(-1).cpu())
            output = output[:, None]
            if reference is not None:
                self.reference_classes.append(reference.argmax(-1).cpu())
                reference = reference[:, None]
        super().add(tokens, output, reference)

    def result(self, domains: Mapping[str, int] | None = None) -> dict[str, Any]:
        """Return the measures as plain data.

        Args:
            domains: label -> number of its pictures, in the order in which they were added; empty without labels.

        Raises:
            NumericsError: the features of a picture are not finite.
            CalibrationError: there are fewer than two pictures.
        """
        if sum(map(len, self.own)) < 2:
            raise CalibrationError("Fewer than two pictures were read, so there are no neighbours; give more.")
        result = super().result()
        del result["tokens"], result["pooling"]
        result["pictures"] = result.pop("sentences")
        if self.reference_classes:
            agreed = torch.cat(self.classes) == torch.cat(self.reference_classes)
            result["top1_agreement"] = float(agreed.double().mean())
        if domains and len(domains) > 1:
            labels = labels_of(domains)
            result |= self._neighbours(labels) | self._top1(labels, len(domains))
        return result

    def _neighbours(self, labels: Tensor) -> dict[str, Any]:
        """Return the figures of the nearest neighbours' labels; none with fewer pictures than neighbours."""
        if len(labels) <= NEIGHBOURS:
            return {}
        right = neighbours_agree(torch.cat(self.own), labels)
        figures: dict[str, Any] = {"knn_accuracy": float(right.double().mean())}
        if self.reference:
            reference = neighbours_agree(torch.cat(self.reference), labels)
            change = right.double() - reference.double()
            means = bootstrap_means(list(change[:, None]), np.random.default_rng(SEED))
            figures["reference_knn_accuracy"] = float(reference.double().mean())
            figures["knn_change"] = float(change.mean())
            figures["knn_change_interval"] = percentile_interval(means)
        return figures

    def _top1(self, labels: Tensor, count: int) -> dict[str, Any]:
        """Return the accuracy of a classifier whose classes are the labels; nothing otherwise."""
        if not self.classes or self.own[0].shape[-1] != count:
            return {}
        figures = {"top1_accuracy": float((torch.cat(self.classes) == labels).double().mean())}
        if self.reference_classes:
            right = torch.cat(self.reference_classes) == labels
            figures["reference_top1_accuracy"] = float(right.double().mean())
        return figures


def labels_of(counts: Mapping[str, int]) -> Tensor:
    """Return the index of the label of every picture, int64.

    Args:
        counts: label -> number of its pictures, in their order.
    """
    return torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(list(counts.values())))


def neighbours_agree(unit: Tensor, labels: Tensor) -> Tensor:
    """Return for every picture if most of its nearest others have its label, bool (pictures,).

    Args:
        unit: (pictures, width), rows of norm 1.
        labels: int64 (pictures,); of equally frequent ones the first counts.
    """
    found, votes = [], one_hot(labels)
    for start in range(0, len(unit), _ROWS):
        cosines = unit[start : start + _ROWS] @ unit.T
        rows = torch.arange(len(cosines))
        cosines[rows, start + rows] = -torch.inf
        nearest = cosines.topk(NEIGHBOURS, -1).indices
        found.append(votes[nearest].sum(1).argmax(-1))
    return torch.cat(found) == labels
