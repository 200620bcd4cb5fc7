"""Attention on packed keys and values: every instruction set against fp64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from bitmill import native
from bitmill.kv.page import PageLayout
from bitmill.kv.scheme import Scheme, TensorScheme
from bitmill.runtime.attention.dispatch import NativeTokenViews, attend, unsupported_reason
from helpers.native_kernels import ISAS, needs_native
from helpers.packed_past import Case, made, off

pytestmark = needs_native
PLAIN = TensorScheme(4, "token")
BOUND = 2.0**-20


@pytest.fixture(params=ISAS, autouse=True)
def _isa(request, nan_memory):
    library = native.native()
    before = library.isa()
    library.use_isa(request.param)
    yield
    library.use_isa(before)


def check(case: Case) -> None:
    of, scale = made(case), case.dim**-0.5
    out = attend(of.q, of.layer, of.past, scale)
    assert out.isfinite().all()
    assert off(out, of, scale) <= BOUND


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("pre_rope", [False, True])
@pytest.mark.parametrize("dim", [64, 80])
def test_every_width_and_axis(bits, pre_rope, dim):
    for axis, group in (("static", None), ("page", None), ("token", None), ("token", "head"), ("token", 16)):
        side = TensorScheme(bits, axis, group)
        values = TensorScheme(bits, "token", group)
        check(Case(side, values, dim=dim, group=3, pre_rope=pre_rope))


@pytest.mark.parametrize("levels", ["normal", "learned"])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_tables_and_zeros(levels, bits):
    side = TensorScheme(bits, "token", "head", levels)
    check(Case(side, side, dim=96, heads=1))


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("pre_rope", [False, True])
def test_channel_levels(bits, pre_rope):
    check(
        Case(
            TensorScheme(bits, "channel", levels="learned", outliers=0.02),
            PLAIN,
            dim=80,
            group=2,
            pre_rope=pre_rope,
        )
    )


@pytest.mark.parametrize("heads", [2, 5])  # indices of one byte, and of two
@pytest.mark.parametrize("pre_rope", [False, True])
@pytest.mark.parametrize("dim", [64, 80, 128])
def test_outliers(heads, pre_rope, dim):
    keys, values = TensorScheme(3, "static", outliers=0.03), TensorScheme(3, "token", outliers=0.01)
    check(Case(keys, values, heads=heads, group=2, dim=dim, pre_rope=pre_rope))


@pytest.mark.parametrize("group", [1, 2, 3, 4, 7, 9])
def test_grouped_query_heads(group):
    check(Case(PLAIN, PLAIN, group=group, dim=128))


@pytest.mark.parametrize(("packed", "tail"), [(0, 7), (0, 40), (32, 0), (288, 31), (544, 1)])
@pytest.mark.parametrize("pre_rope", [False, True])
def test_lengths(packed, tail, pre_rope):
    check(Case(TensorScheme(4, "page"), PLAIN, packed=packed, tail=tail, pre_rope=pre_rope))


@pytest.mark.parametrize("sinks", [0, 1, 4, 40])
@pytest.mark.parametrize("first_slot", [0, 32])
def test_padding_sinks_windows(sinks, first_slot):
    sides = TensorScheme(4, "token", outliers=0.02), TensorScheme(4, "token", 32, outliers=0.02)
    begins = (first_slot, first_slot + 3, first_slot + 45, first_slot + 126)
    case = Case(
        *sides,
        group=2,
        packed=128,
        sinks=sinks,
        first_slot=first_slot,
        starts=begins,
        firsts=begins,
        pre_rope=True,
    )
    check(case)
    check(replace(case, firsts=(first_slot + 31, first_slot + 70, first_slot + 127, first_slot + 130)))


def test_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    check(Case(PLAIN, PLAIN, packed=32 * 37, starts=(0, 5, 700), firsts=(0, 5, 700), pre_rope=True))
    torch.set_num_threads(before)


def test_masked_row_is_zero():
    q, layer, past, *_ = made(Case(PLAIN, PLAIN, packed=64, starts=(0, 0), firsts=(0, 900)))
    out = attend(q, layer, past, 1.0)
    assert out[0].abs().max() > 0
    assert out[1].eq(0).all()


def test_nonfinite_values_propagate():
    q, layer, past, *_ = made(Case(PLAIN, PLAIN, group=2))
    q[0, 1, 3] = float("nan")
    out = attend(q, layer, past, 1.0)
    assert out[0, 1].isnan().all()
    assert out[0, 0].isfinite().all()


def test_layer_plan_reused():
    def places(past):
        return past.slabs, past.fp16_keys, past.fp16_values

    q, layer, past, *_ = made(Case(PLAIN, PLAIN, packed=544))
    views = NativeTokenViews()
    fewer = replace(past, slabs=past.slabs[:2], packed=512)
    first = views.update(*places(fewer))
    assert views.update(*places(past)) is first
    expected = attend(q, layer, past, 0.1, views)
    assert views.update(*places(past)) is first
    for other in (
        replace(past, slabs=[s.clone() for s in past.slabs]),
        replace(past, fp16_keys=past.fp16_keys.clone()),
    ):
        assert torch.equal(attend(q, layer, other, 0.1, views), expected)
    assert views.update(*places(fewer)) is not first


def test_wrong_shapes_refused():
    q, layer, past, *_ = made(Case(PLAIN, PLAIN))
    for wrong in (replace(past, packed=1024), replace(past, tail=90), replace(past, first=past.first.repeat(2))):
        with pytest.raises(ValueError):
            attend(q, layer, wrong, 1.0)
    outside = replace(layer.pages, value=replace(layer.pages.value, codes=layer.pages.words - 4))
    for odd in (
        replace(layer, pages=outside),
        replace(layer, key_levels=torch.ones(7)),
        replace(layer, key_scale=torch.ones(128)),
    ):
        with pytest.raises(ValueError):
            attend(q, odd, past, 1.0)


@pytest.mark.parametrize("heads", [3, 5])  # indices of one byte, and of two
@pytest.mark.parametrize("side", ["key", "value"])
def test_invalid_outliers_skipped(heads, side):
    keys, values = TensorScheme(3, "page", outliers=0.03), TensorScheme(3, "token", outliers=0.03)
    of, layout = made(Case(keys, values, heads=heads, group=2)), PageLayout(Scheme(keys, values), heads, 64)
    pages = torch.cat(of.past.slabs, 1)
    without, beyond = pages.clone(), pages.clone()
    layout.parts[f"{side}.outlier_value"].view(without)[..., :2, :] = 0
    indices = layout.parts[f"{side}.outlier_index"].view(beyond)
    indices[..., 0, :], indices[..., 1, :] = heads * 64, torch.iinfo(indices.dtype).max
    outs = [attend(of.q, of.layer, replace(of.past, slabs=[slab]), 0.1) for slab in (without, beyond)]
    assert outs[0].isfinite().all()
    assert torch.equal(*outs)


def test_unsupported_reason():
    plan = made(Case(PLAIN, PLAIN)).layer.pages
    cpu = torch.device("cpu")
    assert unsupported_reason(plan, cpu) is None
    assert "multiples of 16" in str(unsupported_reason(replace(plan, dim=72), cpu))
    assert "5 bits" in str(unsupported_reason(replace(plan, key=replace(plan.key, bits=5)), cpu))
    assert "8 channels" in str(unsupported_reason(replace(plan, value=replace(plan.value, groups=16)), cpu))
