"""What the float model says about the held-out windows, computed once and kept on disk for every variant.

Stored are log-probabilities in fp16, (windows, length, vocabulary), not logits: near 0, where the likely tokens
are, fp16 is finest, and that is where the divergence is weighed.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bitmill.checkpoint.files import writing
from bitmill.errors import CheckpointError, OutputError

Logits = Callable[[Tensor], Tensor]


class Recorder:
    """Wraps the float model: passes its logits on and writes them down, windows first to last."""

    def __init__(self, path: Path, model: Logits, windows: Tensor) -> None:
        self.path, self.model, self.windows = path, model, windows
        self.half = path.with_name(path.name + ".tmp")
        self._file: np.memmap | None = None
        self._at = 0

    def __call__(self, tokens: Tensor) -> Tensor:
        """Logits of the next windows (w, length)."""
        logits = self.model(tokens)
        if self._file is None:
            self._file = self._create(logits.shape[-1])
        for window in logits:
            self._file[self._at] = torch.log_softmax(window.float(), -1).half().cpu().numpy()
            self._at += 1
        return logits

    def keep(self) -> None:
        """Give the file its name, once every window is in it."""
        assert self._file is not None
        assert self._at == len(self.windows)
        with writing(self.path):
            self._file.flush()
            self._file = None
            os.replace(self.half, self.path)

    def _create(self, vocabulary: int) -> np.memmap:
        shape = (*self.windows.shape, vocabulary)
        size, free = 2 * int(np.prod(shape)), shutil.disk_usage(self.path.parent).free
        if size > free:
            raise OutputError(
                f"The float model's predictions need {size / 1e9:.1f} GB and {self.path.parent} has "
                f"{free / 1e9:.1f} GB free; lower --windows, or choose another folder with -o."
            )
        with writing(self.half):
            return np.lib.format.open_memmap(self.half, mode="w+", dtype=np.float16, shape=shape)


class Recorded:
    """The recorded predictions as a model: called with the same windows in the same order."""

    def __init__(self, path: Path, windows: Tensor) -> None:
        try:
            self._file = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path} cannot be read ({error}); delete it and compare again.") from None
        if self._file.shape[:2] != tuple(windows.shape):
            raise CheckpointError(f"{path} holds {self._file.shape[:2]} windows; delete it and compare again.")
        self._at = 0

    def __call__(self, tokens: Tensor) -> Tensor:
        """Log-probabilities (w, length, vocabulary) of the next windows."""
        cut = slice(self._at, self._at + len(tokens))
        self._at += len(tokens)
        return torch.from_numpy(np.array(self._file[cut]))
