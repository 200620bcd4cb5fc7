"""The tensors of a source by their names in the model, matched as transformers does when it loads the model.

transformers renames stored tensors, adds or removes the prefix of the base model, and splits, merges or permutes
tensors of some architectures. Its own functions do so here, so that the float model is the one that
`from_pretrained` gives.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from bitmill.architectures.experts import ExpertLinears
from bitmill.errors import SourceError

if TYPE_CHECKING:
    from bitmill.sources.base import Source

# Buffers that models no longer store, also where their class does not list them.
IGNORED = (r"rotary_emb\.(inv_freq|cos_cached|sin_cached)$", r"(^|\.)position_ids$", r"\.masked_bias$")

COMPARED_ROWS = 4096  # of tensors of different types, at a time


@dataclass(frozen=True)
class _Entry:
    """The stored tensors from which one tensor of the model is made.

    stored: their names in the source, with the pattern of the converter that each one matched.
    converter: the WeightConverter of transformers that makes it; None where it is stored as it is.
    first: the name of the first tensor that the converter makes.
    shape: shape in the model.
    expert: number of the expert whose matrix it is of the fused tensor `fused`; None for any other tensor.
    transposed: the fused tensor is (experts, in, out).
    """

    stored: tuple[tuple[str, str], ...]
    converter: Any
    first: str
    shape: tuple[int, ...]
    fused: str = ""
    expert: int | None = None
    transposed: bool = False


class StoredTensors:
    """Name in the model -> stored tensor.

    Args:
        model: the model; parameters may be on the meta device.
        source: where the tensors are stored.

    Raises:
        SourceError: the source holds a tensor that the model does not use but that belongs to a part of the model,
            or one in integers where the model has floating-point weights.
    """

    def __init__(self, model: nn.Module, source: Source) -> None:
        self._model, self._source = model, source
        self._experts = {
            path: len(module) for path, module in model.named_modules() if isinstance(module, ExpertLinears)
        }
        self._fused: tuple[str, Tensor] = "", torch.empty(0)  # the fused tensor that was read last
        self._entries, unused = _match(model, source)
        self.unused = self._check_unused(unused)
        self._check_types()

    def names(self) -> list[str]:
        """Return the sorted names in the model of all stored tensors."""
        return sorted(self._entries)

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor, without reading it. Raises SourceError for an unknown name."""
        return self._lookup(name).shape

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype of a tensor, without reading it."""
        return self._source.dtype(self._lookup(name).stored[0][0])

    def tensor(self, name: str) -> Tensor:
        """Read a tensor in its stored dtype."""
        entry = self._lookup(name)
        if entry.expert is None:
            return self._read(name, entry)
        if entry.fused == self._fused[0]:
            fused, expert = self._fused[1], entry.expert
        elif (own := _of_expert(entry.stored, entry.expert, self._experts[entry.fused])) is not None:
            fused, expert = self._read(entry.fused, replace(entry, stored=own)), 0
        else:
            fused, expert = self._read(entry.fused, entry), entry.expert
            self._fused = entry.fused, fused  # its other experts are read next
        return (fused[expert].T if entry.transposed else fused[expert]).contiguous()

    def _read(self, name: str, entry: _Entry) -> Tensor:
        """Read a tensor of the model as transformers loads it."""
        if entry.converter is None:
            return self._source.tensor(entry.stored[0][0])
        parts = [(pattern, stored, self._source.tensor(stored)) for stored, pattern in entry.stored]
        return _convert(entry.converter, entry.first, parts, self._model)[name].contiguous()

    def parts(self, name: str) -> tuple[str, ...]:
        """Return the names in the source of what one tensor is made of; of an expert those of its own matrices."""
        entry = self._lookup(name)
        own = None
        if entry.expert is not None:
            own = _of_expert(entry.stored, entry.expert, self._experts[entry.fused])
        return tuple(stored for stored, _ in own or entry.stored)

    def forget(self, name: str) -> None:
        """Leave out a tensor that is stored a second time under the name of a tied one."""
        del self._entries[name]

    def _lookup(self, name: str) -> _Entry:
        try:
            return self._entries[name]
        except KeyError:
            raise SourceError(f"The model {self._source.name!r} has no tensor {name!r}.") from None

    def _check_unused(self, names: list[str]) -> list[str]:
        """Return the tensors of whole modules that the model lacks. Raises SourceError for other unused ones."""
        model = self._model
        patterns = [*IGNORED, *(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ())]
        ignored = re.compile("|".join(f"({pattern})" for pattern in patterns))
        buffers = {name for name, _ in model.named_buffers(remove_duplicate=False)}
        unused = [name for name in names if name not in buffers and not ignored.search(name)]
        modules = {name for name, _ in model.named_modules(remove_duplicate=False)}
        base = getattr(model, "base_model_prefix", "")
        for name in unused:
            spellings = (name, f"{base}.{name}", name.removeprefix(f"{base}."))
            owners = {_ancestor(spelling, modules) for spelling in spellings} - {"", base}
            if owners:
                too_few = isinstance(model.get_submodule(min(owners)), nn.ModuleList)
                reason = "its config.json has too few blocks" if too_few else "it is quantized already"
                raise SourceError(
                    f"{self._source.name} stores {name!r}, which {type(model).__name__} does not use: {reason}, "
                    "or its config.json is that of another model; give the float model."
                )
        return unused

    def _check_types(self) -> None:
        """Raise SourceError for a weight in integers, which are codes and not the weight itself."""
        floats = {n for n, p in self._model.named_parameters(remove_duplicate=False) if p.is_floating_point()}
        for name in self._entries:
            if name in floats and not (dtype := self.dtype(name)).is_floating_point:
                raise SourceError(
                    f"{self._source.name} stores {name!r} as {str(dtype).removeprefix('torch.')}: it is quantized "
                    "already; give the float model."
                )


def _ancestor(name: str, modules: set[str]) -> str:
    """Return the innermost module of the model that would hold a tensor."""
    while name and name not in modules:
        name = name.rpartition(".")[0]
    return name


def tie_as_stored(model: nn.Module, stored: StoredTensors) -> bool:
    """Tie the parameters that the config ties, except those that are stored separately with different values.

    Args:
        model: the model, with parameters on the meta device.
        stored: its stored tensors; one that equals the tensor that it is tied to is left out of them.

    Returns:
        True where parameters stay separate although the config ties them, as in transformers.
    """
    if not hasattr(model, "tie_weights"):
        return False
    model.tie_weights()  # type: ignore[operator]
    apart = False
    # not the attribute that a loaded model keeps, because that one omits what it found apart
    ties = getattr(model, "get_expanded_tied_weights_keys", None)
    for name, origin in (ties(all_submodels=True) if ties else {}).items():
        if name not in stored or origin not in stored:
            continue
        if _equal(stored.tensor(name), stored.tensor(origin)):
            stored.forget(name)
            continue
        path, _, leaf = name.rpartition(".")
        parameter = model.get_parameter(name)
        setattr(model.get_submodule(path), leaf, nn.Parameter(torch.empty_like(parameter), requires_grad=False))
        getattr(model, "all_tied_weights_keys", {}).pop(name, None)
        apart = True
    return apart


def _equal(a: Tensor, b: Tensor) -> bool:
    """Return True if two tensors, also of different types, hold equal values."""
    if a.shape != b.shape:
        return False
    if a.dtype == b.dtype:
        return torch.equal(a, b)
    return all(torch.equal(x.float(), y.float()) for x, y in zip(a.split(COMPARED_ROWS), b.split(COMPARED_ROWS)))


def _match(model: nn.Module, source: Source) -> tuple[dict[str, _Entry], list[str]]:
    """Return name in the model -> stored tensors, and the stored tensors that the model does not have.

    Raises:
        SourceError: a stored tensor cannot be converted, or two are stored for one name.
    """
    split = {path: module for path, module in model.named_modules() if isinstance(module, ExpertLinears)}
    expected = dict(model.state_dict(keep_vars=True))
    expected |= {path: torch.empty(module.shape, device="meta") for path, module in split.items()}
    renamings, converters = _conversions(model) if source.as_saved else ([], [])
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    entries: dict[str, _Entry] = {}
    unused: list[str] = []
    grouped: dict[str, list[tuple[str, str]]] = {}
    for stored in sorted(source.names(), key=_natural_key):
        name, pattern = stored, None
        if source.as_saved:
            name, pattern = _renamed(model, stored, renamings, converters, expected)
        if name not in expected:
            if not _is_causal_mask(source, stored):
                unused.append(name)
        elif pattern is None:
            if name in entries:
                raise SourceError(
                    f"{source.name} stores {name!r} twice, as {entries[name].stored[0][0]!r} and {stored!r}; "
                    "remove one."
                )
            entries[name] = _Entry(((stored, ""),), None, name, source.shape(stored))
        else:
            grouped.setdefault(name, []).append((stored, pattern))
    for first, members in grouped.items():
        converter = by_pattern[members[0][1]]
        parts = [(pattern, s, torch.empty(source.shape(s), device="meta")) for s, pattern in members]
        try:
            made = _convert(converter, first, parts, model)
        except Exception as error:
            raise SourceError(
                f"The tensor {members[0][0]!r} of {source.name} cannot be converted as transformers does "
                f"({type(error).__name__}: {error}); fetch the model again."
            ) from error
        for name, tensor in made.items():
            entries[name] = _Entry(tuple(members), converter, first, tuple(tensor.shape))
    for path, experts in split.items():
        if path in entries:
            entries |= _expert_entries(path, entries.pop(path), experts)
    return entries, unused


def _expert_entries(path: str, entry: _Entry, experts: ExpertLinears) -> dict[str, _Entry]:
    """Return the matrix of every expert of a fused tensor. Raises SourceError for the shape of another model."""
    if entry.shape != tuple(experts.shape):
        raise SourceError(
            f"The tensor {path!r} has shape {entry.shape}, but the config of the model requires "
            f"{tuple(experts.shape)}."
        )
    shape = entry.shape[:0:-1] if experts.transposed else entry.shape[1:]
    return {
        f"{path}.expert{number}.weight": replace(
            entry, shape=shape, fused=path, expert=number, transposed=experts.transposed
        )
        for number in range(len(experts))
    }


def _of_expert(
    stored: tuple[tuple[str, str], ...], expert: int, experts: int
) -> tuple[tuple[str, str], ...] | None:
    """Return the stored tensors of one expert, where each has its own; None where they are fused."""
    by_pattern: dict[str, list[tuple[str, str]]] = {}
    for member in stored:
        by_pattern.setdefault(member[1], []).append(member)
    if experts == 1 or any(len(members) != experts for members in by_pattern.values()):
        return None
    return tuple(members[expert] for members in by_pattern.values())


def _is_causal_mask(source: Source, name: str) -> bool:
    """Return True for a mask (1, 1, tokens, tokens), which earlier models stored in every block."""
    shape = tuple(source.shape(name))
    square = len(shape) == 4 and shape[:2] == (1, 1) and shape[2] == shape[3]
    return square and source.dtype(name) in (torch.bool, torch.uint8)


def renamed_layers(model: nn.Module, layers: Collection[str]) -> dict[str, str]:
    """Return layer in a checkpoint -> layer in the model, as transformers renames its weight.

    Args:
        model: the float model.
        layers: paths of layers, by the names of this or of an earlier release of transformers.
    """
    modules = {name for name, _ in model.named_modules(remove_duplicate=False)}
    renamings = [] if modules.issuperset(layers) else _conversions(model)[0]
    names = {}
    for layer in layers:
        weight = f"{layer}.weight"
        for renaming in renamings if layer not in modules else ():
            weight, _ = renaming.rename_source_key(weight)
        names[layer] = weight.removesuffix(".weight")
    return names


def moved_on_load(model: nn.Module, names: Iterable[str]) -> str | None:
    """Return a name that transformers would change if a checkpoint had it; None without one."""
    expected, (renamings, converters) = dict(model.state_dict(keep_vars=True)), _conversions(model)
    for name in names:
        new, pattern = _renamed(model, name, renamings, converters, expected)
        if pattern is not None or new != name:
            return name
    return None


def _convert(
    converter: Any, first: str, parts: list[tuple[str, str, Tensor]], model: nn.Module
) -> dict[str, Tensor]:
    """Return the tensors that a converter makes of stored ones, given as (pattern, name, tensor)."""
    one = copy.deepcopy(converter)
    for pattern, stored, tensor in parts:
        one.add_tensor(first, stored, pattern, tensor)
    made = one.convert(first, model=model, config=model.config)
    return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}


def _conversions(model: nn.Module) -> tuple[list[Any], list[Any]]:
    """Return the renamings and the converters that transformers applies to the names of a checkpoint."""
    from transformers import PreTrainedModel
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter

    if not isinstance(model, PreTrainedModel):
        return [], []
    mapping = get_model_conversion_mapping(model)
    return (
        [entry for entry in mapping if not isinstance(entry, WeightConverter)],
        [entry for entry in mapping if isinstance(entry, WeightConverter)],
    )


def _renamed(
    model: nn.Module, stored: str, renamings: list[Any], converters: list[Any], expected: dict[str, Tensor]
) -> tuple[str, str | None]:
    """Return the name in the model of a stored tensor, and the pattern of the converter that matched it."""
    prefix = getattr(model, "base_model_prefix", None)
    if prefix is None:
        return stored, None
    from transformers.core_model_loading import rename_source_key

    name, pattern = rename_source_key(stored, renamings, converters, prefix, expected)
    if name not in expected and stored in expected:
        name, pattern = rename_source_key(stored, [], [], base_model_prefix=prefix, meta_state_dict=expected)
    return name, pattern


def _natural_key(name: str) -> list[tuple[int, int, str]]:
    """Return a key by which numbers in names sort as numbers: experts are merged in this order."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in name.split(".")]
