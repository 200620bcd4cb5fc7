"""Laws of `Format.fake_quantize`, for every registered format and wrapper: its numbers are the stored ones."""

from __future__ import annotations

import pytest
import torch

from bitmill.errors import RecipeError
from bitmill.formats import ScalarFormat
from bitmill.formats.quantized import Quantized
from bitmill.formats.soft_rounding import has_soft_rounding, soft_quantize
from bitmill.formats.uniform import Uniform
from bitmill.solvers import Statistics
from bitmill.solvers.base import solve
from bitmill.solvers.nearest import Nearest
from helpers.cases import all_formats, all_wrappers, fitted, gram_of, inputs, scalar_formats, weights

SHAPE = (6, 96)
every_format = pytest.mark.parametrize("format", [*all_formats(), *all_wrappers()], ids=repr)
TWO_BIT_VECTORS = [f for f in all_formats() if f.bits == 2 and f.block > 1]
every_scalar_format = pytest.mark.parametrize("format", scalar_formats(), ids=repr)


def leaves(format):
    """A matrix, and params of another one, that require gradients where they are numbers."""
    X = inputs()
    stats = Statistics(gram_of(X), X.shape[0], max_abs=X.abs().amax(0), samples=X)
    params = solve(Nearest(), weights(), stats, format).params
    W = weights(seed=1).requires_grad_()
    return W, {name: v.clone().requires_grad_(v.is_floating_point()) for name, v in params.items()}


@every_format
def test_forward_equals_stored(format):
    W, params = leaves(format)
    fixed = {name: value.detach() for name, value in params.items()}
    codes = format.nearest_codes(W.detach(), fixed)
    assert codes.shape == (SHAPE[0], format.codes_in(SHAPE[1]))
    stored = Quantized(format, codes, fixed, SHAPE).dequantize()
    assert torch.equal(format.fake_quantize(W, params), stored)
    with torch.no_grad():
        assert torch.equal(format.fake_quantize(W, params), stored)


@every_format
def test_gradients_reach_weights_and_numbers(format):
    W, params = leaves(format)
    direction = torch.randn(SHAPE, generator=torch.Generator().manual_seed(2))
    (format.fake_quantize(W, params) * direction).sum().backward()
    assert bool(torch.isfinite(W.grad).all())
    assert bool((W.grad != 0).any(1).all())
    given = {part.name for part in format.parts(SHAPE) if part.bits is None and part.stored_as.is_floating_point}
    of_matrix = {name for name in given | format.learned_integers if not name.startswith("input_")}
    for name in of_matrix & params.keys() - {"tensor_scale", "rescale"}:
        gradient = params[name].grad
        assert gradient is not None, name
        assert bool(torch.isfinite(gradient).all()), name


@every_scalar_format
def test_gradient_of_weights_is_one_within_levels(format: ScalarFormat):
    W, params = leaves(format)
    format.fake_quantize(W, params).sum().backward()
    assert set(W.grad.unique().tolist()) <= {0.0, 1.0}
    levels = format.levels({name: value.detach() for name, value in params.items()})
    if levels.shape[:2] == (SHAPE[0], 1):  # one table a row
        low, high = levels.aminmax(dim=-1)
        within = W.detach().clamp(low, high) == W.detach()
        assert bool((W.grad[within] == 1).all())


@pytest.mark.parametrize("format", [Uniform(2, 32), Uniform(3, 32, symmetric=True), Uniform(2, 32, zero="float")])
def test_uniform_gradients_equal_lsq(format):
    """d/dscale = code - zero - W / scale within the range and code - zero beyond it; d/dzero = 0 and -scale."""
    W, params = leaves(format)
    format.fake_quantize(W, params).sum().backward()
    scale = params["scale"].detach()[..., None]
    zero = params["zero"].detach()[..., None] if "zero" in params else torch.full_like(scale, 4.0)
    x = W.detach().view(6, 3, 32)
    place = x / scale + zero
    codes = format.nearest_codes(W.detach(), {n: v.detach() for n, v in params.items()}).view(6, 3, 32).float()
    inside = (place >= -0.5) & (place <= (1 << format.bits) - 0.5)
    assert bool((~inside).any())  # the range is another matrix's
    by_scale = torch.where(inside, codes - place, codes - zero).sum(-1)
    assert torch.allclose(params["scale"].grad, by_scale, atol=1e-4)
    if "zero" in params:
        by_zero = torch.where(inside, 0.0, -scale).sum(-1)
        assert torch.allclose(params["zero"].grad, by_zero, atol=1e-5)
    assert torch.equal(W.grad.view(6, 3, 32), inside.float())


@pytest.mark.parametrize("format", [Uniform(2, 32), *TWO_BIT_VECTORS], ids=repr)
def test_learning_lowers_output_error(format):
    """Weights and params together get closer to the outputs of a matrix than nearest rounding does."""
    X, target = inputs(64), weights()
    params = {name: v.clone().requires_grad_() for name, v in fitted(format, target).items()}
    W = target.clone().requires_grad_()
    optimizer = torch.optim.Adam([W, *params.values()], lr=1e-3)
    losses = []
    for _ in range(30):
        loss = (X @ (format.fake_quantize(W, params) - target).T).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert min(losses) < 0.9 * losses[0]


SOFT = [format for format in [*all_formats(), *all_wrappers()] if has_soft_rounding(format)]


@pytest.mark.parametrize("format", SOFT, ids=repr)
def test_soft_rounding_tends_to_hard_rounding(format):
    """Gradients are finite; the distance to hard rounding falls with the temperature, to that of ties."""
    W, params = leaves(format)
    hard = format.fake_quantize(W, params).detach()
    distances = []
    for temperature in (1.0, 0.1, 0.01, 1e-5):
        soft = soft_quantize(format, W, params, temperature).detach()
        distances.append(float((soft - hard).norm() / hard.norm()))
    assert distances == sorted(distances, reverse=True)
    assert distances[-1] < 0.05
    soft_quantize(format, W, params, 0.5).sum().backward()
    assert bool(torch.isfinite(W.grad).all())
    assert bool((W.grad != 0).any())


def test_soft_rounding_is_the_identity_at_high_temperatures():
    format = Uniform(3, 32)
    W = weights()
    params = fitted(format, W)
    soft = soft_quantize(format, W, params, 100.0)
    levels = format.levels(params).repeat_interleave(32, 1).flatten(0, 1)
    inside = (W.flatten() >= levels.amin(-1)) & (W.flatten() <= levels.amax(-1))
    assert torch.allclose(soft.flatten()[inside], W.flatten()[inside], atol=1e-4)


def test_formats_without_single_levels_refuse_soft_rounding():
    for format in all_formats():
        assert has_soft_rounding(format) == isinstance(format, ScalarFormat), format
        if not has_soft_rounding(format):
            with pytest.raises(RecipeError, match="no soft rounding"):
                soft_quantize(format, weights(), {}, 0.5)
