"""The description of an architecture as data.

An adapter lists the blocks of a model, the linear layers of a block in the order in which they run, the places
where a channel scale and its inverse cancel (seams), and the layers that serving engines fuse. Adapters name no
quantization method, and methods name no architecture.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from bitmill.architectures.model_class import task_of_class
from bitmill.config.registry import Registry
from bitmill.errors import SourceError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import nn


@dataclass(frozen=True)
class Seam:
    """A place in a block where channel c may be divided by s[c] at the source and multiplied by it at the targets.

    kind: "norm" (the source is a norm with one weight per channel, and only the targets read its output) or
        "linear" (the source is a linear layer whose output channel c reaches input channel c of the targets
        through a positively homogeneous map alone).
    source: path inside the block of the module whose output channels may be divided (bias included); with a `*` in
        it and in the targets it stands for the layers inside the block.
    targets: paths inside the block of the linear layers that read it. A target may read more channels than the
        source has: with grouped queries every head of v is repeated heads / kv_heads times, head by head.
    norm_plus_one: the norm multiplies by (1 + weight), as in Gemma.
    when: (config attribute, value) pairs that must all hold for the seam to be exact.
    heads: number of key-value heads, which `adapter_for` sets from the config; 1 where heads are not repeated.
    """

    kind: str
    source: str
    targets: tuple[str, ...]
    norm_plus_one: bool = False
    when: tuple[tuple[str, object], ...] = ()
    heads: int = 1


@dataclass(frozen=True)
class Adapter:
    """The description of one architecture.

    Paths are relative to a block, except those of blocks, embeddings and head.

    model_types: values of `config.model_type` that it describes.
    blocks: path of the nn.ModuleList of blocks; of an encoder-decoder, of those of the decoder.
    encoder: path of the nn.ModuleList of the encoder's blocks, whose output the decoder reads; "" without one.
    stages: linear layers of a block in true-sequential order; those in one tuple read one tensor.
    fused: groups of linear layers that serving engines merge into one matrix, so that they must share a format.
    embeddings: paths of the embedding modules; the first one embeds tokens.
    head: path of the module that turns hidden states into logits; "" where there is none.
    transposed: weights are stored (in, out), as in the Conv1D of GPT-2.
    task: name in `bitmill.tasks` of how the model reads text and is measured.
    head_class: end of the name of the model's class, in `config.architectures`, that the adapter describes; "" for
        any class that no other adapter describes.
    optional: (linear layer, config attribute) pairs: the blocks have the layer only where the attribute is set.
    recurrent: some linear layers run once for each token, on outputs of their own block.
    inferred: the linear layers are those of the module tree, see `with_layers_of`, and may differ between blocks;
        their order and the use of embeddings and head are unknown.
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
    head_class: str = ""
    optional: tuple[tuple[str, str], ...] = ()
    recurrent: bool = False
    encoder: str = ""

    @property
    def stacks(self) -> tuple[str, ...]:
        """The paths of all lists of blocks, in the order in which they run."""
        return (self.encoder, self.blocks) if self.encoder else (self.blocks,)

    def describes(self, model_type: Any, classes: Any) -> bool:
        """Return True for a model of one of these types and classes.

        Args:
            model_type: of a config.
            classes: `architectures` of the config; None where it names none.
        """
        named = [name for name in classes if isinstance(name, str)] if isinstance(classes, list) else []
        return model_type in self.model_types and (
            not self.head_class or any(name.endswith(self.head_class) for name in named)
        )

    @property
    def linears(self) -> tuple[str, ...]:
        """All linear layers of a block, in stage order."""
        return tuple(name for stage in self.stages for name in stage)


ADAPTERS: Registry[Adapter] = Registry("architecture", "bitmill.architectures.adapters")


def register(adapter: Adapter) -> Adapter:
    """Register an adapter under its name, and return it."""
    return ADAPTERS.register(adapter.name)(adapter)


def adapter_for(config: Any) -> Adapter | None:
    """Return the adapter of a config's `model_type`, with the layers and the seams of this config.

    Args:
        config: a transformers config, the dict of a config.json, or None.

    Returns:
        None where no adapter describes the model type with the task of its class; `generic_adapter` may describe
        the model.
    """
    get = config.get if isinstance(config, dict) else partial(_attribute, config)
    model_type = get("model_type")
    classes = get("architectures")
    task = named_task(config)
    for _, adapter in sorted(ADAPTERS.items(), key=lambda item: not item[1].head_class):  # the special ones first
        if adapter.describes(model_type, classes) and task in (None, adapter.task):
            exact = tuple(s for s in adapter.seams if all(get(k) == v for k, v in s.when))
            heads = get("num_key_value_heads") or 1
            absent = {linear for linear, attribute in adapter.optional if not get(attribute)}
            stages = (tuple(name for name in stage if name not in absent) for stage in adapter.stages)
            return replace(
                adapter,
                seams=tuple(replace(seam, heads=heads) for seam in exact),
                stages=tuple(stage for stage in stages if stage),
            )
    return None


def named_task(config: Any) -> str | None:
    """Return the task of the class that a config names; None where it names none that transformers groups so.

    Args:
        config: a transformers config, the dict of a config.json, or None.
    """
    get = config.get if isinstance(config, dict) else partial(_attribute, config)
    return task_of_class(get("architectures"), bool(get("is_encoder_decoder")))


def with_layers_of(adapter: Adapter, blocks: nn.ModuleList) -> Adapter:
    """Return an adapter that lists no linear layers with those of the blocks, each a stage of its own.

    Args:
        adapter: one that lists them is returned as it is.
        blocks: of the model.
    """
    if adapter.stages:
        return adapter
    linears = tuple(dict.fromkeys(name for block in blocks for name in _linears(block)))
    seams: list[Seam] = []
    for seam in adapter.seams:
        before, star, _ = seam.source.partition("*")
        inside = [name.removeprefix(before).partition(".")[0] for name in linears if name.startswith(before)]
        for layer in dict.fromkeys(inside) if star else [""]:
            targets = tuple(target.replace("*", layer) for target in seam.targets)
            seams.append(replace(seam, source=seam.source.replace("*", layer), targets=targets))
    return replace(adapter, stages=tuple((name,) for name in linears), seams=tuple(seams))


def _attribute(config: Any, name: str) -> Any:
    """Return an attribute of a config, None where it has no such attribute."""
    return getattr(config, name, None)


def generic_adapter(model: nn.Module, config: Any = None) -> Adapter:
    """Infer the adapter of an architecture without one from its modules.

    The blocks are the longest outermost nn.ModuleList whose members all hold nn.Linear. Every
    linear layer is a stage of its own, in module order, and there are no seams, so nothing is assumed about the
    data flow. Blocks may have different layers, as where the first blocks of a mixture of experts are dense. The
    routers of experts stay in float, as do parameters that belong to no linear layer. A model of an encoder and a
    decoder has blocks in both.

    Args:
        model: the model, with experts as linear layers; parameters may be on the meta device.
        config: its transformers config, which names the model type.

    Raises:
        SourceError: There are no such blocks.
    """
    from torch import nn

    decoder = _path_of(model, "get_decoder")
    path, blocks = _longest_blocks(model, decoder)
    encoder, before = "", nn.ModuleList()
    if getattr(config, "is_encoder_decoder", False) and decoder and (inside := _path_of(model, "get_encoder")):
        encoder, before = _longest_blocks(model, inside)
    linears = tuple(dict.fromkeys(name for block in (*before, *blocks) for name in _linears(block)))
    stacks = tuple(f"{stack}." for stack in (encoder, path) if stack)
    non_block = [(n, m) for n, m in model.named_modules() if n and not n.startswith(stacks)]
    heads = [n for n, m in non_block if isinstance(m, nn.Linear)]
    model_type = getattr(config, "model_type", None) or type(model).__name__
    return Adapter(
        name=f"generic:{model_type}",
        model_types=(model_type,),
        blocks=path,
        stages=tuple((name,) for name in linears),
        fused=(),
        seams=(),
        embeddings=tuple(n for n, m in non_block if isinstance(m, nn.Embedding)),
        head=heads[-1] if heads else "",
        inferred=True,
        encoder=encoder,
    )


def _linears(block: nn.Module) -> Iterator[str]:
    """Yield the paths of the linear layers of a block, without routers."""
    from torch import nn

    from bitmill.architectures.experts import ExpertLinears  # needs torch, which a list of models does not

    experts = {  # path of the module around the experts -> their number
        name.rpartition(".")[0].rpartition(".")[0]: len(module)
        for name, module in block.named_modules()
        if isinstance(module, ExpertLinears)
    }
    for name, module in block.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        around = name.rpartition(".")[0]
        if around not in experts and experts.get(around.rpartition(".")[0]) != module.out_features:
            yield name


def _longest_blocks(model: nn.Module, part: str) -> tuple[str, nn.ModuleList]:
    """Return path and list of the blocks, of those of a part where it has any.

    Args:
        model: the model.
        part: path of the decoder, however many blocks other parts have, or of the encoder; "" where there is none.

    Raises:
        SourceError: no list qualifies.
    """
    lists = list(_outermost_lists(model))
    qualified = [(path, module) for path, module in lists if _are_blocks(module)]
    best = max(
        [found for found in qualified if found[0].startswith(f"{part}.")] or qualified,
        key=lambda found: len(found[1]),
        default=None,
    )
    if best is None:
        named = [f"{path or '(root)'} ({len(m)})" for path, m in lists]
        found = f"its lists are {', '.join(named)}" if named else "it has no nn.ModuleList"
        raise SourceError(
            f"{type(model).__name__} has no list of blocks that all hold nn.Linear ({found}); "
            "write an adapter for this architecture."
        )
    return best


def _are_blocks(modules: nn.ModuleList) -> bool:
    """Return True if all members hold linear layers, and none is such a layer itself."""
    from torch import nn

    return all(
        not isinstance(member, nn.Linear) and any(isinstance(m, nn.Linear) for m in member.modules())
        for member in modules
    )


def _path_of(model: nn.Module, getter: str) -> str:
    """Return the path of the encoder or decoder that a method of transformers returns; "" where it names none."""
    try:
        part = getattr(model, getter)()
    except (AttributeError, TypeError, ValueError, NotImplementedError):
        return ""
    return next((path for path, module in model.named_modules() if module is part), "")


def _outermost_lists(module: nn.Module, path: str = "") -> Iterator[tuple[str, nn.ModuleList]]:
    """Yield path and module of every non-empty ModuleList that is not inside another one, as experts are."""
    from torch import nn

    if isinstance(module, nn.ModuleList) and len(module):
        yield path, module
        return
    for name, child in module.named_children():
        yield from _outermost_lists(child, f"{path}.{name}" if path else name)
