"""Triton's attention on packed keys and values against fp64. Run by test_triton.py, as triton_kernels.py is."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch

from bitmill.kv.scheme import TensorScheme
from bitmill.runtime.attention.triton_attention import attend
from bitmill.runtime.triton import available
from helpers.packed_past import Case, made, off

DEVICE = torch.device("cpu" if available.is_interpreted() else "cuda")
PLAIN = TensorScheme(4, "token")

pytestmark = pytest.mark.usefixtures("nan_memory")


def there(x):
    """Return a copy with its tensors on the device."""
    on_device = {f.name: getattr(x, f.name) for f in fields(x)}
    for name, value in on_device.items():
        if isinstance(value, torch.Tensor):
            on_device[name] = value.to(DEVICE)
        if name == "slabs":
            on_device[name] = [slab.to(DEVICE) for slab in value]
    return replace(x, **on_device)


def check(case: Case) -> None:
    of, scale = made(case), case.dim**-0.5
    out = attend(of.q.to(DEVICE), there(of.layer), there(of.past), scale)
    assert out.isfinite().all()
    assert off(out, of, scale) <= 2.0**-20


@pytest.mark.parametrize(("bits", "dim"), [(2, 64), (3, 80), (4, 128), (8, 96)])
@pytest.mark.parametrize("axis", ["static", "page", "token"])
def test_every_width_and_axis(bits, dim, axis):
    group = "head" if axis == "token" else None
    check(
        Case(
            TensorScheme(bits, axis, group),
            TensorScheme(bits, "token", 16),
            dim=dim,
            group=3,
            packed=64,
            pre_rope=bits != 4,
        )
    )


def test_tables_without_zeros():
    check(Case(TensorScheme(3, "token", levels="normal"), TensorScheme(2, "token", levels="learned")))
    check(Case(TensorScheme(3, "channel", levels="learned"), PLAIN, pre_rope=True))


@pytest.mark.parametrize("heads", [2, 5])
def test_outliers(heads):
    check(
        Case(
            TensorScheme(3, "static", outliers=0.03),
            TensorScheme(3, "token", outliers=0.01),
            heads=heads,
            pre_rope=True,
        )
    )


def test_padding_sinks_windows():
    begins = (32, 35, 77)
    sides = TensorScheme(4, "token", outliers=0.02), TensorScheme(4, "token", 32)
    for sinks in (0, 4, 40):
        case = Case(*sides, packed=64, sinks=sinks, first_slot=32, starts=begins, firsts=begins, pre_rope=True)
        check(case)
        check(replace(case, firsts=(63, 70, 95)))


@pytest.mark.parametrize(("packed", "tail"), [(0, 40), (288, 0), (288, 31)])
def test_lengths(packed, tail):
    check(Case(PLAIN, PLAIN, packed=packed, tail=tail, heads=1))


def test_masked_row_is_zero():
    of = made(Case(PLAIN, PLAIN, packed=64, starts=(0, 0), firsts=(0, 900)))
    out = attend(of.q.to(DEVICE), there(of.layer), there(of.past), 1.0)
    assert out[0].abs().max() > 0
    assert out[1].eq(0).all()
