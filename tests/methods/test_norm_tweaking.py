"""Norm Tweaking (arXiv 2309.02784) and the refit of norms: norms alone compensate some of the rounding error."""

from __future__ import annotations

import pytest
import torch

from bitmill.formats.uniform import Uniform
from bitmill.solvers import Solver
from bitmill.solvers.gptq import GPTQ
from bitmill.solvers.nearest import Nearest
from bitmill.tuners import Tuner
from bitmill.tuners.norm_refit import NormRefit
from bitmill.tuners.norm_tweaking import NormTweaking, distance, moments
from helpers.tuned_blocks import quantized

TUNERS = [NormTweaking(rate=5e-3, tokens=128), NormRefit()]  # a tiny text has few steps in it


@pytest.mark.parametrize("tuner", TUNERS, ids=repr)
@pytest.mark.parametrize("solver", [Nearest(), GPTQ()], ids=repr)
@pytest.mark.parametrize("bits", [2, 3])
def test_held_out_divergence_falls(tuner: Tuner, solver: Solver, bits: int):
    """Tables 2 and 8 of the paper: with GPTQ and rounding to nearest, 2 bits included."""
    format = Uniform(bits, 16)
    before, after = (quantized(*t, format=format, solver=solver)[1] for t in ((), (tuner,)))
    assert after < before


@pytest.mark.parametrize("tuner", TUNERS, ids=repr)
def test_only_norms_change(tuner: Tuner):
    before, after = quantized()[0][0], quantized(tuner)[0][0]
    assert after.changed
    assert all("norm" in name for name in after.changed)
    for name, layer in before.layers.items():
        assert torch.equal(after.layers[name].quantized.codes, layer.quantized.codes)


def test_distribution_loss():
    """Equations 2 and 3: means and variances of channels; the order of the tokens does not matter."""
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(4, 16, 8, generator=draw)
    shuffled = hidden.flatten(0, 1)[torch.randperm(64, generator=draw)].reshape(4, 16, 8)
    assert float(distance(moments([hidden]), moments([shuffled]))) < 1e-6
    hidden /= hidden.square().mean(-1, keepdim=True).sqrt()
    assert float(distance(moments([hidden]), moments([hidden + 1], [hidden]))) == pytest.approx(1, rel=1e-5)
    assert float(distance(moments([hidden]), moments([2 * hidden], [hidden]))) > 1


def test_attention_sink_weight():
    """The paper's loss would be that of an attention sink alone."""
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(4, 16, 8, generator=draw)
    with_sink, wrong = hidden.clone(), hidden + torch.randn(4, 16, 8, generator=draw)
    with_sink[:, 0] *= 1e3
    still = torch.where(with_sink == hidden, wrong, with_sink)
    assert float(distance(moments([still], [with_sink]), moments([with_sink]))) > 0.2
