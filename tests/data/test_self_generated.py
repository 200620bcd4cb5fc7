"""Calibration text that the model writes itself."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

import bitmill
from bitmill.data.self_generated import BATCH, LIKELIEST, generate_windows
from bitmill.errors import CalibrationError, NumericsError
from bitmill.progress import Progress
from helpers.tiny_models import tiny_model


class Next(nn.Module):
    """Says that the next token is one more than the last, nearly surely; it has no cache."""

    def __init__(self, certain: float = 40.0) -> None:
        super().__init__()
        self.anchor, self.certain = nn.Parameter(torch.zeros(1)), certain
        self.config = SimpleNamespace(vocab_size=50)

    def forward(self, tokens, past_key_values=None, use_cache=True):
        logits = torch.nn.functional.one_hot((tokens + 1) % 50, 50) * self.certain
        return SimpleNamespace(logits=logits, past_key_values=None)


class Steps(Progress):
    total = done = 0

    def start(self, task, total):
        self.total = total

    def advance(self, steps=1):
        self.done += steps


def test_windows_follow_model():
    windows = generate_windows(Next(), 5, 12, 0, ())
    assert windows.shape == (5, 12)
    assert windows.dtype == torch.int64
    assert torch.equal(windows, (windows[:, :1] + torch.arange(12)) % 50)


def test_first_tokens():
    first = generate_windows(Next(), 200, 2, 0, range(5, 50))[:, 0]
    assert sorted(set(first.tolist())) == [0, 1, 2, 3, 4]


def test_greedy_then_sampled():
    windows = generate_windows(Next(certain=0.5), 40, 60, 0, ())
    certain = (windows[:, 1:] == (windows[:, :-1] + 1) % 50).float().mean(0)
    assert (certain[:LIKELIEST] == 1).all()
    assert certain[LIKELIEST:].mean() < 0.2


def test_seed_determines_text():
    model = tiny_model("llama")
    first, again, other = (generate_windows(model, 4, 10, seed, ()) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_cache_does_not_change_text():
    model = tiny_model("llama")
    with_cache = generate_windows(model, 4, 10, 0, ())
    forward = model.forward
    model.forward = lambda tokens, **options: SimpleNamespace(logits=forward(tokens).logits)
    assert torch.equal(generate_windows(model, 4, 10, 0, ()), with_cache)


def test_progress_counts_tokens():
    steps = Steps()
    generate_windows(Next(), BATCH + 1, 6, 0, (), steps)
    assert steps.done == steps.total == 2 * 5


def test_broken_model_refused():
    with pytest.raises(NumericsError, match="NaN"):
        generate_windows(Next(certain=float("nan")), 2, 4, 0, ())


def test_model_without_tokenizer(tmp_path):
    done = bitmill.quantize(
        tiny_model("llama"), "gptq", bits=3, group_size=16, measure=0, out=tmp_path / "out",
        calibration=bitmill.Calibration("self", samples=4, seqlen=16),
    )  # fmt: skip
    described = done.report["identity"]["calibration"]
    assert described["source"] == "self"
    again = bitmill.quantize(
        tiny_model("llama"), "gptq", bits=3, group_size=16, measure=0,
        calibration=bitmill.Calibration("self", samples=4, seqlen=16),
    )  # fmt: skip
    assert again.report["identity"]["calibration"] == described


@pytest.mark.parametrize(("samples", "seqlen", "said"), [(0, 16, "samples"), (4, 1, "seqlen"), (4, 65, "64")])
def test_invalid_windows_refused(samples, seqlen, said):
    own = bitmill.Calibration("self", samples, seqlen)
    with pytest.raises(CalibrationError, match=said):
        bitmill.quantize(tiny_model("llama"), "gptq", calibration=own, measure=0)
