"""Outputs page by page, as in evaluation, equal those of generation token by token."""

from __future__ import annotations

import pytest
import torch

from bitmill.errors import RecipeError
from bitmill.kv.cache import PackedForward
from bitmill.kv.scheme import Scheme, TensorScheme, kv_method
from helpers.logits import read
from helpers.packed_cache import SETTINGS, calibration_for, continued, long_model, method_of, packed_cache, prompt
from helpers.selection import one_of_each


@pytest.mark.parametrize("setting", one_of_each(SETTINGS, lambda setting: setting[0]), ids=str)
def test_pages_equal_tokens(setting):
    """Up to numbers that round the other way: a tenth of what packing changes; other pages make it a third."""
    model, ids, method = long_model("llama"), prompt(2, 170), method_of(setting)
    with torch.no_grad():
        answers = read(PackedForward(model, method, calibration_for(model, method))(ids), ids)
        exact = model(ids).logits
        cache = packed_cache(model, setting)
        first = model(ids[:, :1], past_key_values=cache).logits
    one_by_one = torch.cat([first, continued(model, cache, ids[:, 1:], 169)], 1)
    assert (answers - one_by_one).norm() < 0.1 * (exact - one_by_one).norm()


@pytest.mark.parametrize("name", ["kivi", "kvquant", "rotated"])
def test_full_pages_wait(name):
    with pytest.raises(RecipeError, match="residual is 40; use a multiple of 32"):
        kv_method(name, residual=40)
    assert kv_method(name, residual=64).scheme().residual == (32 if name == "kivi" else 64)


def test_scheme_argument():
    side = TensorScheme(4, "token")
    with pytest.raises(RecipeError, match="residual is 7; use a multiple of 32"):
        Scheme(side, side, residual=7)
