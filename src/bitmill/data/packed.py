"""Windows of packed documents: one after another with the model's own separator, cut anywhere.

A model that begins every text with special tokens (Gemma's <bos>, Llama's <s>) finds them before each document.
Others find behind each document the token that ended documents in their training: <|endoftext|> where that is a
special token, because the end-of-text token of a chat model ends turns, and the end-of-text token elsewhere.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bitmill.data import text
from bitmill.data.domain import domain_documents
from bitmill.data.mixture import apportion, is_domain, shares
from bitmill.data.text import TextSource
from bitmill.data.windows import PrefixedWindows, StreamWindows, TextWindows
from bitmill.evaluation.vocabulary import token_ids

_STREAM = 400_000  # tokens of a domain, or 4 times those of its windows, in which calibration windows start
_END_OF_DOCUMENT = "<|endoftext|>"


def text_windows(source: TextSource, tokenizer: Any) -> TextWindows:
    """Return the windows of a text: of packed documents for a domain or a mixture, of one stream for all others.

    Args:
        source: see `load_text`.
        tokenizer: the model's tokenizer.
    """
    if is_domain(source):
        return DocumentWindows(str(source), tokenizer)
    return StreamWindows(source, tokenizer)


class DocumentWindows(PrefixedWindows):
    """Windows of the packed documents of a domain or of a mixture, each behind the tokenizer's prefix.

    separator: tokens before each document (equal to the prefix), or behind each where there is no prefix.
    """

    def __init__(self, source: str, tokenizer: Any) -> None:
        super().__init__(tokenizer)
        self._source, self._tokenizer = source, tokenizer
        self.separator = self.prefix or _end_of_document(tokenizer)
        self._chosen: dict[tuple[str, int, int | None], dict[str, Tensor]] = {}  # held-out windows by domain

    def calibration(self, samples: int, seqlen: int, seed: int) -> Tensor:
        """Return windows that start at random places of the part "calib", in random order.

        Returns:
            (samples, seqlen) token ids.

        Raises:
            CalibrationError: A domain is shorter than one window.
        """
        text.check_windows(samples, seqlen)
        length = self.text_tokens(seqlen)
        counts = apportion(samples, shares(self._source, "calib"))
        windows = [
            text.calibration_windows(
                self._packed(domain, "calib", max(_STREAM, 4 * count * length)), count, length, seed
            )
            for domain, count in counts.items()
            if count
        ]
        order = torch.randperm(samples, generator=torch.Generator().manual_seed(seed))
        return self.prefixed(torch.cat(windows)[order])

    def held_out(self, split: str, seqlen: int, windows: int | None) -> Tensor:
        """Return windows without overlap, domain after domain.

        Args:
            split: part of the documents.
            seqlen: tokens of a window.
            windows: at most this many of each domain; all without it.

        Returns:
            (w, seqlen) token ids.

        Raises:
            CalibrationError: A domain is shorter than one window.
        """
        return self.prefixed(torch.cat(list(self._held_out(split, seqlen, windows).values())))

    def domains(self, split: str, seqlen: int, windows: int | None) -> dict[str, int]:
        """Return the number of windows of each domain in `held_out`, in its order; nothing for a single domain."""
        counts = {domain: len(ids) for domain, ids in self._held_out(split, seqlen, windows).items()}
        return counts if len(counts) > 1 else {}

    def _held_out(self, split: str, seqlen: int, windows: int | None) -> dict[str, Tensor]:
        """Return the windows of every domain, without the prefix."""
        key = (split, seqlen, windows)
        if key not in self._chosen:
            text.check_windows(1 if windows is None else windows, seqlen)
            length = self.text_tokens(seqlen)
            tokens = None if windows is None else windows * length
            self._chosen[key] = {
                domain: text.evaluation_windows(self._packed(domain, split, tokens), length, windows)
                for domain in shares(self._source, split)
            }
        return self._chosen[key]

    def describe(self, part: str, windows: int | None = None) -> dict[str, Any]:
        """Return the part, the separator of the documents and, of calibration windows, their number by domain.

        Args:
            part: part of the documents.
            windows: number of calibration windows.
        """
        cut: dict[str, Any] = {"part": part, "separator": list(self.separator)}
        return cut if windows is None else {**cut, "domains": apportion(windows, shares(self._source, part))}

    def _packed(self, domain: str, part: str, tokens: int | None = None) -> Tensor:
        """Return the packed documents (n,) of one part, or as many as give this number of tokens."""
        packed: list[int] = []
        for document in domain_documents(domain, part, self._tokenizer):
            if tokens is not None and len(packed) >= tokens:
                break
            with text.no_length_warning():
                ids = token_ids(self._tokenizer, document, add_special_tokens=False)
            if self.prefix and tuple(ids[: len(self.prefix)]) == self.prefix:  # written by the chat template
                ids = ids[len(self.prefix) :]
            packed += [*self.separator, *ids] if self.prefix else [*ids, *self.separator]
        return torch.tensor(packed, dtype=torch.int64)


def _end_of_document(tokenizer: Any) -> tuple[int, ...]:
    """Return the token that ends a document, or the tokens of a blank line where the tokenizer has none."""
    if _END_OF_DOCUMENT in tokenizer.all_special_tokens:
        return (int(tokenizer.convert_tokens_to_ids(_END_OF_DOCUMENT)),)
    if tokenizer.eos_token_id is not None:
        return (int(tokenizer.eos_token_id),)
    return tuple(token_ids(tokenizer, "\n\n", add_special_tokens=False))
