"""Which exact change is made to the float model first. One file per transform."""

from bitmill.transforms.base import TRANSFORMS, Transform, transform_from_dict

__all__ = ["TRANSFORMS", "Transform", "transform_from_dict"]
