"""Encoder-decoders that write what is said in a recording: Whisper."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from bitmill.data.recordings import RecordingWindows, join, split
from bitmill.data.text import TextSource, Windows
from bitmill.errors import CalibrationError
from bitmill.evaluation.logits import Output
from bitmill.evaluation.metrics import LanguageModelMetrics, Metric
from bitmill.tasks.base import TASKS, Loss, Task
from bitmill.tasks.seq2seq_lm import start_token

_LENGTH = 8  # token ids of an example


@TASKS.register("speech_seq2seq")
class SpeechSeq2Seq(Task):
    """A recognizer, whose decoder is forced to write the transcript of a recording."""

    description = "a model of speech"
    auto_class_name = "AutoModelForSpeechSeq2Seq"
    generates = False  # not from a prompt
    batch_size = 8
    reads: ClassVar[Literal["text", "pictures", "recordings"]] = "recordings"
    reader_class_name = "AutoProcessor"

    def call(self, model: Any, windows: Tensor, **options: Any) -> Any:
        """Run a model on windows (windows, channels, frames + length), see `bitmill.data.recordings`."""
        features, ids = split(windows, _frames(model.config))
        dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
        return model(input_features=features.to(dtype), decoder_input_ids=ids, **options)

    def positions(self, windows: Tensor) -> int:
        """Return the positions of the encoder, half as many as frames, about."""
        return max(1, windows.shape[-1] // 2)

    def token_ids(self, windows: Windows) -> Windows:
        """Return the last of the first row of each window, which are token ids in any case."""
        return [window[0, window.shape[-1] - 1 :].long() for window in windows]

    def example(self, config: Any) -> Tensor:
        """Return silence and the start token."""
        ids = torch.full((1, _LENGTH), start_token(config))
        return join(torch.zeros(1, config.num_mel_bins, _frames(config)), ids)

    def checked(self, windows: Tensor, config: Any) -> Tensor:
        """Return a caller's windows as fp32.

        Args:
            windows: fp32 (windows, channels, frames + length), see `bitmill.data.recordings.join`.
            config: transformers config.

        Raises:
            CalibrationError: they have another shape or type, or hold NaN or Inf.
        """
        shape, frames = tuple(windows.shape), _frames(config)
        if windows.is_meta or len(shape) != 3 or shape[1] != config.num_mel_bins or shape[2] <= frames:
            raise CalibrationError(
                f"The calibration tensor has the shape {shape}; give windows (windows, {config.num_mel_bins}, "
                f"{frames} + token ids) of bitmill.data.recordings.join."
            )
        windows = windows.to("cpu", torch.float32)
        if not bool(torch.isfinite(windows).all()):
            raise CalibrationError("The calibration windows hold NaN or Inf; give finite ones.")
        return windows

    def windows(self, text: TextSource, tokenizer: Any) -> RecordingWindows:
        """Return the recordings of a list.

        Args:
            text: a .jsonl file, see `bitmill.data.recordings`.
            tokenizer: the model's processor.
        """
        return RecordingWindows(text, tokenizer)

    def metric(self) -> Metric:
        """Return perplexity, KL divergence and top-1 agreement of the transcripts."""
        return _TranscriptMetrics()

    def loss(self) -> Loss:
        """Return the mean next-token cross entropy of a transcript."""

        def cross_entropy(windows: Tensor, logits: Tensor) -> Tensor:
            ids = _last_ids(windows, logits.shape[1])[0]
            return nn.functional.cross_entropy(logits[0, :-1].float(), ids[1:].to(logits.device))

        return cross_entropy


class _TranscriptMetrics(LanguageModelMetrics):
    """The figures of a language model, of the token ids behind the features of a window."""

    def add(self, tokens: Tensor, output: Output, reference: Output | None = None) -> None:
        """Add windows (windows, channels, frames + length), with logits (windows, length, vocabulary)."""
        assert isinstance(output, Tensor)
        super().add(_last_ids(tokens, output.shape[1]), output, reference)


def _last_ids(windows: Tensor, length: int) -> Tensor:
    return split(windows, windows.shape[-1] - length)[1]


def _frames(config: Any) -> int:
    """Return the frames that an encoder reads, two for each of its positions."""
    return int(2 * config.max_source_positions)
