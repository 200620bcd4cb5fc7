"""The comparison of decoding with an earlier commit."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def decode_before(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(BENCHMARKS), *sys.path])
    import decode_before

    return decode_before


@pytest.mark.parametrize(("after", "slower"), [(1.0, []), (1.2, ["uniform 4 64"])])
def test_slower_cases(decode_before, monkeypatch, capsys, after, slower):
    times = {"/before": 1.0, sys.executable: after}

    def bench(python, command, *arguments):
        if command == "decode":
            return {"tokens_per_s": 1.0}
        only = [{"format": "e8", "bits": 2, "group_size": "tensor", "time_s": 1.0}] if python == "/before" else []
        return {"kernels": [{"format": "uniform", "bits": 4, "group_size": 64, "time_s": times[python]}, *only]}

    monkeypatch.setattr(decode_before, "bench", bench)
    monkeypatch.setattr(sys, "argv", ["decode_before", "/before", "models/small", "--rounds", "3"])
    with pytest.raises(SystemExit) as ended:
        decode_before.main()
    found = json.loads(capsys.readouterr().out)
    assert found["slower"] == slower
    assert ended.value.code == bool(slower)
    assert found["ratios"] == pytest.approx({"uniform 4 64": after, "small": 1.0})
    assert len(found["rounds"]) == 3


def test_noise_is_no_loss(decode_before):
    assert decode_before.slower_cases({"noisy": [0.9, 1.2, 1.3], "slow": [1.1, 1.2, 1.1]}, 1.05) == ["slow"]
