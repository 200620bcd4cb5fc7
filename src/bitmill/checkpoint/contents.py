"""The files of a quantized folder: its record, the documents written from the record, and foreign files.

Libraries choose by name which file of a folder they read, so one more file of weights can take the place of the
recorded ones. Therefore weights that are not in the record are refused, and all other foreign files are named.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bitmill.config.documents import read_json_object
from bitmill.errors import CheckpointError, quoted
from bitmill.files import xxh3
from bitmill.sources.side_files import ADAPTER, WEIGHT_SUFFIXES

REPORT = "report.json"
# rewritten with every measurement, so that their digests are not recorded
DOCUMENTS = (REPORT, "README.md", "report.html")
MAX_DOCUMENT_BYTES = 100_000_000
MAX_FILES = 100_000
DIGEST_THREADS = 4
# a user's own choice of how to generate and to describe a model, which changes no figure of the record
EDITABLE = re.compile(r"generation_config\.json|(.*/)?[^/]*\.(jinja|md)|chat_template\.json|(LICENSE|NOTICE)[^/]*")
_OF_TRAINERS = re.compile(r"(training_args|optimizer|scheduler|scaler|rng_state)[^/]*\.(bin|pt|pth)", re.I)


@dataclass(frozen=True)
class FileRecord:
    """A file as it was written; folders of earlier versions record its sha256 alone.

    sha256: hex digest, for `verify`.
    size_bytes: its size.
    xxh3: hex digest that is fast enough to compare whenever the file is loaded.
    """

    sha256: str
    size_bytes: int | None = None
    xxh3: str | None = None


def read_json(folder: Path, name: str) -> dict[str, Any]:
    """Return a JSON object of a quantized folder.

    Raises:
        CheckpointError: the file is missing, no regular file, too large, or holds no JSON object.
    """
    hint = f"{folder} is damaged or no complete bitmill folder, quantize again"
    return read_json_object(folder / name, CheckpointError, MAX_DOCUMENT_BYTES, hint)


def record_of(folder: Path, report: Mapping[str, Any]) -> dict[str, FileRecord]:
    """Return name -> record of the files of a report, empty where it has none.

    Raises:
        CheckpointError: the report's `files` is damaged, or names a file outside the folder.
    """
    files = report.get("files", {})
    if not isinstance(files, dict):
        raise CheckpointError(f"{folder}/{REPORT} has no record 'files'; the folder is damaged, quantize again.")
    record = {}
    for name, entry in files.items():
        fields = {"sha256": entry} if isinstance(entry, str) else entry
        sound = isinstance(fields, dict) and isinstance(fields.get("sha256"), str)
        size: Any = fields.get("size_bytes") if sound else None
        xxh3: Any = fields.get("xxh3") if sound else None
        parts = name.split("/")
        inside = "\0" not in name and all(part not in ("", ".", "..") for part in parts)
        if not sound or not inside or not _is_sound(size, int) or not _is_sound(xxh3, str):
            raise CheckpointError(
                f"{folder}/{REPORT} records the file {quoted(name)} as {quoted(entry)}; the folder is damaged, "
                "quantize again."
            )
        record[name] = FileRecord(fields["sha256"], size, xxh3)
    return record


def _is_sound(value: Any, kind: type) -> bool:
    return value is None or type(value) is kind


def check_files(folder: Path, record: Mapping[str, FileRecord], opened: Collection[str]) -> tuple[str, ...]:
    """Compare the files of a folder with its record, by name and, but for EDITABLE ones, by size.

    Args:
        folder: the folder.
        record: name -> record; empty for a folder without one.
        opened: names of the files that hold the tensors, and of their index.

    Returns:
        Names of the files that are neither recorded nor written from the record; a foreign folder ends with "/".

    Raises:
        CheckpointError: a file was altered or is missing, or weights lie there that are not recorded.
    """
    known = {*DOCUMENTS, *opened, *record}
    foreign = []
    found: dict[str, int] = {}
    for name, size_bytes in _files(folder, {Path(name).parts[0] for name in known if "/" in name}):
        if name in known:
            found[name] = size_bytes
        elif name == ADAPTER:
            raise CheckpointError(
                f"{folder / name} belongs to an adapter, which transformers would add to the model; move "
                f"the adapter's files into a folder below, such as {folder.name}/adapters/NAME, and load it from "
                "there with PEFT."
            )
        elif _is_weights(name):
            raise CheckpointError(
                f"{folder / name} holds weights and is no part of the quantized model, and a loader may read it "
                "instead; move it elsewhere."
            )
        else:
            foreign.append(name)
    for name, entry in record.items():
        path = folder / name
        if name not in found and _hub_blobs(folder) is None:
            raise CheckpointError(f"{path} is missing, but {REPORT} records it; copy the folder again.")
        if EDITABLE.fullmatch(name):
            continue
        if entry.size_bytes is not None and found.get(name, entry.size_bytes) != entry.size_bytes:
            raise CheckpointError(
                f"{path} was altered since it was written: it has {found[name]} bytes, and {entry.size_bytes} are "
                "recorded; copy it again."
            )
    return tuple(sorted(foreign))


def check_digests(folder: Path, record: Mapping[str, FileRecord], but: Collection[str] = ()) -> None:
    """Compare the recorded files with their fast digests, but for EDITABLE ones; files of older folders have none.

    Args:
        folder: the folder.
        record: name -> record.
        but: names of files that are not compared.

    Raises:
        CheckpointError: a file was altered.
    """
    names = [name for name in record if name not in but and not EDITABLE.fullmatch(name)]
    expected = {folder / name: digest for name in names if (digest := record[name].xxh3) is not None}
    paths = [path for path in expected if path.is_file()]
    with ThreadPoolExecutor(DIGEST_THREADS) as threads:  # reading and hashing hold no lock of Python's
        try:
            found = dict(zip(paths, threads.map(xxh3, paths)))
        except OSError as error:
            raise CheckpointError(f"{error.filename or folder} cannot be read ({error.strerror}).") from None
    if altered := next((path for path in paths if found[path] != expected[path]), None):
        raise CheckpointError(f"{altered} was altered since it was written (its digest differs); copy it again.")


def check_regular(folder: Path) -> None:
    """Raise CheckpointError for a FIFO, a socket or a device in the folder: reading it may never end."""
    for _ in _files(folder, set()):
        pass


def is_inside(root: Path, path: Path) -> bool:
    """Return True for a file whose bytes are in a folder, or in the Hub's cache that the folder belongs to.

    Args:
        root: the folder, without links in its path.
        path: the file.
    """
    if not path.is_symlink():
        return True
    above = Path(os.path.realpath(path)).parent  # a link to itself is no error here
    return above == root or above == _hub_blobs(root)


def _hub_blobs(folder: Path) -> Path | None:
    """Return where the Hub's cache keeps the files of a snapshot or of its subfolders; None for other folders.

    A snapshot is REPOSITORY/snapshots/REVISION. Its files are links, and only those that were requested.
    """
    real = folder.resolve()
    for snapshot in (real, *real.parents):
        if snapshot.parent.name == "snapshots" and (blobs := snapshot.parents[1] / "blobs").is_dir():
            return blobs
    return None


def _is_weights(name: str) -> bool:
    """Return True for a file that a loader may take for weights: they look in the folder, not below it."""
    if "/" in name or _OF_TRAINERS.fullmatch(name):
        return False
    return name.lower().endswith(WEIGHT_SUFFIXES) or name == ADAPTER


def _files(folder: Path, entered: Collection[str]) -> Iterator[tuple[str, int]]:
    """Yield name and size of every file, with links followed; of folders not in `entered` only "name/" and 0."""
    pending, count = [(folder, "")], 0
    while pending:
        above, prefix = pending.pop()
        try:
            entries = sorted(os.scandir(above), key=lambda entry: entry.name)
        except OSError as error:
            raise CheckpointError(f"{above} cannot be read ({error.strerror}).") from None
        count += len(entries)
        if count > MAX_FILES:
            raise CheckpointError(f"{folder} holds more than {MAX_FILES:,} files; move what is foreign elsewhere.")
        for entry in entries:
            name = prefix + entry.name
            try:
                status = entry.stat()
            except OSError:  # a link to nothing
                yield name, 0
                continue
            if stat.S_ISDIR(status.st_mode):
                if prefix or entry.name in entered:
                    pending.append((Path(entry.path), f"{name}/"))
                else:
                    yield f"{name}/", 0
            elif stat.S_ISREG(status.st_mode):
                yield name, status.st_size
            else:
                raise CheckpointError(f"{quoted(entry.path)} is no regular file; remove it.")
