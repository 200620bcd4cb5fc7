"""A model of which only the part in use holds weights.

The module tree is built with parameters on the meta device; blocks, embeddings and head are filled from the
source when they are needed and emptied again. The model's own code runs: embeddings, masks, rotary angles
and the head are whatever transformers computes, and no architecture is spelled out here.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn

from bitmill.architectures.adapter import Adapter, Seam, adapter_for, generic_adapter
from bitmill.architectures.site import Site
from bitmill.errors import NumericsError, SourceError
from bitmill.models.block_call import BlockCall, BlockRecorder, StopForward, output_tensor
from bitmill.models.meta import empty_model, trim_malloc
from bitmill.sources.base import Source
from bitmill.tasks.base import task_of


class StreamedModel:
    """The meta model of `source`, its adapter, and loading on demand (fp32, on `device`)."""

    def __init__(self, source: Source, device: str = "cpu") -> None:
        self.source = source
        self.device = torch.device(device)
        self.model = empty_model(source).eval()
        if hasattr(self.model, "tie_weights"):
            self.model.tie_weights()  # type: ignore[operator]
        self.task = task_of(source)
        self.adapter: Adapter = adapter_for(source.config) or generic_adapter(self.model, source.config)
        try:
            blocks = self.model.get_submodule(self.adapter.blocks)
        except AttributeError:
            blocks = self.model
        if not isinstance(blocks, nn.ModuleList):
            raise SourceError(
                f"{type(self.model).__name__} has no blocks at {self.adapter.blocks!r}, where a model of its kind "
                f"({self.adapter.name}) keeps them; give the model that transformers loads as "
                f"{self.task.auto_class_name}."
            )
        self.blocks: nn.ModuleList = blocks
        self._stored = self._match_names()
        self._place_buffers()
        self._blocks_return_tuples: bool | None = None
        self._check_complete()

    # -- names --------------------------------------------------------------------------------------------

    def _match_names(self) -> dict[str, str]:
        """Name in the model -> name in the source; old checkpoints omit the base model's prefix."""
        known = {name for name, _ in self.model.named_parameters(remove_duplicate=False)}
        known |= {name for name, _ in self.model.named_buffers()}
        prefix = getattr(self.model, "base_model_prefix", "")
        stored = {}
        for name in self.source.names():
            full = name if name in known else f"{prefix}.{name}" if f"{prefix}.{name}" in known else name
            stored[full] = name
        return stored

    def names(self) -> list[str]:
        """Every stored tensor, by its name in the model; tensors the model does not know keep their own."""
        return sorted(self._stored)

    def stored_tensor(self, name: str) -> Tensor:
        """The tensor as the source holds it, in its stored type."""
        return self.source.tensor(self._stored[name])

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a stored tensor, without reading it."""
        return self.source.shape(self._stored[name])

    def dtype(self, name: str) -> torch.dtype:
        """Type of a stored tensor, without reading it."""
        return self.source.dtype(self._stored[name])

    def block_name(self, index: int) -> str:
        """The full name of a block."""
        return f"{self.adapter.blocks}.{index}"

    def block_tensors(self, index: int) -> list[str]:
        """The stored tensors of one block."""
        prefix = self.block_name(index) + "."
        return [name for name in self.names() if name.startswith(prefix)]

    def non_block_tensors(self) -> list[str]:
        """The stored tensors of no block: embeddings, final norm, head, and whatever else the source carries."""
        inside = tuple(self.block_name(i) + "." for i in range(len(self.blocks)))
        return [name for name in self.names() if not name.startswith(inside)]

    # -- sites --------------------------------------------------------------------------------------------

    def sites(self, index: int) -> tuple[Site, ...]:
        """Return the weights of block `index` that can be quantized, in stage order."""
        paths = [f"{self.block_name(index)}.{linear}.weight" for linear in self.adapter.linears]
        shapes = [self.shape(path) for path in paths]
        return tuple(
            Site(path, shape=shape[::-1] if self.adapter.transposed else shape)
            for path, shape in zip(paths, shapes)
        )

    def all_sites(self) -> tuple[Site, ...]:
        """Return the sites of all blocks in order; `embedding_and_head_sites` has those outside the blocks."""
        return tuple(site for index in range(len(self.blocks)) for site in self.sites(index))

    def fused_layers(self, index: int) -> tuple[tuple[str, ...], ...]:
        """Return the layers of block `index` that serving engines merge into one matrix, by full name."""
        prefix = self.block_name(index)
        return tuple(tuple(f"{prefix}.{name}" for name in group) for group in self.adapter.fused)

    def seams(self, index: int) -> tuple[Seam, ...]:
        """Return the seams of block `index` with full names of source and targets."""
        prefix = self.block_name(index)
        return tuple(
            replace(seam, source=f"{prefix}.{seam.source}", targets=tuple(f"{prefix}.{t}" for t in seam.targets))
            for seam in self.adapter.seams
        )

    def _check_complete(self) -> None:
        """Every parameter must have a source, or be tied to one that has, and every linear must be there."""
        owners: dict[int, str] = {}
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            if name in self._stored:
                owners[id(parameter)] = name
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            if id(parameter) not in owners:
                raise SourceError(f"{self.source.name} holds no tensor {name!r}, which its architecture needs.")
            owner = owners[id(parameter)]
            if tuple(parameter.shape) != self.shape(owner):
                raise SourceError(
                    f"The tensor {owner!r} has shape {self.shape(owner)}, but the config of "
                    f"{self.source.name} asks for {tuple(parameter.shape)}."
                )
        blocks = [self.block_name(index) for index in range(len(self.blocks))]
        for name in (f"{block}.{linear}.weight" for block in blocks for linear in self.adapter.linears):
            if name not in self._stored:
                raise SourceError(
                    f"{self.source.name} holds no tensor {name!r}: it is quantized already, or its adapter does "
                    "not describe it; give the float model."
                )

    # -- weights ------------------------------------------------------------------------------------------

    def load(self, names: list[str]) -> None:
        """Fill parameters and stored buffers from the source, fp32. Raises NumericsError on NaN or Inf."""
        for name in names:
            module, leaf = self._owner(name)
            if module is None:
                continue
            if leaf in module._parameters:
                self.set_parameter(name, self.finite_tensor(name))
            elif (old := module._buffers.get(leaf)) is not None and leaf not in module._non_persistent_buffers_set:
                kept = (
                    self.finite_tensor(name)
                    if old.is_floating_point()
                    else self.stored_tensor(name).to(self.device, old.dtype)
                )
                module._buffers[leaf] = kept.reshape(old.shape)

    def finite_tensor(self, name: str) -> Tensor:
        """A stored tensor in fp32. Raises NumericsError on NaN or Inf."""
        tensor = self.stored_tensor(name).to(self.device, torch.float32)
        # one pass without temporaries: a sum hides no NaN or Inf, though finite numbers may overflow it
        if not bool(torch.isfinite(tensor.sum())) and (bad := int((~torch.isfinite(tensor)).sum())):
            raise NumericsError(f"The weight {name!r} holds {bad} NaN or Inf values; the source is damaged.")
        return tensor

    def is_parameter(self, name: str) -> bool:
        """Whether a stored tensor is a parameter of the model; others travel along unused."""
        module, leaf = self._owner(name)
        return module is not None and leaf in module._parameters

    def set_parameter(self, name: str, tensor: Tensor) -> None:
        """Put a tensor in place of a parameter, and of every parameter tied to it."""
        module, leaf = self._owner(name)
        assert module is not None
        old = module._parameters[leaf]
        new = nn.Parameter(tensor, requires_grad=False)
        for owner in self.model.modules():
            for key, parameter in owner._parameters.items():
                if parameter is old and parameter is not None:
                    owner._parameters[key] = new

    def matrix(self, name: str) -> Tensor:
        """The weight of a linear in memory as (out, in)."""
        weight = self.model.get_parameter(name).data
        return weight.T.contiguous() if self.adapter.transposed else weight

    def set_matrix(self, name: str, W: Tensor) -> None:
        """Put W (out, in) in place of the weight of a linear."""
        self.set_parameter(name, (W.T if self.adapter.transposed else W).to(self.device).contiguous())

    def free(self, names: list[str]) -> None:
        """Empty these parameters."""
        for name in names:
            if self.is_parameter(name):
                self.set_parameter(name, torch.empty(self.shape(name), device="meta"))

    def load_block(self, index: int) -> nn.Module:
        """Fill one block and return it."""
        self.load(self.block_tensors(index))
        return self.blocks[index]

    def free_block(self, index: int) -> None:
        """Empty one block."""
        self.free(self.block_tensors(index))
        trim_malloc()

    def _owner(self, name: str) -> tuple[nn.Module | None, str]:
        path, _, leaf = name.rpartition(".")
        try:
            return self.model.get_submodule(path), leaf
        except AttributeError:
            return None, leaf

    def _place_buffers(self) -> None:
        for module in self.model.modules():
            for key, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[key] = buffer.to(self.device)

    # -- running ------------------------------------------------------------------------------------------

    @contextmanager
    def non_block_weights(self, side: Literal["both", "embedding", "head"] = "both") -> Iterator[None]:
        """Hold the tensors outside the blocks in memory (embeddings, final norm, head).

        side: "embedding" holds what `embed` needs, "head" what `head` needs. The table of token embeddings and
        the head are the largest tensors of most models; no more than one of them is held at a time.
        """
        names, unneeded = self.non_block_tensors(), self._unneeded(side)
        for name in unneeded if side == "embedding" else []:
            self.finite_tensor(name)  # a damaged head is refused now, and not after the last block
        self.load([name for name in names if name not in unneeded])
        try:
            yield
        finally:
            self.free(names)
            trim_malloc()

    def _unneeded(self, side: str) -> list[str]:
        """The stored tensors outside the blocks that one side can do without."""
        if side == "both" or self.adapter.inferred or not self.adapter.head:
            return []  # what a generic walk calls embeddings and head may be used anywhere
        table, head = (f"{path}.weight" for path in (self.adapter.embeddings[0], self.adapter.head))
        name = head if side == "embedding" else table
        tied = self.model.get_parameter(table) is self.model.get_parameter(head)
        return [name] if name in self._stored and not tied else []

    def embed(self, tokens: Tensor) -> tuple[Tensor, list[BlockCall]]:
        """What the first block receives for tokens (windows, length), and how each block is called.

        Needs the tensors outside the blocks in memory, those of the side "embedding".
        """
        if self._blocks_return_tuples is None:
            self._blocks_return_tuples = not self._passes_tensors(tokens[:1])
        recorders = self._run(tokens, self._blocks_return_tuples, stop=True)
        calls = [recorder.call for recorder in recorders]
        if recorders[0].hidden_in is None or any(call is None for call in calls):
            raise SourceError(f"{self.source.name}: the model's forward does not call its blocks in turn.")
        return recorders[0].hidden_in, [call for call in calls if call is not None]

    def head(self, tokens: Tensor, hidden: Tensor) -> Tensor:
        """Logits for the hidden states after the last block, or an encoder's final hidden states.

        Needs the tensors of the side "head".
        """
        with self._no_embeddings():
            recorders = self._run(tokens, bool(self._blocks_return_tuples), replacement=hidden, stop=False)
        assert recorders[0].output is not None
        return recorders[0].output

    @contextmanager
    def _no_embeddings(self) -> Iterator[None]:
        """Let a table of embeddings that holds no memory answer zeros: no block will look at them."""
        for name in self._unneeded("head"):
            table, width = self._owner(name)[0], self.shape(name)[1]
            if table is not None and self.model.get_parameter(name).is_meta:
                table.forward = lambda ids, width=width: torch.zeros(*ids.shape, width, device=self.device)
        try:
            yield
        finally:
            for name in self._unneeded("head"):
                vars(self._owner(name)[0]).pop("forward", None)

    def _passes_tensors(self, tokens: Tensor) -> bool:
        """Whether blocks exchange bare tensors (a model that expects tuples cuts the shape up)."""
        try:
            recorders = self._run(tokens, False, stop=True)
        except Exception:
            return False
        inputs = [recorder.hidden_in for recorder in recorders]
        first = inputs[0]
        return first is not None and all(x is not None and x.shape == first.shape for x in inputs)

    def _run(
        self, tokens: Tensor, as_tuple: bool, stop: bool, replacement: Tensor | None = None
    ) -> list[BlockRecorder]:
        recorders = [BlockRecorder(block, as_tuple) for block in self.blocks]
        recorders[-1].stop, recorders[-1].replacement = stop, replacement
        path, _, leaf = self.adapter.blocks.rpartition(".")
        parent = self.model.get_submodule(path)
        setattr(parent, leaf, nn.ModuleList(recorders))
        quiet = {"use_cache": False} if hasattr(self.source.config, "use_cache") else {}
        try:
            output = self.model(tokens.to(self.device), **quiet)
            recorders[0].output = output_tensor(output)
        except StopForward:
            pass
        finally:
            setattr(parent, leaf, self.blocks)
        return recorders
