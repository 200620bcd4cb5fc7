"""Attention on packed keys and values: every instruction set against fp64."""

from __future__ import annotations

import pytest
import torch
from compiled import ISAS, needs_native
from packed_past import Case, exact, made, replace

from bitmill.kv.base import Side
from bitmill.runtime import native
from bitmill.runtime.kv import Slabs, attend

pytestmark = needs_native
PLAIN = Side(4, "token")
BOUND = 2.0**-20


@pytest.fixture(params=ISAS, autouse=True)
def _isa(request, nan_memory):
    library = native.native()
    before = library.isa()
    library.use_isa(request.param)
    yield
    library.use_isa(before)


def check(case: Case) -> None:
    q, past, keys, values, counted = made(case)
    scale = case.dim**-0.5
    expected, bound = exact(q, keys, values, counted, scale)
    found = attend(q, past, scale)
    assert found.isfinite().all()
    assert bool(((found - expected).abs() <= BOUND * bound).all()), ((found - expected).abs() / bound).max()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("pre_rope", [False, True])
@pytest.mark.parametrize("dim", [64, 80])
def test_every_width_and_axis(bits, pre_rope, dim):
    for axis, group in (("static", None), ("page", None), ("token", None), ("token", "head"), ("token", 16)):
        side = Side(bits, axis, group)
        values = Side(bits, "token", group)
        check(Case(side, values, dim=dim, group=3, pre_rope=pre_rope))


@pytest.mark.parametrize("levels", ["normal", "learned"])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_tables_with_and_without_zeros(levels, bits):
    side = Side(bits, "token", "head", levels)
    check(Case(side, side, dim=96, heads=1))


@pytest.mark.parametrize("heads", [2, 5])  # indices of one byte, and of two
@pytest.mark.parametrize("pre_rope", [False, True])
@pytest.mark.parametrize("dim", [64, 80, 128])
def test_outliers(heads, pre_rope, dim):
    keys, values = Side(3, "static", outliers=0.03), Side(3, "token", outliers=0.01)
    check(Case(keys, values, heads=heads, group=2, dim=dim, pre_rope=pre_rope))


@pytest.mark.parametrize("group", [1, 2, 3, 4, 7, 9])
def test_any_number_of_query_heads_shares_keys(group):
    check(Case(PLAIN, PLAIN, group=group, dim=128))


@pytest.mark.parametrize(("packed", "tail"), [(0, 7), (0, 40), (32, 0), (288, 31), (544, 1)])
@pytest.mark.parametrize("pre_rope", [False, True])
def test_lengths(packed, tail, pre_rope):
    check(Case(Side(4, "page"), PLAIN, packed=packed, tail=tail, pre_rope=pre_rope))


@pytest.mark.parametrize("sinks", [0, 1, 4, 40])
@pytest.mark.parametrize("first_slot", [0, 32])
def test_padding_sinks_and_windows(sinks, first_slot):
    sides = Side(4, "token", outliers=0.02), Side(4, "token", 32, outliers=0.02)
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


def test_threads_share_the_work():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    check(Case(PLAIN, PLAIN, packed=32 * 37, starts=(0, 5, 700), firsts=(0, 5, 700), pre_rope=True))
    torch.set_num_threads(before)


def test_a_row_without_tokens_in_sight_becomes_zero():
    q, past, *_ = made(Case(PLAIN, PLAIN, packed=64, starts=(0, 0), firsts=(0, 900)))
    out = attend(q, past, 1.0)
    assert out[0].abs().max() > 0
    assert out[1].eq(0).all()


def test_what_is_not_finite_stays_so():
    q, past, *_ = made(Case(PLAIN, PLAIN, group=2))
    q[0, 1, 3] = float("nan")
    out = attend(q, past, 1.0)
    assert out[0, 1].isnan().all()
    assert out[0, 0].isfinite().all()


def test_slabs_are_known_again():
    q, past, *_ = made(Case(PLAIN, PLAIN, packed=544))
    kept = Slabs()
    assert kept.of(past.slabs) is kept.of(past.slabs)
    expected = attend(q, past, 0.1)
    assert torch.equal(attend(q, replace(past, slabs=[s.clone() for s in past.slabs]), 0.1, kept), expected)


def test_what_does_not_fit_is_refused():
    q, past, *_ = made(Case(PLAIN, PLAIN))
    for wrong in (replace(past, packed=1024), replace(past, tail=90), replace(past, first=past.first.repeat(2))):
        with pytest.raises(ValueError):
            attend(q, wrong, 1.0)
    outside = replace(past.pages, value=replace(past.pages.value, codes=past.pages.words - 4))
    with pytest.raises(ValueError):
        attend(q, replace(past, pages=outside), 1.0)
