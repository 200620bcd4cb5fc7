"""The float model that a quantized folder is trained to."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bitmill.calibration.token_windows import calibration_windows
from bitmill.checkpoint.reader import Checkpoint
from bitmill.config.paths import user_path
from bitmill.data.windows import CalibrationData
from bitmill.errors import SourceError, UsageError, one_line
from bitmill.evaluation.context import text_config
from bitmill.evaluation.logits import DeferredLogits
from bitmill.models.split import recorded_outputs
from bitmill.pipeline.in_place import eval_mode
from bitmill.progress import Progress
from bitmill.runtime.decode import detach
from bitmill.sources.open import open_source
from bitmill.sources.zoo import ZOO
from bitmill.workflows.load import load


class Teacher:
    """A float model, which is in memory only while it runs.

    Args:
        model: the model; None for the one that the folder was made from.
        checkpoint: the folder.
        config: transformers config of the folder.

    Attributes:
        name: in reports; of a folder without those above it.

    Raises:
        UsageError: the folder does not tell where its float model is.
    """

    def __init__(self, model: str | Path | nn.Module | None, checkpoint: Checkpoint, config: Any) -> None:
        self.model = _origin(checkpoint) if model is None else model
        self.name = _name(self.model)
        self._folder, self._words = checkpoint.folder, _words(config)

    @torch.no_grad()
    def outputs(
        self, windows: list[Tensor], device: str, trust_remote_code: bool, progress: Progress
    ) -> list[DeferredLogits]:
        """Run on all windows now; the logits, which the head alone computes, follow when they are read.

        Args:
            windows: token ids (length,) each.
            device: to run on.
            trust_remote_code: load code that comes with the model.
            progress: advanced by one for each window.

        Returns:
            Logits (1, length, vocabulary) of every window.

        Raises:
            UsageError: the vocabulary is another one than the folder's.
            SourceError: the model cannot be opened, or not run in parts.
        """
        live = isinstance(self.model, nn.Module)
        with self._opened(device, trust_remote_code) as model:
            self._check(_words(getattr(model, "config", None)), self._words)
            progress.start("teacher", len(windows))
            found = recorded_outputs(model, [w[None] for w in windows], progress, free_body=not live)
        if found is None:
            raise SourceError(
                f"{self.name} does not pass hidden states of a decoder to its head; give another teacher."
            )
        return found

    def windows(
        self, text: CalibrationData, device: str, trust_remote_code: bool, tokenizer: Any, progress: Progress
    ) -> Tensor:
        """Return token windows (samples, seqlen) that the float model writes itself.

        Args:
            text: number and length of the windows, and the seed.
            device: to run on.
            trust_remote_code: load code that comes with the model.
            tokenizer: of the folder, for a live model; None where there is none.
            progress: where progress is reported.

        Raises:
            UsageError: the vocabulary is another one than the folder's.
        """
        with self._named_errors():
            source = open_source(self.model, trust_remote_code=trust_remote_code, tokenizer=tokenizer)
        self._check(_words(source.config), self._words)
        return calibration_windows(source, text, device, progress)[0]

    @torch.no_grad()
    def check_vocabulary(self, output: DeferredLogits, vocabulary: int) -> None:
        """Raise UsageError unless logits of the teacher have a size."""
        self._check(output[0, slice(0, 1)].shape[-1], vocabulary)

    def _check(self, found: int | None, expected: int | None) -> None:
        if found is not None and expected is not None and found != expected:
            raise UsageError(
                f"The teacher has a vocabulary of {found} and {self._folder} one of {expected}; give the float "
                "model it was made from."
            )

    @contextmanager
    def _opened(self, device: str, trust_remote_code: bool) -> Iterator[nn.Module]:
        """Yield the model, ready to run."""
        if isinstance(self.model, nn.Module):
            with eval_mode(self.model):
                yield self.model
            return
        with self._named_errors():
            model = load(self.model, device=device, trust_remote_code=trust_remote_code)
        yield detach(model)

    @contextmanager
    def _named_errors(self) -> Iterator[None]:
        """Say of a model that cannot be opened that it is the teacher."""
        try:
            yield
        except SourceError as error:
            raise SourceError(
                f"The teacher cannot be opened ({one_line(error)}); name the float model with --teacher (teacher)."
            ) from None


def _origin(checkpoint: Checkpoint) -> str:
    """Return the float model that a folder was made from."""
    hub, source = checkpoint.report.get("hub") or {}, str(checkpoint.report["source"])
    if source in ZOO:
        return source
    if hub.get("id"):
        return f"{hub['id']}@{hub['commit']}" if hub.get("commit") else str(hub["id"])
    raise UsageError(
        f"{checkpoint.folder} was made from {source!r}, and does not tell where that is; name it with --teacher "
        "(teacher)."
    )


def _name(model: str | Path | nn.Module) -> str:
    if isinstance(model, nn.Module):
        return type(model).__name__
    path = user_path(model)
    return path.resolve().name if path.exists() and str(model) not in ZOO else str(model)


def _words(config: Any) -> int | None:
    """Return the size of the vocabulary that a config states."""
    words = getattr(text_config(config), "vocab_size", None)
    return words if isinstance(words, int) else None
