"""Weights of an ONNX file, read without the libraries of ONNX.

Of the protocol buffers only the fields that hold weights are read: the tensors of the graph, and for each node its
name and inputs, because exporters rename the weights of linear layers after the product that reads them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from bitmill.errors import SourceError

_GRAPH, _NODE, _TENSOR = 7, 1, 5  # fields of ModelProto and GraphProto
_INPUT, _NODE_NAME = 1, 3  # of NodeProto
_DIMS, _DATA_TYPE, _TENSOR_NAME, _RAW = 1, 2, 8, 9  # of TensorProto
_FLOAT = 1  # its data type fp32
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5  # wire types

_Field = tuple[int, int | memoryview]


@dataclass(frozen=True)
class OnnxWeights:
    """The fp32 tensors of an ONNX graph.

    Attributes:
        tensors: name -> fp32 tensor.
        inputs: name of a node -> names of its inputs.
    """

    tensors: dict[str, Tensor]
    inputs: dict[str, tuple[str, ...]]

    def linear(self, node: str) -> Tensor:
        """Return the weight (out, in) that a matrix product reads.

        Args:
            node: name of the product.

        Raises:
            SourceError: the graph has no such product of a weight.
        """
        weight = next((name for name in self.inputs.get(node, ()) if name in self.tensors), None)
        if weight is None:
            raise SourceError(f"The ONNX graph has no weight at {node!r}; it is another model.")
        return self.tensors[weight].T.contiguous()


def read_onnx(path: Path) -> OnnxWeights:
    """Read the weights of an ONNX file.

    Args:
        path: file with its weights inside.

    Raises:
        SourceError: the file is damaged.
    """
    tensors: dict[str, Tensor] = {}
    inputs: dict[str, tuple[str, ...]] = {}
    try:
        for field, graph in _fields(memoryview(path.read_bytes())):
            if field != _GRAPH or isinstance(graph, int):
                continue
            for kind, message in _fields(graph):
                if kind == _NODE and not isinstance(message, int):
                    name, read = _node(message)
                    inputs[name] = read
                elif kind == _TENSOR and not isinstance(message, int):
                    tensors.update(_tensor(message))
    except (IndexError, ValueError, RuntimeError) as error:
        raise SourceError(f"{path} is no ONNX file that can be read ({error}); fetch it again.") from error
    return OnnxWeights(tensors, inputs)


def _node(message: memoryview) -> tuple[str, tuple[str, ...]]:
    """Return name and inputs of a node."""
    name, inputs = "", []
    for field, value in _fields(message):
        if field == _NODE_NAME:
            name = _text(value)
        elif field == _INPUT:
            inputs.append(_text(value))
    return name, tuple(inputs)


def _tensor(message: memoryview) -> dict[str, Tensor]:
    """Return name -> tensor; nothing for a tensor of another type than fp32."""
    name, data_type, dims, raw = "", 0, list[int](), None
    for field, value in _fields(message):
        if field == _DIMS:
            dims += [value] if isinstance(value, int) else list(_varints(value))
        elif field == _DATA_TYPE:
            data_type = value if isinstance(value, int) else 0
        elif field == _TENSOR_NAME:
            name = _text(value)
        elif field == _RAW:
            raw = value
    if data_type != _FLOAT or raw is None or isinstance(raw, int):
        return {}
    return {name: torch.frombuffer(bytearray(raw), dtype=torch.float32).reshape(dims)}


def _text(value: int | memoryview) -> str:
    return "" if isinstance(value, int) else bytes(value).decode()


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    """Return a number of 7 bits a byte, and the position behind it."""
    value, shift = 0, 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            return value, at


def _varints(data: memoryview) -> Iterator[int]:
    at = 0
    while at < len(data):
        value, at = _varint(data, at)
        yield value


def _fields(data: memoryview) -> Iterator[_Field]:
    """Yield number and value of every field of a message. Raises ValueError for a damaged one."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        wire = key & 7
        if wire == _VARINT:
            value, at = _varint(data, at)
            yield key >> 3, value
            continue
        size = 8 if wire == _FIXED64 else 4
        if wire == _BYTES:
            size, at = _varint(data, at)
        elif wire not in (_FIXED64, _FIXED32):
            raise ValueError(f"wire type {wire}")
        if at + size > len(data):
            raise ValueError("it ends inside a field")
        yield key >> 3, data[at : at + size]
        at += size
