"""Transforms: exact changes of the float model before it is quantized. One file per transform."""

from bitmill.transforms.base import TRANSFORMS, FormatTransform, SeamTransform, SeamView, Transform

__all__ = ["TRANSFORMS", "FormatTransform", "SeamTransform", "SeamView", "Transform"]
