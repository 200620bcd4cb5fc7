"""Vision transformers: they read pictures, and return hidden states of patches or logits of classes."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from bitmill.data.pictures import PictureWindows, checked_pictures
from bitmill.data.text import TextSource
from bitmill.evaluation.metrics import Metric
from bitmill.evaluation.pictures import PictureMetrics
from bitmill.tasks.base import TASKS, Loss, Task

_PATCH_VALUES = 3 * 14 * 14


class _Image(Task):
    """A model of pictures, measured by how far its features move from those of the float model."""

    generates = False
    batch_size = 16
    reads: ClassVar[Literal["text", "pictures", "recordings"]] = "pictures"
    reader_class_name = "AutoImageProcessor"
    pooling: ClassVar[Literal["cls", "mean"]] = "cls"  # which hidden states are the features of a picture

    def positions(self, windows: Tensor) -> int:
        """Return the patches of a picture, about: models differ in their size."""
        return max(1, windows[0].numel() // _PATCH_VALUES)

    def checked(self, windows: Tensor, config: Any) -> Tensor:
        """Return a caller's pictures as fp32.

        Args:
            windows: (pictures, channels, height, width), behind the model's image processor.
            config: not used.
        """
        return checked_pictures(windows)

    def windows(self, text: TextSource, tokenizer: Any) -> PictureWindows:
        """Return the pictures of a folder.

        Args:
            text: the folder.
            tokenizer: the model's image processor.
        """
        return PictureWindows(text, tokenizer)

    def example(self, config: Any) -> Tensor:
        """Return a grey picture of the size that the config names."""
        size = config.image_size
        height, width = (size, size) if isinstance(size, int) else size
        return torch.zeros(1, config.num_channels, height, width)

    def metric(self) -> Metric:
        """Return similarities of features, and the accuracy of nearest neighbours."""
        return PictureMetrics(self.pooling)

    def loss(self) -> Loss:
        """Return the projection of the features onto a direction from N(0, I), drawn anew for every picture.

        See `bitmill.tasks.text_encoder.TextEncoder.loss`.
        """
        generator = torch.Generator().manual_seed(0)

        def projection(tokens: Tensor, output: Tensor) -> Tensor:
            tokens = output[0].mean(0, keepdim=True) if self.pooling == "mean" else output[0]
            features = tokens[0]
            return features.float() @ torch.randn(features.shape, generator=generator).to(features.device)

        return projection


@TASKS.register("image_encoder")
class ImageEncoder(_Image):
    """A vision transformer without a head."""

    description = "a vision model"
    auto_class_name = "AutoModel"


@TASKS.register("image_encoder_mean")
class ImageEncoderMean(ImageEncoder):
    """A vision transformer without a head and without a class token, whose features are the mean over patches."""

    pooling = "mean"


@TASKS.register("image_classifier")
class ImageClassifier(_Image):
    """A vision transformer with the head of a classifier."""

    description = "a classifier of pictures"
    auto_class_name = "AutoModelForImageClassification"

    def loss(self) -> Loss:
        """Return a projection of the logits whose squared gradient has their Fisher information as its mean.

        With the probabilities p of the classes and n from N(0, I), the direction sqrt(p) n - p (sqrt(p) n 1) has
        the covariance diag(p) - p p^T: that of the gradient of log p for a class drawn from p.
        """
        generator = torch.Generator().manual_seed(0)

        def projection(tokens: Tensor, output: Tensor) -> Tensor:
            p = output[0].detach().float().softmax(-1)
            noise = p.sqrt() * torch.randn(p.shape, generator=generator).to(p.device)
            return output[0].float() @ (noise - p * noise.sum())

        return projection
