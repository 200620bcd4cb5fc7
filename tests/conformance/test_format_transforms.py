"""Laws of format transforms: another basis, equal matrix and equal outputs."""

from __future__ import annotations

import json

import pytest
import torch

from bitmill.formats.quantized import Quantized
from bitmill.formats.uniform import Uniform
from bitmill.recipes.recipe import Recipe
from bitmill.solvers import Statistics
from bitmill.solvers.nearest import Nearest
from bitmill.transforms import TRANSFORMS, FormatTransform
from helpers.cases import gram_of, inputs, switched, varied, weights

KINDS = [kind for _, kind in TRANSFORMS.items() if issubclass(kind, FormatTransform)]
every_transform = pytest.mark.parametrize(
    "transform", [t for kind in KINDS for t in (*switched(kind, {}), *varied(kind))], ids=repr
)


class Exact(Uniform):
    """Stores numbers as they are."""

    name = "exact"  # type: ignore[assignment]

    def dequantize(self, codes, params, shape):
        return codes


@every_transform
@pytest.mark.parametrize("shape", [(1, 1), (12, 96), (31, 90), (97, 52)], ids=str)
def test_matrix_and_outputs_unchanged(transform: FormatTransform, shape):
    W, X = weights(*shape), inputs(columns=shape[1])
    X[:, shape[1] // 2 + 1 :: 7] = 0  # dead inputs
    stats = Statistics(gram_of(X), 400, cross=gram_of(X), fisher=torch.rand(shape))

    reduction = transform.wrap(Exact(8)).reduce(W, stats)
    M, inner = reduction.W, reduction.stats
    for original, turned in ((stats.gram, inner.gram), (stats.cross, inner.cross)):
        expected, found = ((A @ G * A).sum() for A, G in ((W, original), (M, turned)))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    assert torch.equal(inner.gram, inner.gram.T)
    assert inner.fisher.shape == M.shape == shape
    solved = reduction.finish(Quantized(Exact(8), M, {}, shape))
    live = stats.gram.diagonal() > 0
    torch.testing.assert_close(solved.dequantize()[:, live], W[:, live], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(X @ solved.dequantize().T, X @ W.T, rtol=1e-4, atol=1e-4)


@every_transform
def test_recipe_round_trip(transform: FormatTransform):
    assert TRANSFORMS.from_dict(json.loads(json.dumps(transform.to_dict()))) == transform
    recipe = Recipe("test", Uniform(4), Nearest(), (transform,))
    assert Recipe.from_yaml(recipe.to_yaml()) == recipe
    assert recipe.default.format == transform.wrap(Uniform(4))
