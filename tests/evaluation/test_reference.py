"""Predictions of the float model that a folder keeps."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from bitmill.errors import CheckpointError
from bitmill.evaluation import reference
from bitmill.evaluation.reference import FILE, ReferenceRecorder, read_reference


@pytest.fixture(autouse=True, scope="module")
def _all_tokens():
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(reference, "TOKENS", 512)
        yield


def recorded(logits, tokens):
    recorder = ReferenceRecorder()
    for window, predictions in zip(tokens, logits):
        recorder.add(window, [predictions])
    return recorder.result()


@pytest.mark.parametrize("vocabulary", [40, 300, 2000])
def test_divergence_of_the_likeliest_tokens_and_the_rest(vocabulary):
    generator = torch.Generator().manual_seed(0)
    q, p = torch.randn(2, 3, 16, vocabulary, generator=generator) * 3
    kept = recorded(q, torch.randint(vocabulary, (3, 16), generator=generator))
    sums = [kept.compare(i, p[i].split(5)) for i in range(3)]
    log_q, log_p = q.double().log_softmax(-1), p.double().log_softmax(-1)
    whole = float((log_q.exp() * (log_q - log_p)).sum())
    found = sum(divergence for divergence, _ in sums)
    top = log_q.topk(min(256, vocabulary), -1).indices
    expected = whole
    if vocabulary > 256:
        a, b = log_q.gather(-1, top), log_p.gather(-1, top)
        rest_q, rest_p = 1 - a.exp().sum(-1), 1 - b.exp().sum(-1)
        expected = float((a.exp() * (a - b)).sum() + (rest_q * (rest_q / rest_p).log()).sum())
    assert found == pytest.approx(expected, rel=1e-5)
    assert found <= whole * (1 + 1e-5)
    assert sum(agreed for _, agreed in sums) == int((q.argmax(-1) == p.argmax(-1)).sum())


def test_equal_predictions_do_not_diverge():
    q = torch.randn(1, 8, 500) * 9
    divergence, agreed = recorded(q, torch.zeros(1, 8, dtype=torch.int64)).compare(0, [q[0]])
    assert abs(divergence) < 1e-4
    assert agreed == 8


def test_number_of_positions(monkeypatch):
    monkeypatch.setattr(reference, "TOKENS", 20)
    logits = torch.randn(4, 8, 9)
    assert recorded(logits, torch.zeros(4, 8, dtype=torch.int64)).tokens.shape == (2, 8)
    assert recorded(torch.randn(2, 64, 9), torch.zeros(2, 64, dtype=torch.int64)).tokens.shape == (1, 20)
    assert ReferenceRecorder().result() is None


def test_damaged_files_are_refused(tmp_path):
    kept = recorded(torch.randn(1, 8, 9), torch.zeros(1, 8, dtype=torch.int64)).tensors()
    assert read_reference(tmp_path) is None
    for name, tensor in [
        ("tokens", kept["tokens"].long()),
        ("tokens", kept["tokens"] - 1),
        ("indices", kept["indices"][:, :-1].contiguous()),
        ("log_probabilities", kept["log_probabilities"] * torch.nan),
        ("other", kept["tokens"] + 1),
    ]:
        save_file({**kept, name: tensor}, tmp_path / FILE)
        with pytest.raises(CheckpointError, match="quantize the model again"):
            read_reference(tmp_path)
    (tmp_path / FILE).write_bytes(b"nonsense")
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_reference(tmp_path)
