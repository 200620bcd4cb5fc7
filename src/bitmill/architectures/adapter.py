"""What bitmill knows about an architecture, as data.

An adapter lists the blocks of a model, the linears of a block in the order in which they run, the places
where a channel scale and its inverse cancel (seams), and what serving engines fuse. Adapters name no
method; methods name no architecture.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from bitmill.config.registry import Registry
from bitmill.errors import SourceError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import nn


@dataclass(frozen=True)
class Seam:
    """A place in a block where channel c may be divided by s[c] at the source and multiplied at the targets.

    kind: "norm" (the source is a norm with a weight per channel, all of whose readers are the targets) or
        "linear" (the source is a linear whose output channel c reaches input channel c of the targets
        through nothing but a positively homogeneous map).
    source: path of the module inside the block whose output channels may be divided (bias included).
    targets: paths of the linears inside the block that read it. A target may read more channels than the
        source has: with grouped queries every head of v is repeated heads / kv_heads times, head by head.
    norm_plus_one: the norm multiplies by (1 + weight), as Gemma's does.
    when: (config attribute, value) pairs that must all hold for the seam to be exact.
    heads: kv_heads, where they are repeated; `adapter_for` reads it off the config.
    """

    kind: str
    source: str
    targets: tuple[str, ...]
    norm_plus_one: bool = False
    when: tuple[tuple[str, object], ...] = ()
    heads: int = 1


@dataclass(frozen=True)
class Adapter:
    """The description of one architecture; all paths but `blocks`, `embeddings`, `head` are relative to a block.

    model_types: the values of `config.model_type` it describes.
    blocks: path of the nn.ModuleList of blocks.
    stages: the linears of a block in true-sequential order; those in one tuple read the same tensor.
    fused: linears that serving engines merge into one matrix, which must share a bit width.
    head: path of what turns hidden states into logits; "" where there is none.
    transposed: weights are stored (in, out), as in GPT-2's Conv1D.
    task: name of the task in `bitmill.tasks` that says how the model reads text and is measured.
    inferred: made by `generic_adapter` from the module tree: the order of the linears, and what the embeddings and
        the head are used for, are not known.
    """

    name: str
    model_types: tuple[str, ...]
    blocks: str
    stages: tuple[tuple[str, ...], ...]
    fused: tuple[tuple[str, ...], ...]
    seams: tuple[Seam, ...]
    embeddings: tuple[str, ...]
    head: str = "lm_head"
    transposed: bool = False
    task: str = "causal_lm"
    inferred: bool = False

    @property
    def linears(self) -> tuple[str, ...]:
        """Every linear of a block, in stage order."""
        return tuple(name for stage in self.stages for name in stage)


ADAPTERS: Registry[Adapter] = Registry("architecture", "bitmill.architectures.adapters")


def register(adapter: Adapter) -> Adapter:
    """File an adapter under its name."""
    return ADAPTERS.register(adapter.name)(adapter)


def adapter_for(config: Any) -> Adapter | None:
    """Return the adapter of a config's `model_type`, with the seams that are exact under this config.

    Args:
        config: a transformers config, the dict of a config.json, or None.

    Returns:
        None where no adapter describes the model type; `generic_adapter` may describe the model.
    """
    get = config.get if isinstance(config, dict) else partial(_attribute, config)
    model_type = get("model_type")
    for _, adapter in ADAPTERS.items():
        if model_type in adapter.model_types:
            exact = tuple(s for s in adapter.seams if all(get(k) == v for k, v in s.when))
            heads = get("num_key_value_heads") or 1
            return replace(adapter, seams=tuple(replace(seam, heads=heads) for seam in exact))
    return None


def _attribute(config: Any, name: str) -> Any:
    return getattr(config, name, None)


def generic_adapter(model: nn.Module, config: Any = None) -> Adapter:
    """Describe an unknown architecture by looking at a built model (meta tensors suffice).

    The blocks are the longest outermost nn.ModuleList whose members share a class and all hold nn.Linear.
    Every linear is a stage of its own, in module order, and no seam is claimed, so nothing is assumed about
    data flow. Raises SourceError when there are no such blocks, when blocks differ in their linears, or when
    they hold weights fused over experts, which no walk over nn.Linear would reach.
    """
    from torch import nn

    path, blocks = _longest_blocks(model)
    for name, parameter in blocks.named_parameters():
        if parameter.dim() == 3 and not isinstance(_owner(blocks, name), nn.modules.conv._ConvNd):
            raise SourceError(
                f"Blocks {path!r} hold the fused expert weight {name!r} of shape {tuple(parameter.shape)}; "
                "mixture-of-experts weights cannot be quantized yet; choose a dense model."
            )
    per_block = [tuple(n for n, m in block.named_modules() if isinstance(m, nn.Linear)) for block in blocks]
    for index, names in enumerate(per_block):
        if names != per_block[0]:
            odd = sorted(set(names) ^ set(per_block[0]))
            raise SourceError(
                f"Block {index} of {path!r} differs from block 0 in {', '.join(odd)}, "
                "so a generic adapter cannot describe them; write an adapter for this architecture."
            )
    outside = [(n, m) for n, m in model.named_modules() if n and not n.startswith(f"{path}.")]
    heads = [n for n, m in outside if isinstance(m, nn.Linear)]
    model_type = getattr(config, "model_type", None) or type(model).__name__
    return Adapter(
        name=f"generic:{model_type}",
        model_types=(model_type,),
        blocks=path,
        stages=tuple((name,) for name in per_block[0]),
        fused=(),
        seams=(),
        embeddings=tuple(n for n, m in outside if isinstance(m, nn.Embedding)),
        head=heads[-1] if heads else "",
        inferred=True,
    )


def _longest_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    from torch import nn

    best: tuple[str, nn.ModuleList] | None = None
    for path, module in _outermost_lists(model):
        alike = len({type(member) for member in module}) == 1
        with_linears = all(any(isinstance(m, nn.Linear) for m in member.modules()) for member in module)
        if alike and with_linears and (best is None or len(module) > len(best[1])):
            best = (path, module)
    if best is None:
        lists = [f"{path or '(root)'} ({len(m)})" for path, m in _outermost_lists(model)]
        found = f"its lists are {', '.join(lists)}" if lists else "it has no nn.ModuleList"
        raise SourceError(
            f"{type(model).__name__} has no list of like blocks that all hold nn.Linear ({found}); "
            "write an adapter for this architecture."
        )
    return best


def _outermost_lists(module: nn.Module, path: str = "") -> Iterator[tuple[str, nn.ModuleList]]:
    """Non-empty ModuleLists that lie in no other one (the experts of a block are not its blocks)."""
    from torch import nn

    if isinstance(module, nn.ModuleList) and len(module):
        yield path, module
        return
    for name, child in module.named_children():
        yield from _outermost_lists(child, f"{path}.{name}" if path else name)


def _owner(module: nn.Module, parameter: str) -> nn.Module:
    return module.get_submodule(parameter.rpartition(".")[0])
