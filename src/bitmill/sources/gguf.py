"""A GGUF file as a source of weights: tensors are dequantized one at a time and named as in transformers.

The stored codes are rounded already, so this is the model in the file and not the one that it was made from.
"""

from __future__ import annotations

import hashlib
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from bitmill.errors import SourceError
from bitmill.sources.base import StoredType, config_bytes, hash_file, save_auxiliary
from bitmill.sources.gguf_architectures import build_config, layout_for, transformers_name, undo_rope_factors
from bitmill.sources.gguf_header import GgufTensor, read_header
from bitmill.sources.gguf_tokenizer import gguf_tokenizer
from bitmill.sources.hub import HubOrigin
from bitmill.sources.pooling import MEAN

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHUNK_ELEMENTS = 1 << 24
ROPE_FACTORS = "rope_freqs.weight"


class GgufSource:
    """One .gguf file.

    All tensors have one dtype: float32 where the whole file is float32, bfloat16 where it holds bfloat16, else
    float16, in which the block scales of quantized types are stored.

    Args:
        path: the file.
        name: name for messages; that of the file without it.

    Raises:
        SourceError: The file is damaged, or its architecture is not supported.
    """

    trust_remote_code = False
    as_saved = False
    origin: HubOrigin | None = None
    states_dtype = False  # a file of quantized tensors names none

    def __init__(self, path: str | Path, *, name: str | None = None) -> None:
        self.path = Path(path)
        self.name = name or self.path.stem
        self._header = read_header(self.path)
        self._layout, architecture = layout_for(self._header)
        self.config = build_config(self._layout, self._header, architecture)
        if ROPE_FACTORS in self._header.tensors:
            undo_rope_factors(self.config, self._raw(ROPE_FACTORS).reshape(-1))
        self._stored = {
            transformers_name(self._layout, stored): stored
            for stored in self._header.tensors
            if stored != ROPE_FACTORS
        }
        self._dtype = _float_dtype({tensor.kind for tensor in self._header.tensors.values()})
        self.config.dtype = self._dtype
        self._check_shapes()
        self._fingerprint: str | None = None
        self._tokenizer: PreTrainedTokenizerBase | None = None

    @property
    def licence(self) -> dict[str, Any]:
        """The licence as the file states it: `license`, `license_name`, `license_link`, where they are there."""
        keys = ("license", "license.name", "license.link")
        stated = {key.replace(".", "_"): self._header.metadata.get(f"general.{key}") for key in keys}
        return {key: value for key, value in stated.items() if value is not None}

    @property
    def stored_bytes(self) -> int:
        """Bytes of the tensors in the file."""
        return sum(tensor.size_bytes for tensor in self._header.tensors.values())

    def names(self) -> list[str]:
        """Return the state-dict names, in file order."""
        return list(self._stored)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of one tensor in the layout of transformers."""
        stored = self._lookup(name)
        shape = self._header.tensors[stored].shape
        return shape[::-1] if self._module(stored) in self._layout.transposed and len(shape) == 2 else shape

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype of all tensors of this file."""
        self._lookup(name)
        return self._dtype

    def tensor(self, name: str) -> torch.Tensor:
        """Dequantize one tensor. Raises SourceError for an unknown name or a type that is not supported."""
        stored = self._lookup(name)
        values = self._raw(stored)
        module = self._module(stored)
        if module in self._layout.interleaved:
            heads = getattr(self.config, self._layout.interleaved[module])
            values = values.view(heads, -1, 2, *values.shape[1:]).transpose(1, 2).reshape(values.shape)
        if self._layout.norm_plus_one and name.endswith("norm.weight"):
            values = values - 1
        if module in self._layout.transposed and values.dim() == 2:
            values = values.T.contiguous()
        return values.to(self._dtype)

    def stored_types(self) -> list[StoredType]:
        """Return the types that weights are stored in, most weights first; [] where all are floats."""
        counts: dict[GGMLQuantizationType, int] = {}
        for tensor in self._header.tensors.values():
            counts[tensor.kind] = counts.get(tensor.kind, 0) + prod(tensor.shape)
        if counts.keys() <= FLOATS:
            return []
        total = sum(counts.values())
        types = []
        for kind, count in sorted(counts.items(), key=lambda item: -item[1]):
            block, size = GGML_QUANT_SIZES[kind]
            types.append(StoredType(kind.name, 8 * size / block, count / total))
        return types

    def fingerprint(self) -> str:
        """Return the sha256 (hex) over the config and the bytes of the file."""
        if self._fingerprint is None:
            digest = hashlib.sha256(config_bytes(self.config))
            hash_file(digest, self.path)
            self._fingerprint = digest.hexdigest()
        return self._fingerprint

    def write_auxiliary_files(self, folder: Path) -> None:
        """Save tokenizer, chat template and generation config, which are made from the metadata."""
        from transformers import GenerationConfig

        save_auxiliary("tokenizer", self.tokenizer().save_pretrained, folder)
        generation = GenerationConfig.from_model_config(self.config)
        save_auxiliary("generation config", generation.save_pretrained, folder)

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Return the tokenizer that transformers converts from the metadata. Raises SourceError."""
        if self._tokenizer is None:
            self._tokenizer = gguf_tokenizer(self.path, self._header.metadata_bytes)
        return self._tokenizer

    def processor(self, class_name: str) -> Any:
        """Raise SourceError: GGUF files of language models hold none."""
        raise SourceError(f"{self.path} holds no processor; give a language model.")

    def pooling(self) -> str:
        """Return the mean over tokens; no supported GGUF architecture is an encoder."""
        return MEAN

    def kind(self, name: str) -> GGMLQuantizationType:
        """Return the type in which the file stores a tensor."""
        return self._header.tensors[self._lookup(name)].kind

    def stored_rows(self, name: str) -> np.ndarray:
        """Return the bytes of a matrix, uint8 (rows, bytes), rows in the order of transformers."""
        tensor = self._header.tensors[self._lookup(name)]
        with self.path.open("rb") as file:
            file.seek(tensor.offset)
            data = np.fromfile(file, dtype=np.uint8, count=tensor.size_bytes)
        if data.size != tensor.size_bytes:
            raise SourceError(f"{self.path} ended inside {self._lookup(name)!r} while it was read.")
        rows = data.reshape(tensor.shape[0], -1)
        if (attribute := self._layout.interleaved.get(self._module(self._lookup(name)))) is None:
            return rows
        pairs = rows.reshape(getattr(self.config, attribute), -1, 2, rows.shape[1])
        return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(rows.shape)

    def _lookup(self, name: str) -> str:
        """Return the GGUF name of a tensor. Raises SourceError for an unknown name."""
        try:
            return self._stored[name]
        except KeyError:
            raise SourceError(f"The model {self.name!r} has no tensor {name!r}.") from None

    def _module(self, stored: str) -> str:
        """Return the module of a GGUF name: "attn_q" of "blk.3.attn_q.weight"."""
        return stored.split(".")[-2]

    def _raw(self, stored: str) -> torch.Tensor:
        """Return the values in the layout of GGUF, (rows, columns) or (n,), dequantized a few rows at a time."""
        tensor = self._header.tensors[stored]
        rows = prod(tensor.shape[:-1])
        row_bytes = tensor.size_bytes // rows
        out = torch.empty((rows, tensor.shape[-1]), dtype=torch.float32)
        step = max(1, CHUNK_ELEMENTS // tensor.shape[-1])
        with self.path.open("rb") as file:
            file.seek(tensor.offset)
            for first in range(0, rows, step):
                count = min(step, rows - first)
                codes = np.fromfile(file, dtype=np.uint8, count=count * row_bytes)
                if codes.size != count * row_bytes:
                    raise SourceError(f"{self.path} ended inside {stored!r} while it was read.")
                values = _decode(codes.reshape(count, row_bytes), tensor, stored)
                out[first : first + count] = torch.from_numpy(np.ascontiguousarray(values))
        return out.reshape(tensor.shape)

    def _check_shapes(self) -> None:
        """Raise SourceError where metadata and tensors contradict each other."""
        config, tensors = self.config, self._header.tensors
        blocks = {name.split(".")[1] for name in tensors if name.startswith("blk.")}
        if len(blocks) != config.num_hidden_layers or blocks != {str(i) for i in range(len(blocks))}:
            raise SourceError(
                f"{self.path} announces {config.num_hidden_layers} blocks and holds tensors of {len(blocks)}; "
                "fetch it again."
            )
        first_block = {name.removeprefix("blk.0.") for name in tensors if name.startswith("blk.0.")}
        for index in range(len(blocks)):
            missing = sorted(n for n in first_block if f"blk.{index}.{n}" not in tensors)
            if missing:
                raise SourceError(f"{self.path} lacks the tensor 'blk.{index}.{missing[0]}'; fetch it again.")
        head_dim = getattr(config, "head_dim", None)
        for name, tensor in tensors.items():
            module = self._module(name)
            expected: tuple[int, ...] | None = None
            if module in ("attn_q", "attn_k") and head_dim:
                heads = config.num_attention_heads if module == "attn_q" else config.num_key_value_heads
                expected = (heads * head_dim, config.hidden_size)
            elif module == "token_embd":
                expected = (config.vocab_size, config.hidden_size)
            if name.endswith(".bias") and expected is not None:
                expected = expected[:1]
            if expected not in (None, tensor.shape):
                raise SourceError(
                    f"The GGUF tensor {name!r} has the shape {tensor.shape}, and its metadata imply "
                    f"{expected}; the file is damaged."
                )


def _decode(codes: np.ndarray, tensor: GgufTensor, name: str) -> np.ndarray:
    """Return the fp32 values of codes (rows, bytes). Raises SourceError for a type that is not supported."""
    if tensor.kind in _PLAIN:
        return codes.view(_PLAIN[tensor.kind]).astype(np.float32)
    try:
        with np.errstate(
            all="ignore"
        ):  # a damaged scale may be infinite, which is checked when weights are loaded
            return dequantize(codes, tensor.kind)
    except NotImplementedError:
        raise SourceError(
            f"The GGUF tensor {name!r} is stored as {tensor.kind.name}, which cannot be dequantized; "
            "use another quantization of this model."
        ) from None


FLOATS = {GGMLQuantizationType[name] for name in ("F64", "F32", "F16", "BF16")}
_PLAIN: dict[int, type] = {GGMLQuantizationType.F32: np.float32, GGMLQuantizationType.F16: np.float16}


def _float_dtype(kinds: set[GGMLQuantizationType]) -> torch.dtype:
    """Return the dtype in which the tensors of a file are returned."""
    if kinds <= {GGMLQuantizationType.F32}:
        return torch.float32
    return torch.bfloat16 if GGMLQuantizationType.BF16 in kinds else torch.float16
