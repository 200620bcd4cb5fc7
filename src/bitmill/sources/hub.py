"""Models on the Hub: their ids, revisions and files, and the commit that a local folder comes from."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from bitmill.errors import SourceError, one_line

_COMMIT = re.compile(r"[0-9a-f]{40}")
_REVISION = re.compile(r"[^\s@:?*\[\\^~]+")  # what git allows in the name of a branch, roughly
# written by `hf download --local-dir`; the first line is the commit
_METADATA = Path(".cache", "huggingface", "download", "config.json.metadata")


@dataclass(frozen=True)
class HubOrigin:
    """The place on the Hub that a model was read from.

    Attributes:
        id: "org/name"; None where a folder does not tell it.
        revision: branch, tag or commit that was asked for; None for the default branch.
        commit: the commit that was read, 40 hex digits; None where it is not known.
    """

    id: str | None
    revision: str | None
    commit: str | None


def split_revision(model: str) -> tuple[str, str | None]:
    """Return id and revision of "org/name" or "org/name@revision".

    Raises:
        SourceError: the revision is empty, or no name of a branch, a tag or a commit.
    """
    name, at, revision = model.partition("@")
    if not at:
        return model, None
    if not _REVISION.fullmatch(revision) or ".." in revision:
        raise SourceError(
            f"{model!r} names the revision {revision!r}; write org/name@revision with a branch, a tag or a commit."
        )
    return name, revision


def is_hub_id(model: str) -> bool:
    """Return True if this is the id of a model on the Hub, with or without @revision, and no path."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    # a path that was mistyped must not turn into a request to the network
    if model.startswith((".", "/", "~")) or model.endswith((".gguf", ".safetensors", ".bin")):
        return False
    try:
        validate_repo_id(model.partition("@")[0])
    except HFValidationError:
        return False
    return True


def hub_files(model: str, patterns: list[str]) -> tuple[Path, HubOrigin]:
    """Download files of a model on the Hub.

    Args:
        model: "org/name" or "org/name@revision".
        patterns: glob patterns of the files.

    Returns:
        The folder of the snapshot in the cache of the Hub, and where it comes from.

    Raises:
        SourceError: The Hub, the model or its revision cannot be reached.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    name, revision = split_revision(model)
    try:
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except Exception as error:  # the network, a proxy or the Hub
        # the cause is more useful than "no cached snapshot"
        cause = error.__cause__ if isinstance(error, LocalEntryNotFoundError) else None
        raise SourceError(
            f"{model!r} is no local path and could not be fetched from the Hub ({one_line(cause or error)}); "
            "check the name and the network, or use a demo model of those that `bitmill models` lists."
        ) from error
    return folder, HubOrigin(name, revision, _commit_of_snapshot(folder))


def origin_of_folder(folder: Path) -> HubOrigin | None:
    """Return where a local folder comes from: a snapshot in the cache of the Hub, or one that was downloaded."""
    folder = folder.resolve()
    if commit := _commit_of_snapshot(folder):
        kind, _, name = folder.parents[1].name.partition("--")
        return HubOrigin(name.replace("--", "/") if kind == "models" and name else None, None, commit)
    try:
        with (folder / _METADATA).open(encoding="ascii") as file:
            first = file.read(41).strip()
    except (OSError, UnicodeDecodeError):
        return None
    return HubOrigin(None, None, first) if _COMMIT.fullmatch(first) else None


def _commit_of_snapshot(folder: Path) -> str | None:
    """Return the commit of snapshots/COMMIT."""
    return folder.name if folder.parent.name == "snapshots" and _COMMIT.fullmatch(folder.name) else None
