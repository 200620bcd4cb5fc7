"""Measure a model on held-out text."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from bitmill.checkpoint.reader import is_checkpoint, open_checkpoint
from bitmill.config.arguments import checked_arguments, renamed_arguments
from bitmill.config.paths import user_path
from bitmill.data.mixture import is_mixture
from bitmill.data.text import TextSource, Windows
from bitmill.data.windows import (
    CalibrationData,
    check_context_length,
    check_vocabulary,
    count_windows,
    describe_held_out,
    source_name,
)
from bitmill.errors import BitmillError, UsageError, one_line
from bitmill.evaluation.answers import NEW_TOKENS, answer_prompts
from bitmill.evaluation.logits import OutputFn
from bitmill.evaluation.metrics import batches, score_windows
from bitmill.evaluation.prompt import is_chat
from bitmill.kv.config import FLOAT, SAMPLES, KVConfig, parse_kv_config
from bitmill.models.block_call import output_fn
from bitmill.models.meta import trim_malloc
from bitmill.models.split import deferred_output_fn, recorded_output_fn, share_equal_parameters
from bitmill.pipeline.in_place import eval_mode
from bitmill.progress import Progress, peak_memory_bytes
from bitmill.progress.terminal import displayed
from bitmill.runtime.activations import activations
from bitmill.runtime.decode import detach
from bitmill.sources.open import open_source
from bitmill.sources.pooling import read_pooling
from bitmill.tasks.base import Task, task_for, task_of
from bitmill.workflows import kv as kv_workflow
from bitmill.workflows.load import live_model, reader_of
from bitmill.workflows.machine import seconds_since
from bitmill.workflows.sizes import stored_bits

Split = Literal["eval", "choose", "calib", "all"]
WINDOWS, WINDOWS_PER_DOMAIN = 40, 8  # to measure on where no number is given
_TOKENS = 1024  # tokens that pass a packed cache together


@renamed_arguments(text_source="text")
@checked_arguments("text", "progress")
def evaluate(
    model: str | Path | nn.Module,
    *,
    text: TextSource = "pydoc",
    split: Split = "eval",
    seqlen: int = 512,
    windows: int | None = None,
    reference: str | Path | nn.Module | None = None,
    prompts: Sequence[str] = (),
    max_new_tokens: int = NEW_TOKENS,
    kv: str | None = None,
    kv_bits: int | None = None,
    kv_options: dict[str, Any] | None = None,
    kv_samples: int = SAMPLES,
    kv_seqlen: int | None = None,
    tokenizer: Any = None,
    device: str = "cpu",
    progress: Progress | bool | None = None,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Measure perplexity on non-overlapping windows, and the agreement with a reference model.

    An encoder is measured on the sentences of the text, see `bitmill.evaluation.embedding`.

    Args:
        model: a live module, a folder, the name of a demo model, a hub id, or a .gguf file.
        text: "suite" for five domains and their mean, a name that `bitmill texts` lists, pydoc, a .txt or .jsonl
            file, hf:dataset, or a list of texts.
        split: the text's last fifth ("eval"), its first four fifths ("calib"), or all of it. The documents of a
            domain are divided into "calib", "choose" and "eval".
        seqlen: tokens of a window.
        windows: number of windows; 40 without it, of suite and mix 8 of each domain; 0 takes all.
        reference: the model to compare with, through an ordinary cache.
        prompts: answered greedily by both models, through an ordinary cache, in at most `max_new_tokens` tokens;
            an encoder answers none.
        kv, kv_bits, kv_options: a KV method, to measure through the packed cache. Options default to those of the
            folder's calibration; without one, the method is calibrated on `kv_samples` windows of `kv_seqlen`
            tokens (2048, or the model's context length) of the text's first four fifths.

    Returns:
        perplexity, tokens, bits_per_weight, size_bytes, time_s and peak_memory_bytes, for an encoder
        pair_cosine. With a reference kl_divergence (nats per token), kl_interval, kl_p99, kl_p999, top1_agreement,
        reference_perplexity and perplexity_ratio, for an encoder cosine_similarity and neighbour_agreement. For
        suite and mix these are means, and `domains` has those of each domain. With a KV method `kv_*`, docs/kv.md.
        With prompts `samples`: for each the `prompt`, `chat` (true if it went through a chat template),
        `max_new_tokens`, and the `answer` and `reference_answer` as in results.json, docs/compare.md.

    Raises:
        UsageError: prompts are given as one text, or with a KV method.
    """
    if isinstance(prompts, str) or (prompts and kv not in (None, FLOAT)):
        raise UsageError("prompts is a list of texts, answered through an ordinary cache; leave kv out with them.")
    text = CalibrationData(text).source
    if windows is None:
        windows = usual_windows(text)
    started = time.perf_counter()
    kv_config = parse_kv_config(None if kv == FLOAT else kv, kv_bits, kv_options, kv_samples, kv_seqlen)
    task = _task(model, trust_remote_code)
    tokenizer = reader_of(model, tokenizer, task, trust_remote_code)
    with displayed(progress) as shown:
        shown.start("reading text and model", 0)
        bits, size = stored_bits(model, trust_remote_code)
        asking = _Prompts(tuple(prompts), max_new_tokens, tokenizer, shown)
        scoring = _Scoring(task, text, split, seqlen, tokenizer, asking, shown)
        load_live = partial(live_model, device=device, trust_remote_code=trust_remote_code)
        scored = scoring.score(model, reference, load_live, windows or None, kv_config)
    return {
        **scored,
        "activations": activations().name,
        "bits_per_weight": bits,
        "size_bytes": size,
        "time_s": seconds_since(started),
        "peak_memory_bytes": peak_memory_bytes(),
    }


@dataclass(frozen=True)
class _Prompts:
    """Prompts that the models of a measurement answer."""

    prompts: tuple[str, ...]
    max_new_tokens: int
    tokenizer: Any
    progress: Progress

    def answers(self, model: nn.Module | None) -> list[dict[str, Any]]:
        """Return the answers of a model; none without a model, or where it cannot answer."""
        if model is None or not self.prompts:
            return []
        try:
            return answer_prompts(model, self.tokenizer, self.prompts, self.max_new_tokens, self.progress)
        except BitmillError as error:  # which does not spoil the figures
            self.progress.note(f"the prompts were not answered: {one_line(error)}")
            return []

    def samples(self, answers: list[dict[str, Any]], of_reference: list[dict[str, Any]]) -> dict[str, Any]:
        """Return the entry `samples` of a result; nothing without answers."""
        about = {"chat": is_chat(self.tokenizer), "max_new_tokens": self.max_new_tokens}
        samples = [{"prompt": prompt, **about, "answer": answer} for prompt, answer in zip(self.prompts, answers)]
        for sample, answer in zip(samples, of_reference):
            sample["reference_answer"] = answer
        return {"samples": samples} if samples else {}


def usual_windows(text: TextSource) -> int:
    """Return the number of windows to measure on where none is given, of each domain for a mixture."""
    return WINDOWS_PER_DOMAIN if is_mixture(text) else WINDOWS


class _Scoring:
    """The text of a measurement and how models are scored on it."""

    def __init__(
        self,
        task: Task,
        text: TextSource,
        split: Split,
        seqlen: int,
        tokenizer: Any,
        asking: _Prompts,
        progress: Progress,
    ) -> None:
        self.task, self.split, self.seqlen, self.progress = task, split, seqlen, progress
        self.source, self.text = text, source_name(text)
        self.metric = task.metric()  # a pooling that is not supported is refused before text is read
        self.windows = task.windows(text, tokenizer)
        self.asking = asking if task.generates else replace(asking, prompts=())

    @torch.no_grad()
    def score(
        self,
        model: str | Path | nn.Module,
        reference: str | Path | nn.Module | None,
        load_live: Callable[[Any], nn.Module],
        windows: int | None,
        kv: KVConfig | None,
    ) -> dict[str, Any]:
        """Score a model.

        Args:
            model: the model.
            reference: the model to compare with.
            load_live: loads either of them.
            windows: number of windows, of each domain for a mixture; None for all.
            kv: the packed cache that the model is scored through; None for an ordinary one.

        Returns:
            The figures and the text.
        """
        chosen = self.windows.held_out(self.split, self.seqlen, windows)
        trim_malloc()  # reading a tokenizer of 262,144 words leaves 0.3 GB of free pages
        domains = self.windows.domains(self.split, self.seqlen, windows)
        batch = self.task.batch_size if kv is None else max(1, _TOKENS // self.seqlen)
        with eval_mode(_module(model)), eval_mode(_module(reference)):
            other = None if reference is None else load_live(reference)
            of_reference = self.asking.answers(other)
            if other is not None and other is not reference:
                detach(other)  # its compiled step would hold the blocks that are freed
            against = self._run_reference(other, chosen, batch, free_body=other is not reference)
            live = load_live(model)
            if other is not None and other is not reference and live is not model:
                share_equal_parameters(live, other)
            self._check_windows(live, chosen)
            if kv is None:
                run = deferred_output_fn(live) if self.task.generates else output_fn(live, self.task.call)
                figures = score_windows(run, chosen, against, self.progress, batch, self.metric, domains)
            else:
                packed = kv_workflow.PackedCacheEvaluator(
                    live, kv, self.windows, self.text, self.split, self.progress
                )
                figures = score_windows(packed, chosen, against, self.progress, batch, self.metric, domains)
                figures |= packed.measurements()
            figures |= self.asking.samples(self.asking.answers(live), of_reference)
        return {
            **figures,
            **describe_held_out(self.windows, self.source, self.split, self.seqlen, windows),
            "windows": count_windows(chosen, self.seqlen, domains),
        }

    def _run_reference(
        self, reference: nn.Module | None, windows: Windows, batch: int, free_body: bool
    ) -> OutputFn | None:
        """Return the outputs of the reference, whose blocks need not stay in memory; None without one."""
        if reference is None:
            return None
        self._check_windows(reference, windows)
        self.progress.start("reference", len(windows))
        if not self.task.generates:
            return output_fn(reference, self.task.call)
        return recorded_output_fn(reference, batches(windows, batch), self.progress, free_body)

    def _check_windows(self, model: nn.Module, windows: Windows) -> None:
        config = getattr(model, "config", None)
        check_context_length(config, self.seqlen)
        check_vocabulary(config, self.task.token_ids(windows))


def _module(model: object) -> nn.Module | None:
    """Return a live module, None for the name or the folder of a model."""
    return model if isinstance(model, nn.Module) else None


def _task(model: str | Path | nn.Module, trust_remote_code: bool) -> Task:
    """Return the task of a live model, a folder that bitmill wrote, or any other source."""
    folder = (getattr(model, "name_or_path", "") or None) if isinstance(model, nn.Module) else model
    if folder is not None and is_checkpoint(user_path(folder)):
        return task_for(open_checkpoint(folder).config, partial(read_pooling, user_path(folder)))
    if isinstance(model, nn.Module):
        return task_for(getattr(model, "config", None))
    return task_of(open_source(model, trust_remote_code=trust_remote_code))
