"""A model whose weights are loaded block by block.

The model is built with parameters on the meta device; blocks, embeddings and head are loaded from the source when
they are needed and freed again. The model's own code runs: embeddings, masks, rotary angles and the head are those
of transformers, so no architecture is implemented here.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from math import prod
from typing import Literal

import torch
from torch import Tensor, nn

from bitmill.architectures.adapter import Adapter, Seam, adapter_for, generic_adapter, with_layers_of
from bitmill.architectures.inputs import unhook_inputs
from bitmill.architectures.site import Site
from bitmill.errors import NumericsError, SourceError
from bitmill.evaluation.logits import DeferredLogits, Output
from bitmill.models.block_call import (
    BlockCall,
    BlockRecorder,
    Path,
    Rows,
    rows_of_windows,
)
from bitmill.models.block_stacks import BlockStacks, Recording, find_outputs, record_forward
from bitmill.models.computed import compute_unstored
from bitmill.models.kind import check_kind
from bitmill.models.meta import empty_model, trim_malloc
from bitmill.models.split import is_close
from bitmill.models.stored import StoredTensors, tie_as_stored
from bitmill.sources.base import Source
from bitmill.tasks.base import task_of


class StreamedModel:
    """The modules of a source, whose parameters are loaded on demand in fp32.

    source: where weights and config come from.
    device: where weights are loaded to and the model runs.
    model: the modules, with parameters on the meta device until they are loaded.
    task, adapter: descriptions of the model.
    blocks: the blocks of `model`.
    untied: the config ties embedding and head, but the source stores two different ones.
    """

    def __init__(self, source: Source, device: str = "cpu") -> None:
        self.source = source
        self.device = torch.device(device)
        self.model = empty_model(source).eval()
        self.task = task_of(source)
        self.adapter: Adapter = adapter_for(source.config) or generic_adapter(self.model, source.config)
        try:
            self.stacks = BlockStacks(self.model, self.adapter.stacks)
        except KeyError as error:
            raise SourceError(
                f"{type(self.model).__name__} has no blocks at {error}, where models of "
                f"architecture {self.adapter.name!r} have them; give the model that transformers loads as "
                f"{self.task.auto_class_name}."
            ) from None
        self.blocks: nn.ModuleList = self.stacks.blocks
        self.adapter = with_layers_of(self.adapter, self.blocks)
        check_kind(self.model, self.blocks, source, self.task)
        self._stored = StoredTensors(self.model, source)
        self.untied = tie_as_stored(self.model, self._stored)
        self._place_buffers()
        self._head_by_position: bool | None = None  # unknown until the first call of `deferred_head`
        self._block_outputs: int | None = None  # length of the tuple that blocks return, 0 for a tensor
        self._relays = False  # later blocks of a stack receive what the first one returns behind hidden states
        self.largest_hidden_state: float | None = None
        self._rows: dict[tuple[tuple[int, ...], tuple[frozenset[tuple[Path, int]], ...]], list[Rows]] = {}
        self._finite: set[str] = set()  # heads that were checked before the blocks run
        self._check_complete()

    # -- names --------------------------------------------------------------------------------------------

    def names(self) -> list[str]:
        """Return the names in the model of the stored tensors."""
        return self._stored.names()

    def stored_tensor(self, name: str) -> Tensor:
        """Return a tensor as the source holds it, in its stored dtype."""
        return self._stored.tensor(name)

    def stored_parts(self, name: str) -> tuple[str, ...]:
        """Return the names in the source of the tensors from which one is made."""
        return self._stored.parts(name)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a stored tensor, without reading it."""
        return self._stored.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype of a stored tensor, without reading it."""
        return self._stored.dtype(name)

    @property
    def unused(self) -> list[str]:
        """The stored tensors of modules that the model does not have, which are left out."""
        return self._stored.unused

    def block_name(self, index: int) -> str:
        """Return the full name of a block."""
        return self.stacks.names[index]

    def starts_stack(self, index: int) -> bool:
        """Return True for the first block of a decoder whose encoder's blocks come before it."""
        return index > 0 and index in self.stacks.starts

    def block_tensors(self, index: int) -> list[str]:
        """Return the names of the stored tensors of one block."""
        prefix = self.block_name(index) + "."
        return [name for name in self.names() if name.startswith(prefix)]

    def non_block_tensors(self) -> list[str]:
        """Return the names of the stored tensors outside the blocks: embeddings, final norm, head and others."""
        inside = tuple(self.block_name(i) + "." for i in range(len(self.blocks)))
        return [name for name in self.names() if not name.startswith(inside)]

    # -- sites --------------------------------------------------------------------------------------------

    def sites(self, index: int) -> tuple[Site, ...]:
        """Return the weights of block `index` that can be quantized, in stage order."""
        paths = [f"{self.block_name(index)}.{linear}.weight" for linear in self.linears(index)]
        shapes = [self.shape(path) for path in paths]
        return tuple(
            Site(path, shape=shape[::-1] if self.adapter.transposed else shape)
            for path, shape in zip(paths, shapes)
        )

    def linears(self, index: int) -> tuple[str, ...]:
        """Return the paths in block `index` of its linear layers; blocks may have different ones."""
        if not self.adapter.inferred:
            return self.adapter.linears
        paths = {path for path, _ in self.blocks[index].named_modules()}
        return tuple(linear for linear in self.adapter.linears if linear in paths)

    def leave_out(self, linears: Collection[str]) -> None:
        """Leave linear layers of an inferred adapter in float, by their paths in the blocks."""
        stages = (tuple(name for name in stage if name not in linears) for stage in self.adapter.stages)
        self.adapter = replace(self.adapter, stages=tuple(stage for stage in stages if stage))

    def float_matrices(self) -> tuple[float, list[str]]:
        """Return the share of the numbers in the blocks' matrices that no site covers, and those by pattern."""
        sites, covered, patterns, outside = {site.path for site in self.all_sites()}, 0, dict[str, None](), 0
        for index in range(len(self.blocks)):
            for name in self.block_tensors(index):
                shape = self.shape(name)
                if sum(side > 1 for side in shape) < 2 or not self.is_parameter(name):
                    continue
                if name in sites:
                    covered += prod(shape)
                else:
                    outside += prod(shape)
                    patterns[f"*{name.removeprefix(self.block_name(index))}"] = None
        return outside / max(covered + outside, 1), list(patterns)

    def all_sites(self) -> tuple[Site, ...]:
        """Return the sites of all blocks in order; `embedding_and_head_sites` has those outside the blocks."""
        return tuple(site for index in range(len(self.blocks)) for site in self.sites(index))

    def fused_layers(self, index: int) -> tuple[tuple[str, ...], ...]:
        """Return the layers of block `index` that serving engines merge into one matrix, by full name."""
        prefix = self.block_name(index)
        return tuple(tuple(f"{prefix}.{name}" for name in group) for group in self.adapter.fused)

    def seams_inside(self, index: int) -> tuple[Seam, ...]:
        """Return the seams of block `index` with paths in the block; blocks may have different ones."""
        linears = set(self.linears(index))
        return tuple(seam for seam in self.adapter.seams if linears.issuperset(seam.targets))

    def seams(self, index: int) -> tuple[Seam, ...]:
        """Return the seams of block `index` with full names of source and targets."""
        prefix = self.block_name(index)
        return tuple(
            replace(seam, source=f"{prefix}.{seam.source}", targets=tuple(f"{prefix}.{t}" for t in seam.targets))
            for seam in self.seams_inside(index)
        )

    def _check_complete(self) -> None:
        """Raise SourceError for a parameter whose stored tensor, or that of a tied one, is absent or misshapen."""
        owners: dict[int, str] = {}
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            if name in self._stored:
                owners[id(parameter)] = name
        missing = [n for n, p in self.model.named_parameters(remove_duplicate=False) if id(p) not in owners]
        compute_unstored(self.model, missing, self.device)
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            if not parameter.is_meta:
                continue  # computed
            if id(parameter) not in owners:
                raise SourceError(f"{self.source.name} holds no tensor {name!r}, which its architecture needs.")
            owner = owners[id(parameter)]
            if tuple(parameter.shape) != self.shape(owner):
                raise SourceError(
                    f"The tensor {owner!r} has shape {self.shape(owner)}, but the config of "
                    f"{self.source.name} requires {tuple(parameter.shape)}."
                )
        for site in (
            f"{self.block_name(index)}.{linear}"
            for index in range(len(self.blocks))
            for linear in self.linears(index)
        ):
            if (name := f"{site}.weight") not in self._stored:
                raise SourceError(
                    f"{self.source.name} holds no tensor {name!r}: it is quantized already, or its adapter does "
                    "not describe it; give the float model."
                )

    # -- weights ------------------------------------------------------------------------------------------

    def load(self, names: list[str]) -> None:
        """Load parameters (fp32) and stored buffers. Raises NumericsError for NaN or Inf."""
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
        """Return a stored tensor in fp32. Raises NumericsError for NaN or Inf."""
        tensor = self.stored_tensor(name).to(self.device, torch.float32)
        # one pass without temporaries: a sum propagates NaN and Inf; values
        # are counted only then, because finite ones may overflow it
        if not bool(torch.isfinite(tensor.sum())) and (bad := int((~torch.isfinite(tensor)).sum())):
            raise NumericsError(f"The weight {name!r} holds {bad} NaN or Inf values; the source is damaged.")
        return tensor

    def is_parameter(self, name: str) -> bool:
        """Return True if a stored tensor is a parameter of the model; others are copied without being used."""
        module, leaf = self._owner(name)
        return module is not None and leaf in module._parameters

    def set_parameter(self, name: str, tensor: Tensor) -> None:
        """Replace a parameter, and every parameter tied to it.

        Args:
            name: full name of the parameter.
            tensor: its new value, on the device of the model.
        """
        module, leaf = self._owner(name)
        assert module is not None
        old = module._parameters[leaf]
        new = nn.Parameter(tensor, requires_grad=False)
        for owner in self.model.modules():
            for key, parameter in owner._parameters.items():
                if parameter is old and parameter is not None:
                    owner._parameters[key] = new

    def matrix(self, name: str) -> Tensor:
        """Return the loaded weight of a linear layer as (out, in)."""
        weight = self.model.get_parameter(name).data
        return weight.T.contiguous() if self.adapter.transposed else weight

    def set_matrix(self, name: str, W: Tensor) -> None:
        """Replace the weight of a linear layer.

        Args:
            name: full name of the weight.
            W: (out, in) new weight.
        """
        self.set_parameter(name, (W.T if self.adapter.transposed else W).to(self.device).contiguous())

    def free(self, names: list[str]) -> None:
        """Free the memory of these parameters."""
        for name in names:
            if self.is_parameter(name):
                self.set_parameter(name, torch.empty(self.shape(name), device="meta"))

    def load_block(self, index: int) -> nn.Module:
        """Load one block in float and return it."""
        unhook_inputs(self.blocks[index])
        self.load(self.block_tensors(index))
        return self.blocks[index]

    def free_block(self, index: int) -> None:
        """Free the memory of one block."""
        self.free(self.block_tensors(index))
        trim_malloc()

    def _owner(self, name: str) -> tuple[nn.Module | None, str]:
        """Return the module that owns a tensor, None where there is no such module, and the name inside it."""
        path, _, leaf = name.rpartition(".")
        try:
            return self.model.get_submodule(path), leaf
        except AttributeError:
            return None, leaf

    def _place_buffers(self) -> None:
        """Move all buffers to the device."""
        for module in self.model.modules():
            for key, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[key] = buffer.to(self.device)

    # -- running ------------------------------------------------------------------------------------------

    @contextmanager
    def non_block_weights(self, side: Literal["both", "embedding", "head"] = "both") -> Iterator[None]:
        """Load the tensors outside the blocks for the duration of a with-statement.

        Args:
            side: "embedding" loads what `embed` needs, "head" what `head` needs. Token embedding and head are the
                largest tensors of most models, so no more than one of them is in memory at a time; "both" loads
                both.

        Raises:
            NumericsError: A tensor holds NaN or Inf. With "embedding" the head is checked too, before the blocks
                run.
        """
        names, unneeded = self.non_block_tensors(), self._unneeded(side)
        for name in set(unneeded) - self._finite if side == "embedding" else ():
            self.finite_tensor(name)  # a damaged head is refused now, and not after the last block
            self._finite.add(name)
        self.load([name for name in names if name not in unneeded])
        try:
            yield
        finally:
            self.free(names)
            trim_malloc()

    def _unneeded(self, side: str) -> list[str]:
        """Return the stored tensors outside the blocks that one side does not need."""
        if side == "both" or self.adapter.inferred or not self.adapter.head or self.task.reads == "pictures":
            return []  # modules of an inferred adapter may be used anywhere; those of pictures are small
        embedding, head = (f"{path}.weight" for path in (self.adapter.embeddings[0], self.adapter.head))
        name = head if side == "embedding" else embedding
        tied = self.model.get_parameter(embedding) is self.model.get_parameter(head)
        return [name] if name in self._stored and not tied else []

    def embed(self, tokens: Tensor) -> tuple[Tensor, list[BlockCall]]:
        """Return the input of the first block, and the other arguments of every block.

        Needs `non_block_weights("embedding")`. The arguments of a decoder behind an encoder are those of `enter`.

        Args:
            tokens: (windows, length) token ids, or windows of another kind, see `Task.call`.

        Returns:
            Hidden states (windows, length, width), and one call per block.

        Raises:
            SourceError: The model does not call its blocks one after another.
        """
        if self._block_outputs is None:
            sizes = [len(blocks) for blocks in self._by_stack().values()]
            self._block_outputs, self._relays = find_outputs(partial(self._run, tokens[:1]), sizes)
        hidden, calls = self._calls(tokens)
        # a window's rows may be its tokens
        kinds = (tuple(tokens.shape[1:]), tuple(call.signature() for call in calls))
        if kinds not in self._rows:
            # how the arguments grow with the number of windows is tried once for each length, on the first window
            _, one = self._calls(tokens[:1])
            _, two = self._calls(torch.cat([tokens[:1]] * 2))
            self._rows[kinds] = [rows_of_windows(a, b) for a, b in zip(one, two)]
        return hidden, [replace(call, rows=rows) for call, rows in zip(calls, self._rows[kinds])]

    def enter(self, index: int, tokens: Tensor, hidden: Tensor) -> tuple[Tensor, list[BlockCall]]:
        """Return the input of a decoder's first block, and the other arguments of its blocks.

        Needs `non_block_weights("embedding")`.

        Args:
            index: of the decoder's first block, see `starts_stack`.
            tokens: windows that were embedded.
            hidden: (windows, length, width) output of the last block of the encoder.

        Returns:
            Hidden states (windows, length, width), and one call per block of the decoder.
        """
        inputs, calls = self._calls(tokens, {self.stacks.stack_of(index - 1): hidden}, index)
        kinds = (tuple(tokens.shape[1:]), tuple(call.signature() for call in calls))
        rows = self._rows[kinds]
        return inputs, [replace(call, rows=rows[n]) for n, call in enumerate(calls) if n >= index]

    def _calls(
        self, tokens: Tensor, replacements: dict[int, Tensor] | None = None, index: int = 0
    ) -> tuple[Tensor, list[BlockCall]]:
        """Return the input of a block, and the calls of all blocks. Raises SourceError.

        Args:
            tokens: windows.
            replacements: number of a list of blocks -> its output.
            index: of the block.
        """
        recorders = self._run(tokens, Recording(self._block_outputs or 0, True, replacements or {}, self._relays))
        hidden = recorders[index].hidden_in
        calls = [recorder.call for recorder in recorders if recorder.call is not None]
        if hidden is None or len(calls) < len(recorders):
            raise SourceError(
                f"{self.source.name}: the model's forward does not call its blocks one after another."
            )
        return hidden, calls

    def head(self, tokens: Tensor, hidden: Tensor) -> Tensor:
        """Return logits for the hidden states after the last block, or the final hidden states of an encoder.

        Needs `non_block_weights("head")`.

        Args:
            tokens: (windows, length) token ids, from which the model computes masks and positions.
            hidden: (windows, length, width) output of the last block.
        """
        with self._zero_embeddings():
            last = {len(self.stacks.starts) - 1: hidden}
            recorders = self._run(tokens, Recording(self._block_outputs or 0, False, last))
        assert recorders[0].output is not None
        return recorders[0].output

    def deferred_head(self, tokens: Tensor, hidden: Tensor) -> Output:
        """Return the output of `head`, of a language model as logits that are computed when they are read.

        Args:
            tokens: (windows, length) token ids.
            hidden: (windows, length, width) output of the last block.
        """
        if self._head_by_position is None:
            self._head_by_position = self.task.generates and self._is_head_by_position(
                tokens[:1, :2], hidden[:1, :2]
            )
        if not self._head_by_position:
            return self.head(tokens, hidden)
        return DeferredLogits(
            lambda window, positions: self.head(tokens[:1, : len(part := hidden[window, positions])], part[None])[
                0
            ]
        )

    def _is_head_by_position(self, tokens: Tensor, hidden: Tensor) -> bool:
        """Return True if the logits of a position depend on its hidden states alone, tried on (1, 2) tokens."""
        last = self.head(tokens[:, :1], hidden[:, -1:])[0]
        return is_close(last, self.head(tokens, hidden)[0, -1:])

    def note_hidden_states(self, *hidden: Tensor) -> float:
        """Update `largest_hidden_state` with outputs of a block, any shapes; return their own largest value."""
        largest = max(float(torch.linalg.vector_norm(output.detach(), torch.inf)) for output in hidden)
        self.note_largest(largest)
        return largest

    def note_largest(self, value: float) -> None:
        """Update `largest_hidden_state` with the largest value of some hidden states."""
        self.largest_hidden_state = max(value, self.largest_hidden_state or 0.0)

    @contextmanager
    def _zero_embeddings(self) -> Iterator[None]:
        """Let a token embedding without memory return zeros, which no block reads."""
        for name in self._unneeded("head"):
            table, width = self._owner(name)[0], self.shape(name)[1]
            if table is not None and self.model.get_parameter(name).is_meta:
                table.forward = lambda ids, width=width: torch.zeros(*ids.shape, width, device=self.device)
        try:
            yield
        finally:
            for name in self._unneeded("head"):
                vars(self._owner(name)[0]).pop("forward", None)

    def _by_stack(self) -> dict[int, list[nn.Module]]:
        """Return number of a list of blocks -> its blocks."""
        found: dict[int, list[nn.Module]] = {}
        for index, block in enumerate(self.blocks):
            found.setdefault(self.stacks.stack_of(index), []).append(block)
        return found

    def _run(self, tokens: Tensor, recording: Recording) -> list[BlockRecorder]:
        """Run the model with recorders in place of its blocks.

        Args:
            tokens: (windows, length) token ids.
            recording: how the recorders answer.
        """
        config = self.source.config.get_text_config()  # of a model of images and text, that of the language model
        options = {"use_cache": False} if hasattr(config, "use_cache") else {}
        starts = self.stacks.starts if recording.relay else ()
        loaded = [start for start in starts if any(p.is_meta for p in self.blocks[start].parameters())]
        for start in loaded:
            self.load_block(start)
        try:
            return record_forward(
                self.stacks,
                self._by_stack(),
                lambda: self.task.call(self.model, tokens.to(self.device), **options),
                recording,
            )
        finally:
            for start in loaded:
                self.free_block(start)
