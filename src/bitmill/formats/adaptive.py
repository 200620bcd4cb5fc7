"""Adaptive scales of inputs: a static scale times a factor that follows from a token's own mean magnitude.

    factor(x) = max(gain * mean |x| / scale + offset, LEAST)        scale of x: scale * factor(x)

Neither gain nor offset is negative, so that only a token of zeros without offset reaches LEAST: a factor that
vanishes would give the token up, as the last ReLU of the network of ASQ can.

Source: "ASQ + POST" 2025 (arXiv 2504.17263). There a trained net of two layers maps the means of the channels
of a picture to the factor. A token has one number a channel, so here the mean is that of all magnitudes, and
one layer maps it. It is fitted to the best scales of sampled tokens.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from bitmill.formats.base import GroupFormat, Params
from bitmill.formats.fitting import as_stored, weighted_error
from bitmill.formats.quantized import Quantized, nearest_matrix

LEAST = 2.0**-12  # of a factor
_TOKENS = 1024  # whose best scales are searched
_FACTORS = (2.0 ** (torch.arange(-40, 9, device="cpu") / 8)).tolist()  # of the static scale, 1/32 to 2


def factors(x: Tensor, params: Params) -> Tensor:
    """Return the factor of each token.

    Args:
        x: (tokens, columns).
        params: "scale", "gain" and "offset", (1, 1) each.

    Returns:
        (tokens, 1).
    """
    steps = x.abs().mean(1, keepdim=True) / params["scale"]
    return (params["gain"] * steps + params["offset"]).clamp(min=LEAST)


def of_tokens(format: GroupFormat, x: Tensor, params: Params) -> Quantized:
    """Quantize inputs with a scale a token.

    Args:
        format: of the inputs, with one group for all.
        x: (tokens, columns).
        params: those of the format, and "gain" and "offset".

    Returns:
        The inputs in the format with a group a token.
    """
    scale = params["scale"] * factors(x, params)
    others = {name: value for name, value in params.items() if name not in ("gain", "offset")}
    each = {name: value.expand(len(x), 1) for name, value in others.items()}
    return nearest_matrix(replace(format, group_size="row"), x, {**each, "scale": scale})


def fit_factor(format: GroupFormat, x: Tensor, params: Params) -> Params:
    """Return "gain" and "offset", (1, 1) each, by least squares of the best factors of sampled tokens.

    Args:
        format: of the inputs, with one group for all.
        x: sampled inputs (tokens, columns).
        params: the static ones.
    """
    x = x[:: -(-len(x) // _TOKENS)].to(torch.float32)
    steps = x.abs().mean(1) / params["scale"][0, 0]
    x, steps = x[steps > 0], steps[steps > 0]
    if not len(x):
        return {"gain": torch.zeros_like(params["scale"]), "offset": torch.ones_like(params["scale"])}
    own, grouped = replace(format, group_size="row"), x[:, None]
    best, least = torch.ones(len(x), device=x.device), torch.full((len(x),), torch.inf, device=x.device)
    for factor in _FACTORS:
        each = {name: value.expand(len(x), 1) for name, value in params.items()} | {
            "scale": params["scale"].expand(len(x), 1) * factor
        }
        error = weighted_error(grouped, own.decode(own.nearest(grouped, each), each), x.new_ones(1, 1, 1))[:, 0]
        best, least = torch.where(error < least, factor, best), torch.minimum(error, least)
    gain, offset = _line(steps.double(), best.double())
    return {
        "gain": as_stored(torch.full_like(params["scale"], gain)),
        "offset": as_stored(torch.full_like(params["scale"], offset)),
    }


def _line(x: Tensor, y: Tensor) -> tuple[float, float]:
    """Return gain and offset >= 0 of least squared relative error of positive y."""
    columns = torch.stack([x / y, 1 / y], 1)
    ones = torch.ones_like(y)
    gain, offset = torch.linalg.lstsq(columns, ones[:, None]).solution[:, 0].tolist()
    if gain >= 0 and offset >= 0:
        return gain, offset
    alone = [float(column.sum() / column.square().sum()) for column in columns.T]
    errors = [float((alone[i] * columns[:, i] - 1).square().sum()) for i in (0, 1)]
    return (alone[0], 0.0) if errors[0] <= errors[1] else (0.0, alone[1])
