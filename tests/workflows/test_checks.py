"""Checks before the first block, and the identity of a job."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from bitmill.calibration.token_windows import JobData, token_windows
from bitmill.data.text import calibration_windows, evaluation_windows
from bitmill.errors import CalibrationError, OutputError, UsageError
from bitmill.evaluation.metrics import score_windows
from bitmill.recipes.method import build_recipe
from bitmill.report.card import model_card
from bitmill.workflows.checks import check_space, choose_recipe, job_identity

CONFIG = SimpleNamespace(
    model_type="llama", architectures=["LlamaForCausalLM"], vocab_size=100, max_position_embeddings=32
)
SOURCE = SimpleNamespace(name="tiny", config=CONFIG, pooling=lambda: "cls", fingerprint=lambda: "0" * 64)
WINDOWS = torch.arange(40).view(4, 10)


@pytest.mark.parametrize(
    ("windows", "fragment"),
    [
        (torch.arange(10), r"shape \(10,\)"),
        (torch.zeros(0, 8, dtype=torch.int64), r"shape \(0, 8\)"),
        (torch.zeros(2, 8, dtype=torch.int64, device="meta"), "meta"),
        (torch.zeros(2, 8), "float32"),
        (torch.zeros(2, 8, dtype=torch.bool), "bool"),
        (torch.zeros(2, 1, dtype=torch.int64), "1 token"),
        (torch.zeros(2, 33, dtype=torch.int64), "seqlen is 33"),
        (torch.full((2, 8), -1), "token -1"),
        (torch.full((2, 8), 100), "token 100.*below 100"),
    ],
)
@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_invalid_windows_refused(windows, fragment, method):
    with pytest.raises(CalibrationError, match=fragment):
        token_windows(SOURCE, windows, bool(build_recipe(method).needs), 0)


def test_windows_description():
    data = token_windows(SOURCE, WINDOWS.to(torch.int16), True, 4)
    assert data.windows.dtype == torch.int64
    assert torch.equal(data.windows, WINDOWS)
    assert data.held_out is None
    assert data.described["calibration"]["source"] == "tokens"
    data = token_windows(SOURCE, WINDOWS, False, 4)
    assert data.windows is None
    assert data.described["calibration"] is None


def test_given_windows_not_held_out():
    measured = {"by": "eval", "text": "pydoc", "split": "eval", "windows": 4, "seqlen": 512, "perplexity": 9.0}
    report = {
        "bitmill": "0.1",
        "source": "tiny",
        "recipe": build_recipe("gptq").to_dict(),
        "identity": {"calibration": {"source": "tokens", "sha256": "f" * 64}},
        "bits_per_weight": 3.0,
        "measured": [measured],
        "layers": [],
    }
    assert "held out" not in model_card(report)
    report["identity"] = {"calibration": {**report["identity"]["calibration"], "source": "pydoc"}}
    assert "The text was held out" in model_card(report)


def test_job_identity():
    identity = job_identity(SOURCE, build_recipe("rtn"), JobData(), "cpu")
    assert identity["source"] == "tiny"
    assert identity["machine"]
    assert identity["cpu"] == torch.backends.cpu.get_cpu_capability()
    assert identity["gpu"] is None


def test_free_space_of_resumed_run(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(OutputError, match="free some space"):
        check_space(tmp_path / "out", 1500)
    (tmp_path / "out.partial" / "model").mkdir(parents=True)
    (tmp_path / "out.partial" / "model" / "shard").write_bytes(bytes(600))
    check_space(tmp_path / "out", 1500)
    with pytest.raises(OutputError):
        check_space(tmp_path / "out", 1700)


@pytest.mark.parametrize("seqlen", [1, 0, -3])
def test_too_short_windows_refused(seqlen):
    with pytest.raises(CalibrationError, match=f"seqlen is {seqlen}"):
        calibration_windows(torch.arange(99), 4, seqlen)
    with pytest.raises(CalibrationError, match=f"seqlen is {seqlen}"):
        evaluation_windows(torch.arange(99), seqlen)


@pytest.mark.parametrize("shape", [(3, 1), (0, 8)])
def test_no_predictions(shape):
    with pytest.raises(CalibrationError, match="No token was predicted"):
        score_windows(lambda tokens: torch.zeros(*tokens.shape, 5), torch.zeros(shape, dtype=torch.int64))


def test_method_as_dataclass():
    from bitmill.recipes.methods.gptq import GPTQMethod

    recipe, chosen = choose_recipe(GPTQMethod(bits=3, damp=0.02), {})
    assert (recipe, chosen) == choose_recipe("gptq", {"bits": 3, "damp": 0.02})
    with pytest.raises(UsageError, match="GPTQMethod is complete"):
        choose_recipe(GPTQMethod(), {"bits": 3})
