"""KL divergence of the final logits from those of the float model, when some weights of one block are replaced.

One block is in memory at a time: the streams of all changes of a block pass the later blocks together. Memory
grows with the number of changes of a block, not with depth.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext

import torch
from torch import Tensor, nn

from bitmill.calibration.streams import BATCH_TOKENS
from bitmill.calibration.walk import HiddenStates, walk_blocks
from bitmill.evaluation.logits import slices
from bitmill.evaluation.metrics import LanguageModelMetrics
from bitmill.models.streamed import StreamedModel
from bitmill.sensitivities.base import LoadedBlock

Head = Callable[[], AbstractContextManager[None]]  # computes with another head inside a with-statement
Round = Callable[[Tensor], Tensor]
Restore = Callable[[int], None]  # gives a loaded block its weights where they are not those of the source


class Divergences:
    """The float model's hidden states before the next block, and its final ones, for comparison.

    Attributes:
        states: hidden states before the next block.
    """

    def __init__(self, streamed: StreamedModel, windows: Tensor, restore: Restore | None = None) -> None:
        """Let the windows pass the float model.

        Args:
            streamed: the float model.
            windows: token ids (windows, length).
            restore: changes every block, so that costs are those of changes to another model; divergences are from
                the float model all the same.
        """
        self._streamed, self._windows, self._restore = streamed, windows, restore
        with streamed.non_block_weights("embedding"):
            reference = HiddenStates(streamed, windows.split(max(1, BATCH_TOKENS // windows.shape[1])))
        self.states, self._changed = reference.fork(), list[HiddenStates]()
        for index, block in walk_blocks(streamed):
            reference.advance(block, index)
        self._reference = torch.cat(reference.batches)

    def add(
        self, block: LoadedBlock, weights: dict[str, Tensor], inputs: Mapping[str, Round] | None = None
    ) -> None:
        """Let the windows pass a block with other weights, or with rounded inputs of layers.

        Args:
            block: the block, whose weights are restored.
            weights: path in the block -> fp32 (out, in).
            inputs: path of a linear in the block -> what rounds its inputs.
        """
        name = self._streamed.block_name(block.index)
        names = {path: f"{name}.{path}.weight" for path in weights}
        before = {path: self._streamed.matrix(full).clone() for path, full in names.items()}
        stream = self.states.fork()
        for path, W in weights.items():
            self._streamed.set_matrix(names[path], W)
        with _rounded(block.module, inputs or {}):
            stream.advance(block.module, block.index)
        for path, W in before.items():
            self._streamed.set_matrix(names[path], W)
        self._changed.append(stream)

    def finish(self, block: LoadedBlock) -> list[float]:
        """Return the divergences of all changes of the block, in nats per token, and move past the block."""
        streams, self._changed = self._changed, []
        for index in range(block.index + 1, len(self._streamed.blocks)) if streams else ():
            later = self._streamed.load_block(index)
            if self._restore:
                self._restore(index)
            for stream in streams:
                stream.advance(later, index)
            self._streamed.free_block(index)
        self.states.advance(block.module, block.index)
        return self.compare([torch.cat(stream.batches) for stream in streams])

    @torch.no_grad()
    def compare(self, hidden: Sequence[Tensor], heads: Sequence[Head] | None = None) -> list[float]:
        """Return the divergences of final hidden states.

        Args:
            hidden: (windows, length, width) each.
            heads: the head of each; the float model's by default.
        """
        if not hidden:
            return []
        metrics, streamed = [LanguageModelMetrics() for _ in hidden], self._streamed
        with streamed.non_block_weights("head"):
            for number, window in enumerate(self._windows):
                tokens = window[None]
                for positions in slices(len(window)):
                    expected = streamed.deferred_head(tokens, self._reference[number][None])[0, positions]
                    for n, states in enumerate(hidden):
                        with heads[n]() if heads else nullcontext():
                            logits = streamed.deferred_head(tokens, states[number][None])[0, positions]
                        metrics[n].add(tokens[:, positions], logits[None], expected[None])
        return [max(0.0, _mean(metric)) for metric in metrics]


@contextmanager
def _rounded(block: nn.Module, inputs: Mapping[str, Round]) -> Iterator[None]:
    """Round the inputs of linears of a block inside a with-block."""
    with ExitStack() as hooks:
        for path, function in inputs.items():

            def hook(
                module: nn.Module, given: tuple[Tensor, ...], function: Round = function
            ) -> tuple[Tensor, ...]:
                return (function(given[0]), *given[1:])

            hooks.callback(block.get_submodule(path).register_forward_pre_hook(hook).remove)
        yield


def _mean(metric: LanguageModelMetrics) -> float:
    """Return the mean divergence over all positions; infinite logits count as 1000 nats."""
    parts = [part for window in metric.windows for part in window.divergences]
    return float(torch.cat(parts).nan_to_num(1e3, 1e3, 1e3).mean())
