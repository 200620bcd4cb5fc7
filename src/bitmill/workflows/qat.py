"""Quantization-aware training of a live model: before it, and after it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from bitmill.checkpoint.overwrite import check_output
from bitmill.checkpoint.schema import quantization_config
from bitmill.config.arguments import checked_arguments
from bitmill.config.paths import user_path
from bitmill.errors import NumericsError, RecipeError, SourceError, UsageError, one_line, quoted
from bitmill.formats.soft_rounding import has_soft_rounding
from bitmill.models.streamed import StreamedModel
from bitmill.numerics.statistics import Statistics
from bitmill.pipeline.in_place import eval_mode
from bitmill.recipes.method import Method
from bitmill.recipes.recipe import Recipe
from bitmill.recipes.resolve import resolve_recipe
from bitmill.recipes.rules import Rule
from bitmill.recipes.scheme import LayerScheme
from bitmill.runtime.modules.convolution import unfolds
from bitmill.runtime.modules.packed import PackedMatrix
from bitmill.solvers.base import solve
from bitmill.sources.module import ModuleSource
from bitmill.training.fake_quant_conv2d import FakeQuantConv2d
from bitmill.training.fake_quant_linear import FakeQuantLinear, fake_quant_layers, weight_of
from bitmill.training.input_statistics import input_statistics
from bitmill.workflows.prepare import RecipeChanges

Model = TypeVar("Model", bound=nn.Module)

_CALIBRATED = frozenset({"gram", "activations", "samples"})  # statistics that `input_statistics` returns
_RECIPE = "_bitmill_qat_recipe"  # attribute of a prepared model: the recipe as plain data


@checked_arguments("model", "method", "calib")
def prepare_qat(
    model: Model,
    method: str | Path | Recipe | Method = "rtn",
    *,
    calib: Sequence[Tensor | Mapping[str, Any]] | None = None,
    rules: Sequence[str | Rule] = (),
    **options: Any,
) -> Model:
    """Replace the layers of a live model by layers that round their weights whenever they are used.

    The model is changed in place and trained as any other: in plain PyTorch, accelerate or transformers' Trainer.
    Weights stay floats and learn with the scales and zeros of their format; rounding passes gradients straight
    through. Embeddings, head, norms, and convolutions of models of transformers stay in float. `convert_qat` packs
    the result.

    Args:
        model: a model of transformers, of which the linears of the blocks are replaced, or another nn.Module, of
            which all nn.Linear are, and all nn.Conv2d without groups of channels.
        method: a method or recipe that quantizes layer by layer, such as "rtn", "hqq" or "nf4"; with `calib` also
            those that read inputs of layers, such as "gptq" or "asq".
        calib: batches on which the float model runs first: a tensor each, such as token ids or pictures, or
            keywords of the model.
        rules: exceptions for some layers, such as "*.down_proj=uniform:bits=8" or "*.k_proj=float".
        options: options of the method, such as bits=2 or group_size=64.

    Returns:
        The model.

    Raises:
        RecipeError: the recipe needs batches and there are none, or does more than to round weights and inputs.
        UsageError: the model has no linear layer to quantize, or is quantized already.
    """
    _check_live(model)
    recipe, _ = RecipeChanges(options, None, tuple(rules)).choose(method)
    if any(isinstance(module, PackedMatrix | FakeQuantLinear) for module in model.modules()):
        raise UsageError(f"{type(model).__name__} is quantized already; prepare the float model.")
    schemes = _schemes(model, recipe)
    for scheme in dict.fromkeys(schemes.values()):
        _check(recipe, scheme, calib is not None)
    statistics = _statistics(model, schemes, calib)
    made = {name: _layer(model, name, scheme, statistics[name]) for name, scheme in schemes.items()}
    for name, layer in made.items():
        _replace(model, name, layer)
    vars(model)[_RECIPE] = recipe.to_dict()
    return model


@checked_arguments("model")
def set_qat_temperature(model: nn.Module, temperature: float) -> None:
    """Let a model of `prepare_qat` round softly while it trains: weights move towards their levels with gradients.

    Training that lowers the temperature to 0 ends with hard rounding. Evaluation and `convert_qat` always round to
    the nearest level.

    Args:
        model: a model of `prepare_qat`.
        temperature: in gaps between levels: above 1 weights are nearly as they are, 0.1 is nearly a step, and 0
            rounds to the nearest level and passes gradients straight through.

    Raises:
        UsageError: the model is none of `prepare_qat`, or the temperature is negative or not finite.
        RecipeError: a format has no levels of single weights.
    """
    _check_live(model)
    if not 0 <= temperature < math.inf:
        raise UsageError(f"temperature is {temperature!r}; use 0 for hard rounding, or a positive number.")
    layers = dict(fake_quant_layers(model))
    if not layers:
        raise UsageError(f"{type(model).__name__} has no layers of prepare_qat; pass the model that it returned.")
    for name, layer in layers.items():
        if temperature and not has_soft_rounding(layer.format):
            raise RecipeError(
                f"The format {layer.format.name!r} of {name!r} has no levels of single weights between which it "
                "could round softly; leave the temperature at 0."
            )
    for layer in layers.values():
        layer.temperature = float(temperature)


@checked_arguments("model", "tokenizer")
def convert_qat(
    model: Model, out: str | Path | None = None, *, tokenizer: Any = None, overwrite: bool = False
) -> Model:
    """Replace the trained layers of `prepare_qat` by packed ones, and write the model into a folder.

    The packed model computes what the trained one computes in evaluation mode, bit by bit.

    Args:
        model: a model of `prepare_qat`, changed in place; unwrap it first where accelerate wrapped it.
        out: the folder; `bitmill.load` and transformers' from_pretrained read it. None writes nothing.
        tokenizer: written into the folder with the model.
        overwrite: replace a folder that bitmill wrote.

    Returns:
        The packed model.

    Raises:
        UsageError: the model is none of `prepare_qat`, or cannot be written since it is none of transformers.
        NumericsError: a weight or scale is NaN or infinite.
        OutputError: the folder exists.
    """
    from transformers import PreTrainedModel

    from bitmill.integrations.transformers_quantizer import mark_quantized

    _check_live(model)
    layers = dict(fake_quant_layers(model))
    if not layers or _RECIPE not in vars(model):
        raise UsageError(f"{type(model).__name__} has no layers of prepare_qat; pass the model that it returned.")
    place = None
    if out is not None:
        if not isinstance(model, PreTrainedModel):
            raise UsageError(
                f"{type(model).__name__} is no model of transformers, so no folder of it could be loaded again; "
                "leave out=... away, and save the state_dict of the packed model."
            )
        place = user_path(out)
        check_output(place, overwrite)
    for name, layer in layers.items():
        _check_finite(name, layer)
    for name, layer in layers.items():
        _replace(model, name, layer.quant_linear())
    model.eval()
    formats = {name: layer.format for name, layer in layers.items()}
    mark_quantized(model, quantization_config(formats, vars(model).pop(_RECIPE)))
    if place is not None:
        assert isinstance(model, PreTrainedModel)
        model.save_pretrained(place)
        if tokenizer is not None:
            tokenizer.save_pretrained(place)
    return model


def _check_live(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise UsageError(f"model is {quoted(model)}; pass a live model, such as from_pretrained returns.")


def _schemes(model: nn.Module, recipe: Recipe) -> dict[str, LayerScheme]:
    """Return the scheme of every layer that is to be replaced, by path."""
    from transformers import PreTrainedModel

    if isinstance(model, PreTrainedModel):
        found = resolve_recipe(recipe, StreamedModel(ModuleSource(model))).schemes
    else:
        names = [name for name, module in model.named_modules() if _trains(module) and name]
        found = {name: recipe.scheme(name) for name in names}
    schemes = {name: scheme for name, scheme in found.items() if scheme is not None}
    if not schemes:
        raise UsageError(f"{type(model).__name__} has no linear layer that the recipe {recipe.name!r} quantizes.")
    return schemes


def _check(recipe: Recipe, scheme: LayerScheme, calibrated: bool) -> None:
    """Raise RecipeError for what cannot be trained so."""
    if recipe.attention is not None or recipe.tuners or scheme.seam_transforms or scheme.format.shared:
        raise RecipeError(
            f"The recipe {recipe.name!r} does more than to round the weights and inputs of layers (attention, "
            "tuners, scales between layers, shared codebooks); train with another one, such as rtn."
        )
    missing = scheme.needs - (_CALIBRATED if calibrated else frozenset())
    if missing & _CALIBRATED:
        raise RecipeError(
            f"The recipe {recipe.name!r} needs calibration text or pictures ({', '.join(sorted(missing))}); pass "
            "batches of inputs as calib=..., or use a method without, such as rtn, hqq or nf4."
        )
    if missing:
        raise RecipeError(
            f"The recipe {recipe.name!r} needs {', '.join(sorted(missing))} of the model's loss or float inputs, "
            "which training does not collect; use another method, such as gptq, rtn or hqq."
        )


def _statistics(
    model: nn.Module, schemes: Mapping[str, LayerScheme], batches: Sequence[Tensor | Mapping[str, Any]] | None
) -> dict[str, Statistics]:
    """Return the statistics of every layer that is to be replaced; empty ones where no scheme needs any."""
    if batches is None:
        return {name: Statistics() for name in schemes}
    sound = isinstance(batches, Sequence) and all(isinstance(batch, Tensor | Mapping) for batch in batches)
    if not sound or not batches:
        raise UsageError(f"calib is {quoted(batches)}; pass a list of batches, tensors or keywords of the model.")
    needed = [name for name, scheme in schemes.items() if scheme.needs]
    try:
        with eval_mode(model):
            found = input_statistics(model, needed, batches)
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        raise UsageError(
            f"{type(model).__name__} cannot run on a batch of calib ({one_line(error)}); pass what its forward "
            "takes."
        ) from None
    for name in needed:
        if not found[name].tokens:
            raise UsageError(
                f"The layer {name!r} did not run on calib; keep it in float with rules=['{name}=float']."
            )
    return {name: found.get(name, Statistics()) for name in schemes}


def _trains(module: nn.Module) -> bool:
    """Return True for a layer of a module without config that is replaced."""
    return isinstance(module, nn.Linear) or unfolds(module)


def _layer(model: nn.Module, name: str, scheme: LayerScheme, statistics: Statistics) -> FakeQuantLinear:
    """Return the trainable layer for a linear, on its device."""
    linear = model.get_submodule(name)
    W = weight_of(linear)
    if W.is_meta:
        raise SourceError(f"The weight of {name!r} has no data (device 'meta'); load the weights first.")
    with torch.no_grad():
        start = solve(scheme.solver, W, statistics, scheme.format)
    return FakeQuantConv2d(linear, start) if isinstance(linear, nn.Conv2d) else FakeQuantLinear(linear, start)


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    path, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(path), leaf, module)


def _check_finite(name: str, layer: FakeQuantLinear) -> None:
    for part, tensor in layer.named_parameters():
        if not bool(torch.isfinite(tensor).all()):
            raise NumericsError(
                f"The {part} of {name!r} holds NaN or Inf after training; train with a lower learning rate, or "
                "clip gradients."
            )
