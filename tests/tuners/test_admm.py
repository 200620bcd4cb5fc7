"""ADMM: weights and grid meet, and the loss falls below that of plain rounding."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from bitmill.errors import RecipeError
from bitmill.formats.binary_coding import BinaryCoding
from bitmill.formats.uniform import Uniform
from bitmill.models.streamed import StreamedModel
from bitmill.pipeline import run
from bitmill.recipes.recipe import Recipe
from bitmill.solvers.nearest import Nearest
from bitmill.sources.module import ModuleSource
from bitmill.tuners.admm import Admm
from helpers.jobs import job_of
from helpers.tiny_models import tiny_model
from helpers.tuned_blocks import Keep


def texts(count: int, seed: int) -> torch.Tensor:
    """Token ids that count up by a step that changes now and then."""
    draw = torch.Generator().manual_seed(seed)
    steps = torch.randint(1, 4, (count, 4), generator=draw).repeat_interleave(6, 1)
    return (torch.randint(0, 32, (count, 1), generator=draw) + steps.cumsum(1)) % 32


@pytest.fixture(scope="module")
def trained() -> nn.Module:
    """An LSTM that has learned to count, in a few seconds."""
    model = tiny_model("lstm_lm", vocab_size=32, num_hidden_layers=1, hidden_size=48).train()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for step in range(80):
        batch = texts(32, step)
        logits = model(batch[:, :-1]).logits
        nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def perplexity(model: nn.Module, recipe: Recipe) -> float:
    job = job_of(StreamedModel(ModuleSource(model)), recipe, texts(16, 1000), texts(8, 2000))
    return run(job, Keep())["perplexity"]


@pytest.mark.parametrize("format", [Uniform(2, "row"), BinaryCoding(2, 16)], ids=repr)
def test_converges_and_lowers_the_loss(format, trained, monkeypatch):
    traces, train = [], Admm.train

    def traced(self, task):
        traces.append(train(self, task))
        return traces[-1]

    monkeypatch.setattr(Admm, "train", traced)
    plain = perplexity(trained, Recipe("plain", format, Nearest()))
    tuned = perplexity(trained, Recipe("admm", format, Nearest(), tuners=(Admm(iters=60, rate=0.08, growth=1.5),)))
    assert tuned < plain
    (trace,) = traces
    assert min(trace.errors) < 0.7 * trace.start
    assert trace.residuals[-1] < 0.6 * trace.residuals[0]  # weights and grid approach each other
    late = trace.residuals[len(trace.residuals) // 2 :]
    assert late[-1] <= min(late) * 1.1


def test_wrong_options_refused():
    for options in ({"iters": 0}, {"rho": 0.0}, {"growth": 0.9}, {"rate": -1.0}):
        with pytest.raises(RecipeError, match="admm has"):
            Admm(**options)
