"""Encoder-decoders of text: T5, BART, Marian and others."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from bitmill.data.sentences import SentenceWindows
from bitmill.data.text import TextSource
from bitmill.data.windows import TextWindows
from bitmill.errors import SourceError
from bitmill.evaluation.metrics import Metric
from bitmill.evaluation.sequences import Seq2SeqMetrics
from bitmill.tasks.base import TASKS, Loss, Task


@TASKS.register("seq2seq_lm")
class Seq2SeqLM(Task):
    """An encoder that reads a text, and a decoder that is forced to write it again, token by token.

    Models that translate are measured so too: what counts is how far predictions move from the float model's.
    """

    description = "an encoder-decoder"
    auto_class_name = "AutoModelForSeq2SeqLM"
    generates = False  # not from a prompt alone, and its cache has two parts
    batch_size = 16

    def call(self, model: Any, windows: Tensor, **options: Any) -> Any:
        """Run a model on token ids (windows, length), which its decoder reads behind its start token."""
        start = torch.full_like(windows[:, :1], start_token(model.config))
        decoder_input_ids = torch.cat([start, windows[:, :-1]], 1)
        return model(input_ids=windows, decoder_input_ids=decoder_input_ids, **options)

    def windows(self, text: TextSource, tokenizer: Any) -> TextWindows:
        """Return windows between special tokens to calibrate on, and sentences to measure on.

        Args:
            text: see `Task.windows`.
            tokenizer: the model's tokenizer.
        """
        return SentenceWindows(text, tokenizer)

    def metric(self) -> Metric:
        """Return perplexity, KL divergence and top-1 agreement of the text that the decoder writes."""
        return Seq2SeqMetrics()

    def loss(self) -> Loss:
        """Return the mean cross entropy of the tokens of a window."""
        return lambda tokens, logits: nn.functional.cross_entropy(logits[0].float(), tokens[0].to(logits.device))


def start_token(config: Any) -> int:
    """Return the token id that a decoder starts with. Raises SourceError where a config names none."""
    for part in (config, config.get_text_config(decoder=True)):
        for name in ("decoder_start_token_id", "bos_token_id", "pad_token_id"):
            if isinstance(found := getattr(part, name, None), int):
                return found
    raise SourceError(
        f"The config of a {config.model_type} names no token that its decoder starts with; set "
        "decoder_start_token_id."
    )
