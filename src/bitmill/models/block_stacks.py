"""The lists of blocks of a model, and its forward with recorders in their place."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from bitmill.models.block_call import BlockRecorder, Handed, StopForward, output_tensor, receives

# What blocks may return, in the order in which it is tried: a tensor, or a tuple with the hidden states first.
BLOCK_OUTPUTS = (0, 1, 2, 3)


class BlockStacks:
    """The blocks of a model in the order in which they run: one list, or those of an encoder and its decoder.

    paths: path of each list.
    names: full name of every block.
    starts: index of the first block of each list.
    """

    def __init__(self, model: nn.Module, paths: tuple[str, ...]) -> None:
        """Find the lists. Raises KeyError with the path where there is none.

        Args:
            model: the model.
            paths: of the lists, in the order in which they run.
        """
        self._model, self.paths = model, paths
        lists = [_list_at(model, path) for path in paths]
        self.names = [f"{path}.{index}" for path, found in zip(paths, lists) for index in range(len(found))]
        self.starts = tuple(sum(len(found) for found in lists[:number]) for number in range(len(lists)))
        self.blocks = lists[0] if len(lists) == 1 else nn.ModuleList([block for found in lists for block in found])

    def stack_of(self, index: int) -> int:
        """Return the number of the list that a block belongs to."""
        return max(number for number, start in enumerate(self.starts) if start <= index)

    def relative_name(self, layer: str) -> str:
        """Return the path in its block of a layer; the whole name of a layer outside the blocks."""
        path = next((path for path in self.paths if layer.startswith(f"{path}.")), None)
        return layer if path is None else layer.removeprefix(f"{path}.").partition(".")[2]

    @contextmanager
    def replaced(self, recorders: Mapping[int, list[BlockRecorder]]) -> Iterator[None]:
        """Put recorders in place of the blocks of each list for the duration of a with-statement.

        Args:
            recorders: number of a list -> its recorders, which may be fewer than its blocks.
        """
        places = [(path.rpartition("."), recorders[number]) for number, path in enumerate(self.paths)]
        parents = [(self._model.get_submodule(above), leaf, found) for (above, _, leaf), found in places]
        kept = [getattr(parent, leaf) for parent, leaf, _ in parents]
        for parent, leaf, found in parents:
            setattr(parent, leaf, nn.ModuleList(found))
        try:
            yield
        finally:
            for (parent, leaf, _), blocks in zip(parents, kept):
                setattr(parent, leaf, blocks)


@dataclass(frozen=True)
class Recording:
    """How recorders in place of the blocks answer.

    outputs: length of the tuples that they return; 0 for tensors.
    stop: end the forward at the last block.
    replacements: number of a list -> output of its last block, in place of its first block's input.
    relay: the first block of each list runs, and all of the list return its outputs behind the hidden states.
    probe: these outputs are objects of `Handed`.
    """

    outputs: int
    stop: bool
    replacements: Mapping[int, Tensor] = field(default_factory=dict)
    relay: bool = False
    probe: bool = False

    def recorders(self, number: int, blocks: list[nn.Module]) -> list[BlockRecorder]:
        """Return the recorders of one list of blocks.

        Args:
            number: of the list.
            blocks: of it.
        """
        found = [BlockRecorder(block, self.outputs) for block in blocks]
        found[-1].replacement = self.replacements.get(number)
        if self.relay or self.probe:
            relayed: list[Any] = [Handed() for _ in range(self.outputs - 1)] if self.probe else []
            for recorder in found:
                recorder.relayed = relayed
            found[0].runs = self.relay
        return found


def record_forward(
    stacks: BlockStacks, blocks: Mapping[int, list[nn.Module]], call: Callable[[], Any], recording: Recording
) -> list[BlockRecorder]:
    """Run a model with recorders in place of its blocks.

    Args:
        stacks: its lists of blocks.
        blocks: number of a list -> the blocks of it that are recorded.
        call: runs the model once.
        recording: how the recorders answer.

    Returns:
        The recorders of all lists, in order; the output of the model is that of the first one.
    """
    recorders = {number: recording.recorders(number, found) for number, found in blocks.items()}
    everything = [recorder for number in sorted(recorders) for recorder in recorders[number]]
    everything[-1].stop = recording.stop
    try:
        with stacks.replaced(recorders):
            everything[0].output = output_tensor(call())
    except StopForward:
        pass
    return everything


def find_outputs(run: Callable[[Recording], list[BlockRecorder]], sizes: Sequence[int]) -> tuple[int, bool]:
    """Return the length of the tuples that blocks return, and if later blocks receive more than hidden states.

    Args:
        run: runs the model on a window with recorders that answer so.
        sizes: number of blocks of each list.

    Returns:
        0 for blocks that return tensors.
    """
    outputs = next((length for length in BLOCK_OUTPUTS if _accepts(run, sizes, length)), 1)
    if outputs < 2:
        return outputs, False
    try:
        recorders = run(Recording(outputs, True, probe=True))
    except Exception:  # the model's own code
        return outputs, False
    return outputs, any(recorder.call is not None and receives(recorder.call, Handed) for recorder in recorders)


def _accepts(run: Callable[[Recording], list[BlockRecorder]], sizes: Sequence[int], outputs: int) -> bool:
    """Return True if the model accepts tuples of this length from its blocks, or tensors for 0.

    A model that expects tuples would index into a tensor.
    """
    try:
        inputs = [recorder.hidden_in for recorder in run(Recording(outputs, True))]
    except Exception:  # the model's own code
        return False
    shapes = [hidden.shape for hidden in inputs if hidden is not None]
    if outputs or len(shapes) < len(inputs):
        return len(shapes) == len(inputs)
    starts = [sum(sizes[:number]) for number in range(len(sizes))]
    return all(len(set(shapes[start : start + size])) == 1 for start, size in zip(starts, sizes))


def _list_at(model: nn.Module, path: str) -> nn.ModuleList:
    try:
        found = model.get_submodule(path)
    except AttributeError:
        found = model
    if not isinstance(found, nn.ModuleList):
        raise KeyError(path)
    return found
