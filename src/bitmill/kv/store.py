"""Packed pages of a layer, in slabs of fixed size: growing allocates one more, and copies nothing."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bitmill.kv.codec import TensorCodec
from bitmill.kv.page import PageLayout
from bitmill.kv.scheme import PAGE

SLAB = 8  # pages


class PageStore:
    """Pages of `rows` sequences, (rows, SLAB, words) int32 each slab; tokens that slid out of sight are let go.

    keys, values: encode and decode.  first: the slot of the first token that is still there, a multiple of 32.
    """

    def __init__(
        self, layout: PageLayout, keys: TensorCodec, values: TensorCodec, rows: int, device: torch.device
    ) -> None:
        self.layout, self.keys, self.values = layout, keys, values
        self.rows, self.device = rows, device
        self.slabs: list[Tensor] = []
        self.first = 0
        self.pages = 0  # in use

    @property
    def end(self) -> int:
        """The slot after the last packed token."""
        return self.first + self.pages * PAGE

    @property
    def bytes(self) -> int:
        """Allocated."""
        return sum(slab.numel() * 4 for slab in self.slabs)

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Pack whole pages of keys and values (rows, tokens, channels)."""
        done, count = 0, keys.shape[1] // PAGE
        while done < count:
            place = self.pages % SLAB
            if place == 0:
                self.slabs.append(self._slab())
            step = min(SLAB - place, count - done)
            cut = slice(done * PAGE, (done + step) * PAGE)
            pages = self.slabs[-1][:, place : place + step]
            self.layout.write(pages, self.keys.encode(keys[:, cut]), self.values.encode(values[:, cut]))
            self.pages, done = self.pages + step, done + step

    def take(self, page: Tensor) -> None:
        """Append a page (rows, words) that is packed already."""
        place = self.pages % SLAB
        if place == 0:
            self.slabs.append(self._slab())
        self.slabs[-1][:, place] = page
        self.pages += 1

    def _slab(self) -> Tensor:
        with torch.inference_mode(False):  # a tensor made in that mode can be written to in no other
            return torch.zeros(self.rows, SLAB, self.layout.words, dtype=torch.int32, device=self.device)

    def read(self, first: int, end: int) -> tuple[Tensor, Tensor]:
        """Keys and values (rows, tokens, channels), fp32, of the packed slots from first to end, page borders."""
        begin, stop = (first - self.first) // PAGE, (end - self.first) // PAGE
        pieces = []
        for at in range(begin // SLAB, -(-stop // SLAB)):
            cut = slice(max(begin - at * SLAB, 0), min(stop - at * SLAB, SLAB))
            pieces.append(self.slabs[at][:, cut])
        if not pieces or begin >= stop:
            empty = torch.empty(self.rows, 0, self.keys.channels, device=self.device)
            return empty, empty
        keys, values = self.layout.read(torch.cat(pieces, 1))
        return self.keys.decode(keys), self.values.decode(values)

    def used(self) -> Tensor:
        """The pages in use (rows, pages, words)."""
        empty = torch.empty(self.rows, 0, self.layout.words, dtype=torch.int32, device=self.device)
        return torch.cat([empty, *self.slabs], 1)[:, : self.pages].contiguous()

    def put(self, pages: Tensor, first: int) -> None:
        """Take pages over that `used` gave, the first of them at slot `first`; nothing was there."""
        self.first, self.pages = first, pages.shape[1]
        for part in pages.split(SLAB, 1) if self.pages else ():
            slab = self._slab()
            slab[:, : part.shape[1]] = part
            self.slabs.append(slab)

    def cut(self, end: int) -> None:
        """Forget the pages from slot `end` on, a page border."""
        self.pages = max(0, (end - self.first) // PAGE)
        del self.slabs[-(-self.pages // SLAB) :]

    def evict(self, first: int) -> None:
        """Free the slabs whose slots all come before `first`."""
        count = min((first - self.first) // (PAGE * SLAB), self.pages // SLAB)
        if count > 0:
            del self.slabs[:count]
            self.first, self.pages = self.first + count * SLAB * PAGE, self.pages - count * SLAB

    def map_batch(self, change: Callable[[Tensor], Tensor], rows: int) -> None:
        """Put `rows` others in the place of the rows there are: `change` takes and gives (rows, ...)."""
        self.slabs, self.rows = [change(slab) for slab in self.slabs], rows
