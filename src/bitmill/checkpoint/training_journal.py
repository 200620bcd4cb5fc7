"""The journal of an unfinished training: its last state, and the identity that a resumed run must have."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from bitmill.checkpoint.journal import MAX_BYTES, check_identity
from bitmill.checkpoint.work_folder import JOURNAL
from bitmill.config.documents import load_json, read_document
from bitmill.errors import CheckpointError
from bitmill.files import sha256, write_json, write_tensors


class TrainingJournal:
    """Keeps the state of a training in a work folder.

    Args:
        work: the work folder.
        identity: plain data that decides the result.
    """

    def __init__(self, work: Path, identity: dict[str, Any]) -> None:
        self.work, self.identity = work, identity

    def save(self, tensors: dict[str, Tensor], data: dict[str, Any]) -> None:
        """Replace the state by a newer one; whenever the process ends, one of both is complete.

        Args:
            tensors: name -> tensor.
            data: the rest, as plain data; `steps` numbers the state.
        """
        file = self.work / f"training-{data['steps']}.safetensors"
        write_tensors(file, tensors)
        record = {"file": file.name, "sha256": sha256(file), "data_sha256": _digest(data)}
        write_json(self.work / JOURNAL, {"identity": self.identity, "state": record, "data": data})
        for other in self.work.glob("training-*.safetensors"):
            if other != file:
                other.unlink()

    def load(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Return the state of an earlier run, None where there is none.

        Raises:
            CheckpointError: the run has another identity, or is damaged.
        """
        path = self.work / JOURNAL
        if not path.exists():
            return None
        try:
            found = load_json(read_document(path, "journal", CheckpointError, MAX_BYTES))
            identity, state, data = found["identity"], found["state"], found["data"]
            file = self.work / Path(state["file"]).name
            digest, data_digest = state["sha256"], state["data_sha256"]
        except (CheckpointError, ValueError, KeyError, TypeError) as error:
            raise self._unreadable(type(error).__name__) from None
        check_identity(self.work, identity, self.identity)
        if _digest(data) != data_digest:
            raise self._unreadable(f"{JOURNAL} was altered")
        try:
            if sha256(file) != digest:
                raise self._unreadable(f"{file.name} was altered")
            return load_file(file), data
        except (OSError, SafetensorError) as error:
            raise self._unreadable(type(error).__name__) from None

    def _unreadable(self, reason: str) -> CheckpointError:
        return CheckpointError(
            f"The unfinished training in {self.work} cannot be read ({reason}); delete the folder and start anew."
        )


def _digest(data: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()
