"""ONNX files of a few bytes."""

from __future__ import annotations

from torch import Tensor


def field(number: int, content: bytes | int) -> bytes:
    """Return a field of a message, of fewer than 128 bytes or a number below 128."""
    if isinstance(content, int):
        return bytes([number << 3, content])
    return bytes([number << 3 | 2, len(content)]) + content


def tiny_onnx(weight: Tensor) -> bytes:
    """Return a file with the product /linear/MatMul of x and the fp32 matrix W."""
    tensor = field(1, bytes(weight.shape)) + field(2, 1) + field(8, b"W") + field(9, weight.numpy().tobytes())
    node = field(1, b"x") + field(1, b"W") + field(3, b"/linear/MatMul")
    return field(7, field(1, node) + field(5, tensor))
