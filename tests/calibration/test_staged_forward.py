"""A staged forward stops at the input of each stage and refuses blocks that run in another order."""

from __future__ import annotations

import gc
import signal
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, nn

from bitmill.architectures.adapter import Adapter
from bitmill.calibration import staged_forward
from bitmill.calibration.collect import find_stages
from bitmill.calibration.staged_forward import StagedForward
from bitmill.errors import SourceError
from bitmill.models.block_call import BlockCall

CALL = BlockCall((), {})


class Block(nn.Module):
    """Two linears that read one input, and a third after them."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 4), nn.Linear(6, 4), nn.Linear(4, 6)
        self.idle = nn.Linear(6, 6)

    def forward(self, x: Tensor, scale: float = 1.0) -> tuple[Tensor, None]:
        return x + scale * self.c(self.a(x).relu() * self.b(x)), None


class Twice(Block):
    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.a(x)) + self.a(x)[..., :1]


def batches() -> list[Tensor]:
    return [torch.randn(2, 5, 6), torch.randn(1, 5, 6)]


def described(*stages: tuple[str, ...], inferred: bool = True) -> Adapter:
    return Adapter("test", ("test",), "blocks", stages, (), (), (), "", inferred=inferred)


@torch.no_grad()
def test_equals_plain_forward():
    block, hidden, call = Block(), batches(), BlockCall((), {"scale": 2.0})
    plain = [block(h, 2.0)[0] for h in hidden]
    forward = StagedForward(block, [h.clone() for h in hidden], [call, call], ["a", "c"])
    for X, h in zip(forward.inputs("a"), hidden, strict=True):
        assert torch.equal(X, h.reshape(-1, 6))
    for X, h in zip(forward.inputs("c"), hidden, strict=True):
        assert torch.equal(X, (block.a(h).relu() * block.b(h)).reshape(-1, 4))
    assert all(torch.equal(x, y) for x, y in zip(forward.outputs(), plain, strict=True))
    forward.close()


@torch.no_grad()
def test_later_stages_see_changes():
    block, hidden = Block(), batches()
    forward = StagedForward(block, [h.clone() for h in hidden], [CALL, CALL], ["a", "c"])
    list(forward.inputs("a"))
    block.a.weight.data = torch.zeros(4, 6)
    block.a.bias.data = torch.ones(4)
    for X, h in zip(forward.inputs("c"), hidden, strict=True):
        assert torch.equal(X, block.b(h).reshape(-1, 4))
    block.c.weight.data = torch.zeros(6, 4)
    block.c.bias.data = torch.zeros(6)
    assert all(torch.equal(x, h) for x, h in zip(forward.outputs(), hidden, strict=True))
    forward.close()


@torch.no_grad()
def test_batches_are_released():
    hidden = batches()
    forward = StagedForward(Block(), hidden, [CALL, CALL], ["a"])
    list(forward.inputs("a"))
    assert all(h.numel() == 0 for h in hidden)
    forward.close()


@torch.no_grad()
@pytest.mark.parametrize(
    ("leads", "asked", "sentence"),
    [
        (["c", "a"], "c", "'c' was expected to run next .* reached 'a'"),
        (["a", "c"], "c", "'c' was expected to run next .* reached 'a'"),
        (["idle"], "idle", "'idle' was expected to run next .* ended"),
    ],
)
def test_wrong_stage_order_refused(leads, asked, sentence):
    block, hidden = Block(), batches()
    forward = StagedForward(block, hidden, [CALL, CALL], leads)
    with pytest.raises(SourceError, match=sentence):
        list(forward.inputs(asked))
    forward.close()


@torch.no_grad()
def test_unexpected_stage_refused():
    forward = StagedForward(Block(), batches(), [CALL, CALL], ["a", "c"])
    list(forward.inputs("a"))
    with pytest.raises(SourceError, match="'c' runs twice"):
        forward.outputs()
    forward.close()


@torch.no_grad()
def test_repeated_linear_refused():
    forward = StagedForward(Twice(), batches(), [CALL, CALL], ["a", "c"])
    list(forward.inputs("a"))
    list(forward.inputs("c"))
    with pytest.raises(SourceError, match="'a' runs twice"):
        forward.outputs()
    forward.close()


@torch.no_grad()
def test_use_after_end_refused():
    forward = StagedForward(Block(), batches(), [CALL, CALL], ["a"])
    list(forward.inputs("a"))
    forward.outputs()
    with pytest.raises(SourceError, match="ended"):
        list(forward.inputs("a"))
    forward.close()


@torch.no_grad()
def test_close_removes_hooks():
    block = Block()
    forward = StagedForward(block, batches(), [CALL, CALL], ["a", "c"])
    list(forward.inputs("a"))
    forward.close()
    assert not block.a._forward_pre_hooks
    assert not block.c._forward_pre_hooks
    assert block(torch.randn(1, 5, 6))[0].shape == (1, 5, 6)


@torch.no_grad()
def test_block_error_propagates():
    class Broken(Block):
        def forward(self, x: Tensor) -> Tensor:
            self.a(x)
            raise ZeroDivisionError

    forward = StagedForward(Broken(), batches(), [CALL, CALL], ["a"])
    list(forward.inputs("a"))
    with pytest.raises(ZeroDivisionError):
        forward.outputs()
    forward.close()


def test_generic_block_stages():
    block = Block()
    adapter = described(("c",), ("b",), ("a",))
    assert find_stages(adapter, block, torch.randn(1, 5, 6), CALL) == [["a", "b"], ["c"]]
    assert not block.a._forward_pre_hooks


def test_adapter_block_stages():
    adapter = described(("a", "b"), ("c",), inferred=False)
    assert find_stages(adapter, Block(), torch.randn(1, 5, 6), CALL) == [["a", "b"], ["c"]]


def test_unused_linears_named():
    adapter = described(("a",), ("b",), ("c",), ("idle",))
    with pytest.raises(SourceError, match="idle do not run"):
        find_stages(adapter, Block(), torch.randn(1, 5, 6), CALL)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad, torch.inference_mode])
def test_passes_run_in_the_callers_grad_mode(mode):
    modes = []

    class Noting(Block):
        def forward(self, x: Tensor) -> tuple[Tensor, None]:
            modes.append((torch.is_grad_enabled(), torch.is_inference_mode_enabled()))
            return super().forward(x)

    with mode(), StagedForward(Noting(), batches(), [CALL, CALL], ["a"]) as forward:
        expected = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        list(forward.inputs("a"))
    assert modes == [expected, expected]


def forward_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("bitmill-forward")]


@torch.no_grad()
def test_closing_ends_every_thread():
    with StagedForward(Block(), batches(), [CALL, CALL], ["a", "c"]) as forward:
        next(forward.inputs("a"))
        assert len(forward_threads()) == 1
    assert not forward_threads()


@torch.no_grad()
@pytest.mark.parametrize("failure", [ZeroDivisionError, KeyboardInterrupt])
def test_a_failure_between_stages_ends_every_thread(failure):
    with pytest.raises(failure), StagedForward(Block(), batches(), [CALL, CALL], ["a", "c"]) as forward:
        raise next(failure() for _ in forward.inputs("a"))
    assert not forward_threads()


@torch.no_grad()
def test_an_interrupt_while_a_pass_runs_ends_every_thread():
    class Interrupting(Block):
        def forward(self, x: Tensor) -> tuple[Tensor, None]:
            signal.raise_signal(signal.SIGINT)  # Python delivers it to the main thread
            time.sleep(0.1)
            return super().forward(x)

    previous = signal.signal(signal.SIGINT, signal.default_int_handler)  # background processes ignore it
    with (
        pytest.raises(KeyboardInterrupt),
        StagedForward(Interrupting(), batches(), [CALL, CALL], ["a"]) as forward,
    ):
        list(forward.inputs("a"))
    signal.signal(signal.SIGINT, previous)
    assert not forward_threads()


@torch.no_grad()
def test_a_failed_pass_keeps_no_tensor():
    class Broken(Block):
        def forward(self, x: Tensor) -> Tensor:
            large = self.a(x)
            kept.append(weakref.ref(large))
            raise ZeroDivisionError

    kept: list[weakref.ref[Tensor]] = []
    gc.disable()
    try:
        with StagedForward(Broken(), batches(), [CALL, CALL], []) as forward:
            with pytest.raises(ZeroDivisionError) as raised:
                forward.outputs()
            del raised
        assert kept[0]() is None
    finally:
        gc.enable()


@torch.no_grad()
def test_teams_of_compute_threads_are_bounded(monkeypatch):
    class Noting(Block):
        def forward(self, x: Tensor) -> tuple[Tensor, None]:
            teams.append(torch.get_num_threads())
            return super().forward(x)

    teams, before = [], torch.get_num_threads()
    monkeypatch.setattr(staged_forward, "_MAX_COMPUTE_THREADS", 6)
    try:
        torch.set_num_threads(4)
        with StagedForward(Noting(), batches(), [CALL, CALL], ["a"]) as forward:
            list(forward.inputs("a"))
        later = ThreadPoolExecutor(1).submit(torch.get_num_threads).result()
        assert (teams, torch.get_num_threads(), later) == ([3, 3], 4, 4)
    finally:
        torch.set_num_threads(before)
