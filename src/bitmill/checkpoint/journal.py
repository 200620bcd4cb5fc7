"""The journal of an unfinished run: finished blocks, and the identity that a resumed run must have.

It is a file of the work folder `OUT.partial`. Its `identity` holds everything that decides the output bytes: the
model's fingerprint, the recipe, the token windows, the versions, the device and the thread count. A run resumes
only when all of it is equal.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bitmill.checkpoint.report_schema import LayerSummary
from bitmill.checkpoint.work_folder import JOURNAL
from bitmill.config.documents import load_json, read_document
from bitmill.errors import CheckpointError
from bitmill.files import sha256, write_json

MAX_BYTES = 1 << 28


class Journal:
    """The record of finished blocks in a work folder."""

    def __init__(self, work: Path, identity: dict[str, Any]) -> None:
        self.path = work / JOURNAL
        self.identity = identity
        self.blocks: dict[int, dict[str, Any]] = {}
        self.shared: dict[str, Any] | None = None

    def save(self) -> None:
        """Write the journal; blocks in it survive a crash from then on."""
        blocks = [{"index": index, **entry} for index, entry in sorted(self.blocks.items())]
        shared = {"shared": self.shared} if self.shared else {}
        write_json(self.path, {"identity": self.identity, **shared, "blocks": blocks})

    def shards(self) -> set[str]:
        """Return the names of the files that it holds."""
        return {entry["file"] for entry in (*self.blocks.values(), *([self.shared] if self.shared else []))}

    def add(self, index: int, file: Path, layers: dict[str, Any]) -> None:
        """Record a finished block.

        Args:
            index: index of the block.
            file: its shard.
            layers: layer -> summary.
        """
        self.blocks[index] = {"file": file.name, "sha256": sha256(file), "layers": layers}
        self.save()

    def share(self, file: Path) -> None:
        """Record the shard of shared parts and its digest."""
        self.shared = {"file": file.name, "sha256": sha256(file)}
        self.save()

    def load(self, shards: Path) -> None:
        """Read the journal of an earlier run.

        Raises:
            CheckpointError: the identity differs from this run's, or a shard was altered.
        """
        try:
            data = load_json(read_document(self.path, "journal", CheckpointError, MAX_BYTES))
            identity, blocks = data["identity"], data["blocks"]
        except (CheckpointError, ValueError, KeyError, TypeError) as error:
            raise self.unreadable(type(error).__name__) from None
        check_identity(self.path.parent, identity, self.identity)
        entries: list[Any] = blocks if isinstance(blocks, list) else [None]
        for entry in entries:
            try:
                known = {key: entry[key] for key in ("file", "sha256", "layers")}
                index = int(entry["index"])
                for name, summary in known["layers"].items():
                    LayerSummary.model_validate({"name": name, **summary})
                self.blocks[index] = {**known, "file": self._checked(shards, known)}
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                raise self.unreadable(f"{type(error).__name__} in its blocks") from None
        if (shared := data.get("shared")) is not None:
            try:
                self.shared = {"file": self._checked(shards, shared), "sha256": shared["sha256"]}
            except (KeyError, TypeError, ValueError) as error:
                raise self.unreadable(f"{type(error).__name__} in what is shared") from None

    def _checked(self, shards: Path, entry: dict[str, Any]) -> str:
        """Return the name of a shard after its digest was compared."""
        file = shards / Path(entry["file"]).name
        if not file.is_file() or sha256(file) != entry["sha256"]:
            raise CheckpointError(
                f"The shard {file} of the unfinished run is missing or altered; delete {self.path.parent} "
                "and run again."
            )
        return file.name

    def unreadable(self, reason: str) -> CheckpointError:
        """Return the error for a damaged journal."""
        return CheckpointError(
            f"The journal {self.path} cannot be read ({reason}); delete {self.path.parent} and run again."
        )


def check_identity(work: Path, old: Any, new: dict[str, Any]) -> None:
    """Raise CheckpointError for an unfinished run with another identity than this one's.

    Args:
        work: the work folder.
        old: the identity of the unfinished run.
        new: that of this one, as plain data.
    """
    difference = first_difference(old, json.loads(json.dumps(new)))
    if difference:
        key, before, now = difference
        raise CheckpointError(
            f"The unfinished run in {work} cannot be resumed: its {key} was {before!r} and is now {now!r}; "
            "restore that, or delete the folder and start anew."
        )


def first_difference(old: Any, new: Any, path: str = "") -> tuple[str, Any, Any] | None:
    """Return (path, old value, new value) of the first leaf in which two trees of plain data differ, or None."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in [*new, *(k for k in old if k not in new)]:
            found = first_difference(old.get(key), new.get(key), f"{path}.{key}" if path else key)
            if found:
                return found
        return None
    return None if old == new else (path, old, new)
