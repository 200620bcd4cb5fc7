"""A trial of one block of each kind on a few tokens, which finds models that would not run packed."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from bitmill.errors import BitmillError, SourceError, one_line
from bitmill.models.kind import ADVICE
from bitmill.models.streamed import StreamedModel

TOKENS = 16
TOLERANCE = 1e-3  # relative, of hidden states that depend on the same tokens


@torch.no_grad()
def try_block_kinds(streamed: StreamedModel, layers: Collection[str], reads_text: bool = True) -> None:
    """Run the embedding and a block of each kind once, in float, on two windows that differ in their last token.

    Args:
        streamed: the model.
        layers: full names of the layers that will be packed.
        reads_text: False for a live module that is neither calibrated nor measured on text; it may need other
            inputs than tokens, and see all of them.

    Raises:
        SourceError: the model's code reads the weight of such a layer instead of calling it, the attention of a
            language model reads later tokens, or a block does not run on tokens alone.
    """
    try:
        read, outputs = _run_kinds(streamed, layers)
    except SourceError:
        if reads_text:
            raise
        return
    if read:
        layer = min(read)
        pattern = f"*.{streamed.stacks.relative_name(layer)}"
        raise SourceError(
            f"The code of {streamed.source.name} reads the weight of {layer!r} instead of calling the layer, so "
            f'it cannot be packed; leave such layers in float with --rule "{pattern}=float" '
            f'(rules=["{pattern}=float"]).'
        )
    if reads_text and streamed.task.generates and any(map(_depends_on_later, outputs)):
        raise SourceError(
            f"{streamed.source.name} is a {type(streamed.model).__name__}, whose attention reads the tokens to "
            f"come too; {ADVICE}."
        )


def leave_read_weights(streamed: StreamedModel) -> None:
    """Leave layers of a generic adapter in float whose weight the model's code reads instead of calling them.

    Where these are all layers, they are kept, and refused once the recipe is known.
    """
    if not streamed.adapter.inferred:
        return
    try:
        read, _ = _run_kinds(streamed, [site.layer for site in streamed.all_sites()])
    except SourceError:
        return  # raised again when the recipe is known, unless it calibrates and measures nothing
    paths = {streamed.stacks.relative_name(layer) for layer in read}
    if not paths.issuperset(streamed.adapter.linears):
        streamed.leave_out(paths)


@torch.no_grad()
def _run_kinds(streamed: StreamedModel, layers: Collection[str]) -> tuple[set[str], list[Tensor]]:
    """Run a block of each kind; blocks of a kind have linear layers at equal paths.

    Returns:
        The layers that would not run packed: whose weight was read by other code than their own forward, or whose
        class has another product than nn.Linear. And the output of each block on the embedded tokens; nothing
        for a model whose vocabulary is unknown.

    Raises:
        SourceError: a block does not run on tokens alone.
    """
    tokens = _tokens(streamed)
    if tokens is None:
        return set(), []
    kinds: dict[tuple[str, ...], int] = {}
    for index in range(len(streamed.blocks)):
        kinds.setdefault(streamed.linears(index), index)
    tried = tuple(f"{streamed.block_name(index)}." for index in kinds.values())
    inside = tuple(f"{path}." for path in streamed.stacks.paths)
    modules = dict(streamed.model.named_modules())
    watched = {
        name: modules[name]
        for name in layers
        if name in modules and (name.startswith(tried) or not name.startswith(inside))
    }
    read, outputs, index = set[str](), list[Tensor](), 0
    try:
        with streamed.non_block_weights("embedding"), _watch(watched, read):
            hidden, calls = streamed.embed(tokens)
            inputs = [hidden]
            for start in streamed.stacks.starts[1:]:
                hidden, calls[start:] = streamed.enter(start, tokens, hidden)
                inputs.append(hidden)
        for index in kinds.values():
            block = streamed.load_block(index)
            with _watch(watched, read):
                outputs.append(calls[index].run(block, inputs[streamed.stacks.stack_of(index)]))
            streamed.free_block(index)
    except (BitmillError, MemoryError):
        raise
    except Exception as error:  # the model's own code
        raise SourceError(
            f"Block {index} of {streamed.source.name} does not run on tokens alone ({one_line(error)}); {ADVICE}."
        ) from error
    finally:
        streamed.free_block(index)
    return read, outputs


def _tokens(streamed: StreamedModel) -> Tensor | None:
    """Return two windows that differ in their last token, if of text; None where the vocabulary is unknown."""
    if streamed.task.reads == "recordings":
        return torch.cat([streamed.task.example(streamed.source.config)] * 2)
    config = streamed.source.config.get_text_config()
    vocabulary = getattr(config, "vocab_size", None)
    if not isinstance(vocabulary, int) or vocabulary < 2:
        return None
    windows = ((vocabulary // 2 + torch.arange(TOKENS)) % vocabulary).repeat(2, 1)
    windows[1, -1] = windows[0, 0]
    return windows


def _depends_on_later(output: Tensor) -> bool:
    """Return True if hidden states before the last token differ between the two windows."""
    first, second = output[0, :-1].float(), output[1, :-1].float()
    if output.shape[1] != TOKENS or not bool(torch.isfinite(output).all()):
        return False  # several hidden states a token; or weights that are refused elsewhere
    return float((first - second).norm()) > TOLERANCE * float(first.norm())


@contextmanager
def _watch(modules: dict[str, nn.Module], read: set[str]) -> Iterator[None]:
    """Add the names of modules to `read` whose weight is read by other code than their own forward."""
    kinds = {name: type(module) for name, module in modules.items()}
    for name, module in modules.items():
        module.__class__ = _watched(kinds[name], name, read)
    try:
        yield
    finally:
        for name, module in modules.items():
            module.__class__ = kinds[name]


def _watched(kind: type[nn.Module], name: str, read: set[str]) -> type[nn.Module]:
    """Return a subclass that adds `name` to `read` when its weight is read outside its forward."""
    running: list[bool] = []
    get_type: Any = Tensor.dtype.__get__  # type: ignore[attr-defined]

    class WatchedWeight(Tensor):
        @classmethod
        def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func != get_type:  # packed layers have a type too
                read.add(name)
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))

    class Watched(kind):  # type: ignore[misc,valid-type]
        def __getattr__(self, attribute: str) -> Any:
            found = super().__getattr__(attribute)
            return found.as_subclass(WatchedWeight) if attribute == "weight" and not running else found

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            running.append(True)
            try:
                output = super().forward(*args, **kwargs)
                own = isinstance(self, nn.Linear) and kind.forward is not nn.Linear.forward
                if own and not _is_product(output, self, *args):
                    read.add(name)
                return output
            finally:
                running.pop()

    return Watched


def _is_product(output: Any, layer: nn.Linear, x: Any = None, *rest: Any) -> bool:
    """Return True if the output of a class derived from nn.Linear is the product that nn.Linear gives."""
    if not isinstance(x, Tensor) or not isinstance(output, Tensor) or x.shape[-1] != layer.in_features:
        return False
    expected = functional.linear(x, layer.weight, layer.bias)
    return output.shape == expected.shape and torch.allclose(output, expected, rtol=1e-4, atol=1e-5)
