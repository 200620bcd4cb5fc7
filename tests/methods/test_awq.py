"""AWQ (arXiv 2306.00978): scaling salient channels, and clipping, on seeded layers with large input channels."""

import pytest
import torch

from bitmill.formats import GroupFormat
from bitmill.formats.binary_coding import BinaryCoding
from bitmill.formats.quantized import fit_matrix, nearest_matrix
from bitmill.formats.uniform import Uniform
from bitmill.recipes.method import build_recipe
from bitmill.solvers import Solver, Statistics
from bitmill.solvers.base import output_error
from bitmill.solvers.clip import Clip
from bitmill.solvers.nearest import Nearest
from bitmill.transforms.awq import AWQ
from bitmill.transforms.base import SeamView

COLUMNS = 192


def layer(seed: int) -> tuple[torch.Tensor, Statistics, torch.Tensor]:
    """Heavy-tailed weights, calibration inputs with a few large channels, and the Gram matrix of held-out ones."""
    draw = torch.Generator().manual_seed(seed)
    mix = torch.eye(COLUMNS) + 0.5 * torch.randn(COLUMNS, COLUMNS, generator=draw) / COLUMNS**0.5
    channel_scale = torch.where(torch.rand(COLUMNS, generator=draw) < 0.03, 10.0, 1.0)
    X = torch.randn(2048, COLUMNS, generator=draw) @ mix * channel_scale
    W = torch.randn(64, COLUMNS, generator=draw)
    W = 0.02 * W / torch.randn(64, COLUMNS, 5, generator=draw).square().mean(-1).sqrt()
    X, held_out = X.split(1024)
    seen = Statistics(X.T @ X / 1024, 1024, mean_abs=X.abs().mean(0), max_abs=X.abs().amax(0))
    return W, seen, held_out.T @ held_out / 1024


def error(
    seed: int, format: GroupFormat, solver: Solver, awq: AWQ | None = None, calibrated: bool = False
) -> float:
    """Relative output error, held out unless `calibrated`."""
    W, seen, held_out = layer(seed)
    scale = torch.ones(COLUMNS) if awq is None else awq.choose(SeamView(scale_source(), [W], format, seen))
    solved = solver.solve(W * scale, seen.scale(scale), format)
    return output_error(W, solved.dequantize() / scale, seen.gram if calibrated else held_out)


def scale_source() -> torch.Tensor:
    return torch.ones(COLUMNS)


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("bits", [3, 4])
def test_scaling_and_clipping_help(bits, seed):
    format = Uniform(bits, 64)
    nearest, scaled, both = (
        error(seed, format, *how) for how in ((Nearest(),), (Nearest(), AWQ()), (Clip(), AWQ()))
    )
    assert scaled < 0.85 * nearest
    assert both < 0.95 * scaled


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("format", [Uniform(2, 64), Uniform(4, "row"), BinaryCoding(2, 48)], ids=repr)
def test_never_worse_than_no_scale(format, seed):
    assert error(seed, format, Nearest(), AWQ(), True) <= error(seed, format, Nearest(), None, True)


@pytest.mark.parametrize("format", [Uniform(3, 64), Uniform(3, 80), Uniform(4, "row")], ids=repr)
def test_output_clipping_beats_weight(format):
    """Clipping to the least weight error removes the tails that large input channels multiply."""
    ours, full, weights = (error(0, format, s, None, True) for s in (Clip(), Nearest(), Nearest(search=True)))
    assert ours < 0.95 * full
    assert ours < 0.95 * weights


def test_clipping_equals_brute_force():
    W, seen, _ = layer(0)
    W, gram = W[:6, :64], seen.gram[:64, :64]  # one group: its own part of the error is all there is
    format = Uniform(3, 64)
    solved = Clip(steps=10, lowest=0.5).solve(W, Statistics(gram), format)
    found = ((W - solved.dequantize()) @ gram * (W - solved.dequantize())).sum(1)
    least = torch.full_like(found, torch.inf)
    for share in torch.arange(1, 0.5, -0.05).tolist():
        limit = W.abs().amax(1, keepdim=True) * share
        params = fit_matrix(format, W.clamp(-limit, limit), None, False)
        D = W - nearest_matrix(format, W, params).dequantize()
        least = torch.minimum(least, (D @ gram * D).sum(1))
    torch.testing.assert_close(found, least, rtol=1e-3, atol=0)


def test_shared_scale_of_targets():
    W, seen, _ = layer(0)
    both = AWQ().choose(SeamView(scale_source(), [W[:32], W[32:]], Uniform(3, 64), seen))
    assert torch.equal(both, AWQ().choose(SeamView(scale_source(), [W], Uniform(3, 64), seen)))


def test_recipe_parts():
    recipe = build_recipe("awq", {"bits": 3})
    assert recipe.needs == {"activations", "gram"}
    assert build_recipe("awq", {"clip": "false"}).solver == Nearest()
