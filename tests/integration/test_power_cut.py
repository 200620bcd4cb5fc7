"""After a power cut, the flushed files suffice to resume."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from bitmill import files
from bitmill.checkpoint.journal import Journal
from bitmill.checkpoint.work_folder import WorkFolder
from bitmill.cli.main import main
from helpers.workspace import snapshot


class Disk:
    """The part of the folder `root` that survives: by inode, bytes and names at their last flush."""

    def __init__(self, root: Path) -> None:
        self.root, self.checks = root, 0
        self.bytes: dict[int, bytes] = {}
        self.names: dict[int, dict[str, int]] = {}

    def flush(self, descriptor: int) -> None:
        state = os.fstat(descriptor)
        if stat.S_ISDIR(state.st_mode):
            children = os.listdir(descriptor)
            self.names[state.st_ino] = {name: os.stat(name, dir_fd=descriptor).st_ino for name in children}
        else:
            self.bytes[state.st_ino] = os.pread(descriptor, state.st_size, 0)

    def survivors(self) -> dict[str, bytes]:
        return dict(self._below(self.root.stat().st_ino, Path()))

    def _below(self, inode: int, path: Path) -> Iterator[tuple[str, bytes]]:
        if inode in self.bytes:
            yield str(path), self.bytes[inode]
        for name, child in self.names.get(inode, {}).items():
            yield from self._below(child, path / name)

    def check(self) -> None:
        """All that is there would survive, but for the lock, which ends with its process anyway."""
        assert self.survivors() == {k: v for k, v in snapshot(self.root).items() if not k.endswith("/lock")}
        self.checks += 1


@pytest.fixture
def disk(tmp_path, monkeypatch) -> Disk:
    root = tmp_path / "disk"
    root.mkdir()
    disk, replace = Disk(root), os.replace

    def replaced(old: Path, new: Path) -> None:
        assert disk.bytes.get(os.stat(old).st_ino) == Path(old).read_bytes()  # the name may get there first
        replace(old, new)

    monkeypatch.setattr(os, "fsync", disk.flush)
    monkeypatch.setattr(os, "replace", replaced)
    return disk


@pytest.mark.parametrize(
    "write",
    [
        lambda path: files.write_text(path, "words"),
        lambda path: files.write_json(path, {"of": 3}),
        lambda path: files.write_tensors(path, {"w": torch.ones(3)}),
    ],
    ids=["text", "json", "tensors"],
)
def test_file_survives(write, disk):
    write(disk.root / "file")
    disk.check()
    write(disk.root / "file")  # in place of the first
    disk.check()


def test_folder_and_parents_survive(disk):
    files.make_folder(disk.root / "a" / "b")
    files.make_folder(disk.root / "a" / "b" / "c")
    files.write_text(disk.root / "a" / "b" / "c" / "d", "words")
    disk.check()


def test_run_state_survives(disk, workspace, monkeypatch):
    out = disk.root / "out"
    add, rename, remove = Journal.add, os.rename, WorkFolder.remove

    def added(*args):
        disk.check()
        add(*args)
        disk.check()

    def renamed(*args):
        disk.check()
        rename(*args)

    def removed(work):
        disk.check()
        remove(work)

    monkeypatch.setattr(Journal, "add", added)
    monkeypatch.setattr(os, "rename", renamed)
    monkeypatch.setattr(WorkFolder, "remove", removed)
    assert main(workspace.quantize(out=out)) == 0
    assert disk.checks == 2 * 2 + 1 + 1


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOTSUP])
def test_folder_flush_unsupported(code, tmp_path, monkeypatch):
    flush = os.fsync

    def refuse(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(code, os.strerror(code))
        flush(descriptor)

    monkeypatch.setattr(os, "fsync", refuse)
    files.make_folder(tmp_path / "a")
    files.write_text(tmp_path / "a" / "b", "words")
    files.publish(tmp_path / "a", tmp_path / "c")
    assert snapshot(tmp_path) == {"c/b": b"words"}
