"""The contract of a task: everything that depends on the kind of a model and not on its architecture."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor

from bitmill.architectures.adapter import adapter_for, named_task
from bitmill.config.registry import Registry
from bitmill.data.text import TextSource, Windows
from bitmill.data.windows import TextWindows, checked_windows
from bitmill.evaluation.metrics import Metric

if TYPE_CHECKING:
    from bitmill.sources.base import Source

_EXAMPLE_TOKENS = 16
Loss = Callable[[Tensor, Tensor], Tensor]  # tokens (1, n), model output (1, n, k) -> scalar


class Task(ABC):
    """A kind of model: which class loads it, how it reads text, and how it is measured.

    description: the kind in a sentence, with its article.
    auto_class_name: class of transformers that builds and loads such a model.
    generates: the model predicts next tokens, so it writes text, has a perplexity and caches keys and values.
    batch_size: windows that run at a time in an evaluation.
    default_text: text to evaluate on where the user names none.
    reads: a window is a row of tokens of a text, a picture, or a recording with its transcript.
    reader_class_name: class of transformers that loads the tokenizer, or the processor of pictures or sound.
    """

    description: ClassVar[str]
    auto_class_name: ClassVar[str]
    generates: ClassVar[bool]
    batch_size: ClassVar[int]
    default_text: ClassVar[str] = "pydoc"
    reads: ClassVar[Literal["text", "pictures", "recordings"]] = "text"
    reader_class_name: ClassVar[str] = "AutoTokenizer"

    @classmethod
    def for_model(cls, read_pooling: Callable[[], str] | None = None) -> Task:
        """Return the task of one model.

        Args:
            read_pooling: returns how hidden states become one embedding ("mean", "cls" or "max"); called only when
                the pooling is needed, and only by tasks that have one. The mean over tokens without it.
        """
        return cls()

    @property
    def auto_class(self) -> Any:
        """The class of transformers that builds and loads the model."""
        import transformers

        return getattr(transformers, self.auto_class_name)

    def reader(self, source: Source) -> Any:
        """Return the tokenizer of a source, or its processor. Raises SourceError where it has none."""
        return source.tokenizer() if self.reads == "text" else source.processor(self.reader_class_name)

    def example(self, config: Any) -> Tensor:
        """Return one window that any model of this config can read.

        Args:
            config: transformers config.

        Returns:
            Token ids (1, tokens), or a picture (1, channels, height, width).
        """
        count = getattr(config.get_text_config(), "vocab_size", None) or _EXAMPLE_TOKENS
        return torch.arange(_EXAMPLE_TOKENS)[None] % count

    def call(self, model: Any, windows: Tensor, **options: Any) -> Any:
        """Run a model on windows.

        Args:
            model: the model, or a part of it with its signature.
            windows: token ids (windows, length), or windows of another kind.
            **options: further arguments of the call.

        Returns:
            The output of the model.
        """
        return model(windows, **options)

    def positions(self, windows: Tensor) -> int:
        """Return the hidden states that a window has in a block, about."""
        return windows.shape[1]

    def token_ids(self, windows: Windows) -> Windows:
        """Return the token ids in windows, which the vocabulary must hold."""
        return windows

    def checked(self, windows: Tensor, config: Any) -> Tensor:
        """Return a caller's windows as the model reads them, on the CPU.

        Args:
            windows: token ids (windows, length), or windows of another kind.
            config: transformers config.

        Raises:
            CalibrationError: the model cannot read them.
        """
        return checked_windows(windows, config)

    @abstractmethod
    def windows(self, text: TextSource, tokenizer: Any) -> TextWindows:
        """Return the windows in which the model reads a text.

        Args:
            text: see `load_text`.
            tokenizer: the model's tokenizer.
        """

    @abstractmethod
    def metric(self) -> Metric:
        """Return a new, empty metric. Raises SourceError for a pooling that is not supported."""

    @abstractmethod
    def loss(self) -> Loss:
        """Return the loss whose squared gradients are the Fisher diagonal."""


TASKS: Registry[type[Task]] = Registry("task", "bitmill.tasks")


def task_for(config: Any, read_pooling: Callable[[], str] | None = None) -> Task:
    """Return the task of a config: of its adapter or of the class that it names, else causal language modelling.

    Args:
        config: a transformers config, the dict of a config.json, or None.
        read_pooling: see `Task.for_model`.
    """
    adapter = adapter_for(config)
    name = (named_task(config) or "causal_lm") if adapter is None else adapter.task
    return TASKS.get(name).for_model(read_pooling)


def task_of(source: Source) -> Task:
    """Return the task of a source, with the pooling that the source names."""
    return task_for(source.config, source.pooling)
