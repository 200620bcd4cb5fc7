"""The ablation of QUIK: its variants, its table, and that it continues where it stopped."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def ablation(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(BENCHMARKS), *sys.path])
    import quik_ablation

    return quik_ablation


def row(name: str) -> dict:
    times = {"time_to_first_token_s": 0.5, "float32": 1.0, "bfloat16": 0.4, "w8a8": 0.5}
    quality = {"bits_per_weight": 6.1, "kl_divergence": 0.2, "perplexity": 12.0, "perplexity_ratio": 1.15}
    return {"name": name, **quality, **times}


def test_variants(ablation):
    names = dict(ablation.variants())
    assert len(names) == 16
    assert names["plain W4A4"] == {"columns": 0, "down_bits": 4, "rotate": False}
    assert names["64 columns, down 8, rotated"] == {"columns": 64, "down_bits": 8, "rotate": True}


def test_table(ablation):
    settings = {"model": "smollm2-135m", "samples": 32, "windows": 6, "turns": 5}
    lines = ablation.table({"settings": settings, "rows": [row("plain W4A4")]}).splitlines()
    assert lines[-1] == "| plain W4A4 | 6.100 | 0.2000 | 1.1500 | 2.00 | 0.80 | 1.00 |"
    assert ablation.BEGIN in ablation.PAGE.read_text(encoding="utf-8")


def test_rows_are_kept(ablation, monkeypatch, tmp_path, capsys):
    rows, measured = tmp_path / "rows.json", []
    monkeypatch.setattr(ablation, "measure", lambda chosen, _: [measured.append(n) or row(n) for n in chosen])
    command = ["quik_ablation", "--cache", str(tmp_path), "--results", str(rows)]
    for given in (["--only", "plain W4A4"], ["--only", "plain W4A4"], []):
        monkeypatch.setattr(sys, "argv", [*command, *given])
        ablation.main()
    assert len(measured) == len(set(measured)) == 16
    assert [each["name"] for each in json.loads(rows.read_text())["rows"]] == measured
    monkeypatch.setattr(sys, "argv", [*command, "--only", "all"])
    with pytest.raises(SystemExit):
        ablation.main()
    assert "plain W4A4" in capsys.readouterr().err
