"""Formats that keep a part of a layer in more bits, as candidates of a budget."""

from __future__ import annotations

from dataclasses import replace

import torch

import bitmill
from bitmill.formats import FORMATS
from bitmill.recipes.compose import compose
from bitmill.recipes.method import build_recipe
from helpers.tiny_models import tiny_model

WINDOWS = torch.randint(3, 128, (10, 16), generator=torch.Generator().manual_seed(7))


def test_sparse_entries_and_outlier_columns_are_candidates(tmp_path, monkeypatch):
    monkeypatch.setenv("BITMILL_CACHE", str(tmp_path / "cache"))
    plain = build_recipe("gptq", {"bits": 2, "group_size": 16})
    sparse = replace(compose(plain, sparse=0.05), name="sparse")
    columns = FORMATS.get("outlier_columns")(plain.weight, columns=4)
    outliers = replace(plain, name="outliers", weight=columns)
    outcome = bitmill.quantize(
        tiny_model("llama"),
        budget="6bpw",
        methods=[plain, sparse, outliers],
        corrections=0,
        out=tmp_path / "out",
        calib=WINDOWS,
        progress=False,
    )
    budget = outcome.report["budget"]
    labels = {label for kind in budget["kinds"] for label in kind["costs"]}
    assert labels == {"gptq 2-bit", "sparse 2-bit", "outliers 2-bit", "float"}
    chosen = {label for kind in budget["kinds"] for label in kind["chosen"]}
    assert chosen & {"sparse 2-bit", "outliers 2-bit"}
    assert budget["bits_per_weight"] <= 6
