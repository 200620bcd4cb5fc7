"""Windows of tokens from the stream of a text, for language models.

Language models predict a stream, and their evaluation windows follow one another. Every window starts with the
tokens that the tokenizer puts before a text (Gemma's <bos>, Llama's <s>): a model that was trained with them gives
nonsense without.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from numbers import Integral
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from bitmill.config.arguments import check_seed
from bitmill.config.texts import default_calibration
from bitmill.data import text
from bitmill.data.mixture import is_mixture
from bitmill.data.text import TextSource, Windows
from bitmill.errors import CalibrationError, quoted
from bitmill.evaluation.context import context_length
from bitmill.evaluation.vocabulary import outside_vocabulary, token_ids

SELF = "self"  # calibration source: the model writes its text itself
TEXTS = "texts passed by the caller"  # name of a source that is a list
MAX_TOKENS = 1 << 30  # of all calibration windows together
_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


@dataclass(frozen=True)
class CalibrationData:
    """The calibration text and how much of it is read.

    source: a name that `bitmill texts` lists, "pydoc", a .txt or .jsonl file, "hf:dataset", "self" for text that
        the float model writes, or texts. Without it, the text of BITMILL_CALIB, or else "mix".
    samples: number of windows.
    seqlen: tokens of a window.
    seed: of the random places at which windows start.

    Raises:
        CalibrationError: a value has another type, or is out of any range.
    """

    source: TextSource = field(default_factory=default_calibration)
    samples: int = 128
    seqlen: int = 512
    seed: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.source, (Path, list)):
            object.__setattr__(self, "source", _plain_source(self.source))
        if not _is_text(self.source):
            raise CalibrationError(
                f"The text is {quoted(self.source)}; name a source such as 'pydoc' or a .txt file, or "
                "give a list of texts."
            )
        for name in ("samples", "seqlen", "seed"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, Integral):
                raise CalibrationError(f"{name} is {quoted(value)}; use a whole number.")
            object.__setattr__(self, name, int(value))
        check_seed(self.seed, CalibrationError)
        if self.samples * self.seqlen > MAX_TOKENS:
            raise CalibrationError(
                f"samples is {quoted(self.samples)} and seqlen is {quoted(self.seqlen)}, more than {MAX_TOKENS:,} "
                "tokens in all; use fewer."
            )

    @property
    def name(self) -> str:
        """The source in reports."""
        return source_name(self.source)


def source_name(source: TextSource) -> str:
    """Return the name of a text source in reports."""
    return str(source) if isinstance(source, (str, Path)) else TEXTS


def as_calibration(given: Any) -> CalibrationData | Tensor | None:
    """Return the calibration of a caller: as it is, or of the text that a name, a path or a list of texts means.

    Raises:
        CalibrationError: it is none of these.
    """
    if given is None or isinstance(given, (CalibrationData, Tensor)):
        return given
    return CalibrationData(given)


def _plain_source(source: Path | list[Any]) -> str | tuple[Any, ...]:
    return str(source) if isinstance(source, Path) else tuple(source)


def _is_text(source: Any) -> bool:
    texts = source if isinstance(source, tuple) else (source,)
    return bool(texts) and all(isinstance(text, str) for text in texts)


class TextWindows(Protocol):
    """A text in the windows that a model reads; `seqlen` includes special tokens.

    prefix: the special tokens with which every window starts.
    """

    prefix: tuple[int, ...]

    def calibration(self, samples: int, seqlen: int, seed: int) -> Tensor:
        """Return calibration windows.

        Args:
            samples: number of windows.
            seqlen: tokens of a window.
            seed: of the random places at which windows start.

        Returns:
            (samples, seqlen) token ids.

        Raises:
            CalibrationError: The text is too short.
        """
        ...

    def held_out(self, split: str, seqlen: int, windows: int | None) -> Windows:
        """Return windows to measure on.

        Args:
            split: part of the text, see `split_stream`.
            seqlen: most tokens of a window.
            windows: at most windows x seqlen tokens in all, or of each domain of a mixture; the whole part
                without it.

        Raises:
            CalibrationError: The text is too short.
        """
        ...

    def domains(self, split: str, seqlen: int, windows: int | None) -> dict[str, int]:
        """Return the number of windows of each domain in `held_out`, in its order.

        Nothing where the text is one domain, one stream, or where windows of several domains are mixed.
        """
        ...

    def describe(self, part: str, windows: int | None = None) -> dict[str, Any]:
        """Return how windows were cut from documents, for reports; nothing where the text is one stream.

        Args:
            part: part of the documents.
            windows: number of calibration windows, whose numbers by domain are returned too.
        """
        ...


def describe_held_out(
    reading: TextWindows, source: TextSource, split: str, seqlen: int, windows: int | None
) -> dict[str, Any]:
    """Return how held-out windows were cut, for reports; for a mixture with `windows_per_domain`.

    Args:
        reading: the windows of the text.
        source: the text.
        split: part of the text.
        seqlen: tokens of a window.
        windows: number of windows, of each domain for a mixture; None for all.
    """
    entry = {"text": source_name(source), "split": split, "seqlen": seqlen, "prefix": list(reading.prefix)}
    return entry | reading.describe(split) | ({"windows_per_domain": windows} if is_mixture(source) else {})


def count_windows(held_out: Windows, seqlen: int, domains: Mapping[str, int] | None = None) -> int:
    """Return the number of windows of `seqlen` tokens that hold as many tokens.

    Args:
        held_out: windows of one or several lengths.
        seqlen: tokens of a window.
        domains: domain or label -> number of its windows; those of labels are texts and counted as such.
    """
    if domains or (len(held_out) and held_out[0].dim() > 1):  # pictures and recordings
        return len(held_out)
    return -(-sum(len(window) for window in held_out) // seqlen)


class PrefixedWindows:
    """Windows that all start with the tokenizer's prefix.

    prefix: special tokens.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.prefix = special_tokens(tokenizer)[0]

    def text_tokens(self, seqlen: int) -> int:
        """Return the tokens of a window behind the prefix. Raises CalibrationError where they are too few."""
        check_special_tokens(seqlen, len(self.prefix))
        return seqlen - len(self.prefix)

    def prefixed(self, windows: Tensor) -> Tensor:
        """Return windows (w, n) behind the prefix."""
        prefix = torch.tensor(self.prefix, dtype=torch.int64)
        return torch.cat([prefix.expand(len(windows), -1), windows], 1) if self.prefix else windows


class StreamWindows(PrefixedWindows):
    """Windows of one stream of tokens, each behind the tokenizer's prefix."""

    def __init__(self, source: TextSource, tokenizer: Any) -> None:
        super().__init__(tokenizer)
        self._ids = text.token_stream(source, tokenizer)

    def calibration(self, samples: int, seqlen: int, seed: int) -> Tensor:
        """Return windows that start at random places of the first four fifths.

        Returns:
            (samples, seqlen) token ids.
        """
        part = text.split_stream(self._ids, "calib")
        return self.prefixed(text.calibration_windows(part, samples, self.text_tokens(seqlen), seed))

    def held_out(self, split: str, seqlen: int, windows: int | None) -> Windows:
        """Return windows without overlap.

        Returns:
            (w, seqlen) token ids.
        """
        part = text.split_stream(self._ids, split)
        return self.prefixed(text.evaluation_windows(part, self.text_tokens(seqlen), windows))

    def domains(self, split: str, seqlen: int, windows: int | None) -> dict[str, int]:
        """Return nothing: the text is one stream."""
        return {}

    def describe(self, part: str, windows: int | None = None) -> dict[str, Any]:
        """Return nothing: the text is one stream."""
        return {}


def special_tokens(tokenizer: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the tokens that a tokenizer puts before and after every text.

    Raises:
        CalibrationError: The tokenizer splits a text in another way between special tokens.
    """
    bare = token_ids(tokenizer, "a", add_special_tokens=False)
    framed = token_ids(tokenizer, "a")
    starts = range(len(framed) - len(bare) + 1)
    at = next((start for start in starts if framed[start : start + len(bare)] == bare), None)
    if at is None:
        raise CalibrationError(
            "The tokenizer splits a text in another way between special tokens; give token windows instead."
        )
    return tuple(framed[:at]), tuple(framed[at + len(bare) :])


def check_special_tokens(seqlen: int, special: int) -> None:
    """Raise CalibrationError for windows of `seqlen` tokens with fewer than two that are not special."""
    if special and seqlen < special + 2:
        raise CalibrationError(
            f"seqlen is {seqlen}, of which {special} are special tokens; use at least {special + 2}."
        )


def check_vocabulary(config: Any, windows: Windows, owner: str = "text") -> None:
    """Raise CalibrationError for tokens that the model has no embedding for.

    Args:
        config: transformers config, or None.
        windows: token ids.
        owner: what holds them, for the message.
    """
    tokens = windows if isinstance(windows, Tensor) else torch.cat(windows)
    if reason := outside_vocabulary(config, tokens):
        raise CalibrationError(f"The {owner} holds {reason}; use the model's own tokenizer.")


def check_context_length(config: Any, seqlen: int, flag: str = "--seqlen") -> None:
    """Raise CalibrationError for windows that are longer than the context of the model.

    Args:
        config: transformers config.
        seqlen: tokens of a window.
        flag: option to lower, for the message.
    """
    limit = context_length(config)
    if limit is not None and seqlen > limit:
        raise CalibrationError(f"seqlen is {seqlen}, but the model reads at most {limit} tokens; lower {flag}.")


def checked_windows(windows: Tensor, config: Any) -> Tensor:
    """Return a caller's windows (windows, length) as int64 on the CPU.

    Raises:
        CalibrationError: The model cannot read them.
    """
    if windows.is_meta or windows.dim() != 2 or not windows.numel():
        found = "without data (device 'meta')" if windows.is_meta else f"of shape {tuple(windows.shape)}"
        raise CalibrationError(f"The calibration tensor is one {found}; give token ids (windows, length).")
    if windows.dtype not in _INTEGERS:
        raise CalibrationError(
            f"The calibration tensor holds {str(windows.dtype).removeprefix('torch.')}; give integer token ids."
        )
    windows = windows.to("cpu", torch.int64)
    if windows.shape[1] < 2:
        raise CalibrationError("The calibration windows have 1 token; give windows of at least 2.")
    check_context_length(config, windows.shape[1])
    check_vocabulary(config, windows, "calibration tensor")
    return windows
