"""Text that calibrates and evaluates: one stream of tokens, its first four fifths for the one, the rest for
the other, cut into windows.

Sources: "pydoc" (the language reference inside Python's standard library: no download,
but its text differs between versions of Python), a text file, a .jsonl
file with a "text" on every line, or "hf:dataset[:config][:split]" through the `datasets` package.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch

from bitmill.errors import CalibrationError, one_line

Windows = torch.Tensor | list[torch.Tensor]  # token ids (windows, length), or of several lengths
Stream = TypeVar("Stream", torch.Tensor, str)

CALIBRATION_SHARE = 0.8
HUB_CHARACTERS = 20_000_000  # a Hub dataset is streamed up to here; some are terabytes


def load_text(source: str | Path) -> str:
    """The whole text of a source. Raises CalibrationError when there is none or it is not text."""
    if source == "pydoc":
        return _pydoc()
    if isinstance(source, str) and source.startswith("hf:"):
        return _hub(source)
    path = Path(source).expanduser()
    if not path.is_file():
        raise CalibrationError(
            f"There is no text at {str(source)!r}; give 'pydoc', a .txt or .jsonl file, or 'hf:dataset'."
        )
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise CalibrationError(
            f"{path} is not UTF-8 text (byte {error.start} is 0x{byte:02x}); convert it first."
        ) from None
    except OSError as error:
        raise CalibrationError(f"{path} cannot be read ({error.strerror}).") from error
    if path.suffix == ".jsonl":
        text = "\n\n".join(_json_lines(path, text))
    if not text.strip():
        raise CalibrationError(f"{path} holds no text; give a file with at least a few thousand words.")
    return text


def token_stream(source: str | Path, tokenizer: Any) -> torch.Tensor:
    """The tokens (n,) int64 of a source, special tokens as the tokenizer adds them to one text."""
    with no_length_warning():
        ids = tokenizer(load_text(source))["input_ids"]
    return torch.tensor(ids, dtype=torch.int64)


def split_stream(ids: Stream, which: str) -> Stream:
    """The tokens (n,) or characters that calibrate ("calib", the first 80 %), the "eval" rest, or "all"."""
    cut = int(len(ids) * CALIBRATION_SHARE)
    parts = {"calib": ids[:cut], "eval": ids[cut:], "all": ids}
    if which not in parts:
        raise CalibrationError(f"There is no part {which!r} of a text; choose one of {', '.join(parts)}.")
    return parts[which]


def calibration_windows(ids: torch.Tensor, samples: int, seqlen: int, seed: int = 0) -> torch.Tensor:
    """Windows (samples, seqlen) that start at random places of `ids` (n,); they may overlap."""
    check_windows(samples, seqlen)
    if len(ids) <= seqlen:
        raise CalibrationError(
            f"The calibration text has {len(ids)} tokens and a window needs more than {seqlen}; "
            "give a longer text or shorter windows."
        )
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(0, len(ids) - seqlen, (samples,), generator=generator)
    return torch.stack([ids[start : start + seqlen] for start in starts.tolist()])


def evaluation_windows(ids: torch.Tensor, seqlen: int, windows: int | None = None) -> torch.Tensor:
    """The first windows (w, seqlen) of `ids` (n,) side by side; as many as asked for, or as there are."""
    _check_positive(windows=1 if windows is None else windows)
    _check_seqlen(seqlen)
    count = len(ids) // seqlen
    if count == 0:
        raise CalibrationError(
            f"The evaluation text has {len(ids)} tokens, fewer than one window of {seqlen}; "
            "give a longer text or shorter windows."
        )
    return ids[: count * seqlen].view(count, seqlen)[:windows]


def windows_hash(windows: Windows) -> str:
    """sha256 (hex) of the int64 token ids, little endian: tells whether two runs saw the same text.

    Windows of several lengths are hashed behind their lengths.
    """
    if not isinstance(windows, torch.Tensor):
        windows = torch.cat([torch.tensor([len(window) for window in windows]), *windows])
    return hashlib.sha256(windows.to(torch.int64).contiguous().numpy().astype("<i8").tobytes()).hexdigest()


def check_windows(samples: int, seqlen: int) -> None:
    """Raises CalibrationError for a number or a length of windows that is none."""
    _check_positive(samples=samples)
    _check_seqlen(seqlen)


def _check_positive(**numbers: int) -> None:
    for name, number in numbers.items():
        if number < 1:
            raise CalibrationError(f"The number of {name} is {number}, and must be at least 1.")


def _check_seqlen(seqlen: int) -> None:
    if seqlen < 2:
        raise CalibrationError(
            f"seqlen is {seqlen}, and must be at least 2: a window predicts its tokens from the second on."
        )


def _pydoc() -> str:
    from pydoc_data.topics import topics

    return "\n\n".join(topics[key] for key in sorted(topics))


def _json_lines(path: Path, text: str) -> Iterator[str]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise CalibrationError(f"Line {number} of {path} is no valid JSON ({one_line(error)}).") from None
        if not isinstance(record, dict) or not isinstance(record.get("text"), str):
            raise CalibrationError(f"Line {number} of {path} has no text in a field 'text'.")
        yield record["text"]


def _hub(source: str) -> str:
    dataset, *rest = source.removeprefix("hf:").split(":")
    if not dataset or len(rest) > 2:
        raise CalibrationError(
            f"{source!r} is no Hub dataset; write hf:dataset, hf:dataset:config:split or between."
        )
    try:
        from datasets import load_dataset
    except ImportError:
        raise CalibrationError(
            f"{source!r} needs the package 'datasets'; install it with: pip install datasets."
        ) from None
    config = rest[0] if rest else None
    split = rest[1] if len(rest) == 2 else "train"
    try:
        rows = load_dataset(dataset, config or None, split=split, streaming=True)
        text = "\n\n".join(_until(HUB_CHARACTERS, (row["text"] for row in rows)))
    except KeyError:
        raise CalibrationError(f"The rows of {source!r} have no field 'text'; choose another dataset.") from None
    except Exception as error:  # the network, the Hub, or a loader
        raise CalibrationError(f"{source!r} could not be read ({one_line(error)}).") from error
    if not text.strip():
        raise CalibrationError(f"{source!r} holds no text; choose another dataset.")
    return text


def _until(characters: int, texts: Iterable[str]) -> Iterator[str]:
    total = 0
    for text in texts:
        yield text
        total += len(text)
        if total >= characters:
            return


@contextlib.contextmanager
def no_length_warning() -> Iterator[None]:
    """A stream is longer than any model's context on purpose; transformers warns about that."""
    logger = logging.getLogger("transformers.tokenization_utils_base")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
