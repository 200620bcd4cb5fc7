"""What calibration finds, and what is said beforehand of its size."""

from __future__ import annotations

import pytest
import torch

import bitmill
from bitmill.kv.calibration import calibrate
from bitmill.kv.size import cache_size
from bitmill.kv.support import calibration_bytes, packed_shapes
from bitmill.kv.wanted import asked


@pytest.mark.parametrize(
    "options", ["", "q_norm=true", "channel_levels=false", "fisher=false", "nuq=false", "equalize=false"]
)
def test_the_size_of_a_calibration_is_known_beforehand(world, options):
    model = bitmill.load(world.source)
    method = asked(f"kvquant:{options}", 2, None).method()
    found = calibrate(model, method, torch.randint(3, 120, (2, 64)))
    size = sum(tensor.nbytes for tensor in found.tensors().values())
    assert calibration_bytes(model, method) == size
    (shape,) = set(packed_shapes(model).values())
    layers = len(packed_shapes(model))
    fixed = 0 if method.nuq else layers * 4 * 2 * 4  # levels that are not learned are no part of it
    assert cache_size(method.scheme(), *shape, layers, 1, weighed=method.weighs_errors).tables == size + fixed
