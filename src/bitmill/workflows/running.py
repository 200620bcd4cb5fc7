"""Quality of a folder as it runs: loaded packed, by the default kernels and inputs, also one token at a time.

Quality measured while quantizing comes from decoded weights and whole windows. Generated text takes another path:
a token at a time, products with inputs rounded to 8 bits, the packed cache of the folder's KV method. Here the
packed model runs both ways, and is compared with the float model's predictions that the folder keeps, so that the
measurement can be repeated without the float model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bitmill.checkpoint.contents import read_json
from bitmill.checkpoint.reader import Checkpoint
from bitmill.compat import forward_with_cache
from bitmill.errors import CheckpointError, is_out_of_memory
from bitmill.evaluation.logits import pieces
from bitmill.evaluation.reference import ReferencePredictions, read_reference
from bitmill.files import folder_bytes
from bitmill.models.block_call import output_tensor
from bitmill.models.split import deferred_output_fn
from bitmill.native import instruction_set
from bitmill.progress import Progress
from bitmill.runtime.activations import activations
from bitmill.workflows import kv as kv_workflow
from bitmill.workflows.free_memory import check_fits
from bitmill.workflows.load import read_folder

PATHS = ("windows", "decode")
# Largest change of the KL divergence, in nats plus relative to the recorded value, and of the top-1 agreement.
# Kernels of one instruction set repeat their sums in the same order; other sets and devices round differently.
TOLERANCE_SAME = (1e-4, 0.01, 0.01)
TOLERANCE_OTHER = (5e-3, 0.05, 0.03)


@torch.no_grad()
def measure_running(
    model: nn.Module, reference: ReferencePredictions, progress: Progress | None = None
) -> dict[str, Any]:
    """Compare a packed model, as it runs, with the float model.

    Args:
        model: loaded from a folder.
        reference: the float model's predictions.
        progress: observer.

    Returns:
        The report's entry `running`: `tokens`, `device`, `isa` (instruction set of the kernels), `activations`
        (type that inputs are rounded to), and for `windows` and `decode` (one token at a time) the
        `kl_divergence` (nats per token, over the most likely tokens and the rest) and the `top1_agreement`.
    """
    progress = progress or Progress()
    progress.start("running the packed model", reference.tokens.numel())
    scores = {name: _score(reference, path) for name, path in running_paths(model, progress).items()}
    return running_record(model, reference.tokens.numel(), scores)


def measure_folder(
    folder: Path, reference: ReferencePredictions, device: str, trust_remote_code: bool, progress: Progress
) -> dict[str, Any] | None:
    """Return `measure_running` of the model in a folder; None where it does not fit into memory, as its blocks do.

    Args:
        folder: the quantized folder.
        reference: the float model's predictions.
        device: to run on.
        trust_remote_code: load code in the folder.
        progress: observer.
    """
    try:
        check_fits(str(folder), folder_bytes(folder), device)
        config = read_json(folder, "config.json")
        model = read_folder(folder, config, device=device, trust_remote_code=trust_remote_code)
        return measure_running(model, reference, progress)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        progress.note("the packed model does not fit into memory, so how it runs was not measured")
        return None


def running_record(model: nn.Module, tokens: int, scores: dict[str, Any]) -> dict[str, Any]:
    """Return the report's entry `running`.

    Args:
        model: the packed model.
        tokens: number of tokens that it was measured on.
        scores: figures of every path.
    """
    device = next(model.parameters()).device.type
    about = {"tokens": tokens, "device": device, "isa": instruction_set(), "activations": activations().name}
    return {**about, **scores}


def running_paths(
    model: nn.Module, progress: Progress | None = None
) -> dict[str, Callable[[Tensor], Iterator[Tensor]]]:
    """Return the ways in which a packed model runs: functions from a window (1, length) to logits in pieces."""
    device, outputs = next(model.parameters()).device, deferred_output_fn(model)
    return {
        "windows": lambda window: pieces(outputs(window), 0, window.shape[1]),
        "decode": lambda window: _decode(model, window.to(device), progress or Progress()),
    }


def _score(reference: ReferencePredictions, path: Callable[[Tensor], Iterator[Tensor]]) -> dict[str, float]:
    sums = [reference.compare(i, path(window[None])) for i, window in enumerate(reference.tokens.long())]
    count = reference.tokens.numel()
    divergence, agreed = (sum(column) for column in zip(*sums))
    return {"kl_divergence": divergence / count, "top1_agreement": agreed / count}


def _decode(model: nn.Module, window: Tensor, progress: Progress) -> Iterator[Tensor]:
    """Yield the logits (1, vocabulary) of every position of a window (1, length), one token at a time."""
    cache: Any = kv_workflow.CacheFactory(model, None, str(model.name_or_path)).new()
    for position in range(window.shape[1]):
        output, cache = forward_with_cache(model, window[:, position : position + 1], cache)
        if cache is None:  # a model without a cache reads the whole window again for each token
            yield output_tensor(model(window))[0]
            return
        yield output.logits[0]
        progress.advance()


def verify_running(
    checkpoint: Checkpoint, model: nn.Module, progress: Progress | None = None
) -> dict[str, Any] | None:
    """Repeat the record of a folder's running quality; None where there is none.

    Args:
        checkpoint: the folder.
        model: loaded from it.
        progress: observer.

    Returns:
        The new record.

    Raises:
        CheckpointError: a figure has changed by more than the tolerance, or the record is damaged.
    """
    recorded, reference = checkpoint.report.get("running"), read_reference(checkpoint.folder)
    if recorded is None and reference is None:
        return None
    if reference is None or recorded is None or not _is_sound(recorded):
        raise CheckpointError(
            f"{checkpoint.folder}/report.json and reference.safetensors do not describe one measurement; "
            "quantize again."
        )
    now = measure_running(model, reference, progress)
    same = all(now[key] == recorded.get(key) for key in ("device", "isa", "activations"))
    absolute, relative, share = TOLERANCE_SAME if same else TOLERANCE_OTHER
    for path in PATHS:
        limits = {"kl_divergence": absolute + relative * recorded[path]["kl_divergence"], "top1_agreement": share}
        for key, limit in limits.items():
            before, after = recorded[path][key], now[path][key]
            if not abs(after - before) <= limit:  # also when it is NaN
                raise CheckpointError(
                    f"The packed model of {checkpoint.folder} gives {key} {after:.5f} ({path}) where {before:.5f} "
                    "was recorded; its runtime differs, or the folder is damaged."
                )
    return now


def _is_sound(recorded: Any) -> bool:
    """Return True if the report's entry has the figures of both paths as numbers."""
    return isinstance(recorded, dict) and all(
        isinstance(recorded.get(path), dict)
        and all(isinstance(recorded[path].get(key), float) for key in ("kl_divergence", "top1_agreement"))
        for path in PATHS
    )
