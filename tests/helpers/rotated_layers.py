"""Seeded layers for the methods that work in a rotated basis."""

from __future__ import annotations

import torch
from torch import Tensor

from bitmill.recipes.method import build_recipe
from bitmill.recipes.recipe import Recipe
from bitmill.solvers import Statistics
from bitmill.solvers.base import output_error, solve

ROWS, COLUMNS = 96, 192


def layer(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Weights with outliers, and Gram matrices of training and of held-out inputs with large channels."""
    draw = torch.Generator().manual_seed(seed)
    mix = torch.eye(COLUMNS) + 0.9 * torch.randn(COLUMNS, COLUMNS, generator=draw) / COLUMNS**0.5
    channel_scale = (0.7 * torch.randn(COLUMNS, generator=draw)).exp()
    X = torch.randn(4096, COLUMNS, generator=draw) @ mix * channel_scale
    W = torch.randn(ROWS, COLUMNS, generator=draw)
    W = 0.02 * W / torch.randn(ROWS, COLUMNS, 5, generator=draw).square().mean(-1).sqrt()
    return W, X[:2048].T @ X[:2048] / 2048, X[2048:].T @ X[2048:] / 2048


def held_out_error(seed: int, method: str | Recipe, **options: object) -> float:
    """Relative squared error of the outputs on inputs that the method has not seen."""
    recipe = build_recipe(method, options) if isinstance(method, str) else method
    W, gram, held_out = layer(seed)
    solved = solve(recipe.solver, W, Statistics(gram, 2048, torch.zeros_like(gram)), recipe.default.format)
    return output_error(W, solved.dequantize(), held_out)
