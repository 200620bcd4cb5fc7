"""The header of a safetensors file: dtype, shape and place of every tensor."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from bitmill.config.documents import load_json
from bitmill.errors import SourceError, one_line

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "U32": torch.uint32,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a file; `begin` and `end` in bytes from the start of the data."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


def read_header(path: Path) -> dict[str, TensorEntry]:
    """Return the tensors of a safetensors file by name, without reading their data.

    The library checks the header against the file: lengths, shapes, and that tensors cover the data without gap or
    overlap. It keeps offsets to itself, so the header is parsed once more for them.

    Raises:
        SourceError: The file is damaged, cannot be read, or holds a dtype that is not supported.
    """
    try:
        with safe_open(path, "pt"):
            pass
        with path.open("rb") as file:
            header = load_json(file.read(int.from_bytes(file.read(8), "little")))
    except SafetensorError as error:
        raise SourceError(
            f"{path} is not a valid safetensors file ({one_line(error)}); fetch it again."
        ) from error
    except OSError as error:
        raise SourceError(f"{path} cannot be read ({error.strerror or one_line(error)}).") from error
    header.pop("__metadata__", None)
    entries = {}
    for name, fields in header.items():
        if fields["dtype"] not in DTYPES:
            raise SourceError(
                f"{path} stores the tensor {name!r} as {fields['dtype']}, which is not supported; "
                f"convert it to one of {', '.join(DTYPES)}."
            )
        entries[name] = TensorEntry(DTYPES[fields["dtype"]], tuple(fields["shape"]), *fields["data_offsets"])
    return entries
