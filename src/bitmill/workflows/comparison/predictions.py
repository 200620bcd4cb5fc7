"""The float model's predictions on the held-out windows, computed once and kept on disk for every variant.

Stored are log-probabilities in fp16, (windows, length, vocabulary), not logits: fp16 is most precise near 0, where
the log-probabilities of likely tokens are, and these dominate the KL divergence.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bitmill.errors import CheckpointError, OutputError
from bitmill.evaluation.logits import DeferredLogits, OutputFn
from bitmill.files import new_file, output_errors, write_text, xxh3


class PredictionRecorder:
    """Wraps the float model: returns its logits, and writes its predictions as they are read, first to last."""

    def __init__(self, path: Path, model: OutputFn, windows: Tensor) -> None:
        self.path, self.model, self.windows = path, model, windows
        self.partial = path.with_name(path.name + ".tmp")
        self._file: np.memmap | None = None
        self._requested, self._written = 0, 0  # windows, positions

    def __call__(self, tokens: Tensor) -> DeferredLogits:
        """Return the logits of the next windows (w, length)."""
        logits, first = self.model(tokens), self._requested
        self._requested += len(tokens)

        def read(window: int, positions: slice) -> Tensor:
            piece = logits[window, positions]
            if self._file is None:
                self._file = self._create(piece.shape[-1])
            self._file[first + window, positions] = torch.log_softmax(piece.float(), -1).half().cpu().numpy()
            self._written += len(piece)
            return piece

        return DeferredLogits(read)

    def finish(self) -> None:
        """Rename the file to its final name, after the last window."""
        assert self._file is not None
        assert self._written == self.windows.numel()
        with output_errors(self.path):
            self._file.flush()
            self._file = None
            write_text(digest_file(self.path), xxh3(self.partial))
            os.replace(self.partial, self.path)

    def _create(self, vocabulary: int) -> np.memmap:
        shape = (*self.windows.shape, vocabulary)
        size, free = 2 * int(np.prod(shape)), shutil.disk_usage(self.path.parent).free
        if size > free:
            raise OutputError(
                f"The float model's predictions need {size / 1e9:.1f} GB and {self.path.parent} has "
                f"{free / 1e9:.1f} GB free; lower --windows, or choose another folder with -o."
            )
        with output_errors(self.partial):
            new_file(self.partial)
            return np.lib.format.open_memmap(self.partial, mode="w+", dtype=np.float16, shape=shape)


def digest_file(path: Path) -> Path:
    """Return the file with the digest of recorded predictions, which earlier versions do not write."""
    return path.with_name(path.name + ".xxh3")


class RecordedPredictions:
    """The recorded predictions as a callable model; windows must be requested in their recorded order."""

    def __init__(self, path: Path, windows: Tensor) -> None:
        """Open a recorded file.

        Args:
            path: the file.
            windows: token ids (windows, length) that it was recorded on.

        Raises:
            CheckpointError: the file is damaged, or of other windows.
        """
        try:
            if (digest := digest_file(path)).is_file() and digest.read_text(encoding="utf-8") != xxh3(path):
                raise ValueError("its digest differs")
            self._file = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path} cannot be read ({error}); delete it and compare again.") from None
        if self._file.shape[:2] != tuple(windows.shape):
            raise CheckpointError(f"{path} holds {self._file.shape[:2]} windows; delete it and compare again.")
        self._next = 0

    def __call__(self, tokens: Tensor) -> DeferredLogits:
        """Return the log-probabilities (w, length, vocabulary) of the next windows."""
        first = self._next
        self._next += len(tokens)
        return DeferredLogits(
            lambda window, positions: torch.from_numpy(np.array(self._file[first + window, positions]))
        )
