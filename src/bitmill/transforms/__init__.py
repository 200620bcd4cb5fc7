"""Which exact change is made to the float model first. One file per transform."""

from bitmill.transforms.base import TRANSFORMS, FormatTransform, SeamTransform, SeamView, Transform

__all__ = ["TRANSFORMS", "FormatTransform", "SeamTransform", "SeamView", "Transform"]
