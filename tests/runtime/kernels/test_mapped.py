"""Codes in a mapped file are repacked in pieces, with equal bytes, and the file's pages are given back."""

from __future__ import annotations

import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from bitmill.runtime.kernels import compiled
from bitmill.runtime.kernels.mapped import is_mapped_file, release_pages
from helpers.native_kernels import needs_native

pytestmark = [
    needs_native,
    pytest.mark.skipif(sys.platform != "linux", reason="Linux tells which memory is a file"),
]


@pytest.fixture
def words(tmp_path):
    codes = torch.randint(-(2**31), 2**31 - 1, (1008, 64), dtype=torch.int32)
    save_file({"codes": codes}, tmp_path / "model.safetensors")
    return load_file(tmp_path / "model.safetensors")["codes"]


@pytest.mark.parametrize("rows_per_tile", [1, 4, 16])
def test_pieces_give_the_bytes_of_the_whole(words, rows_per_tile, monkeypatch) -> None:
    layout = [1008, 512, 64, 4, rows_per_tile, max(2, rows_per_tile)]
    own = words.clone()
    expected = compiled._repacked(own, layout)
    monkeypatch.setattr(compiled, "PIECE_BYTES", 10_000)
    released = []
    monkeypatch.setattr(
        compiled, "release_pages", lambda piece: released.append(len(piece)) or release_pages(piece)
    )
    assert torch.equal(compiled._repacked(words, layout), expected)
    assert sum(released) == 1008
    assert len(released) > 1
    assert torch.equal(words, own)  # read again from the file


def test_changed_and_own_memory_is_no_file(words) -> None:
    assert is_mapped_file(words)
    assert not is_mapped_file(words.clone())
    words[3, 5] = 1
    assert not is_mapped_file(words)
