"""Windows of a model whose tokenizer puts a token before every text."""

from __future__ import annotations

import json
import math

import pytest
import torch
from tokenizers import processors
from transformers import AutoModelForCausalLM, AutoTokenizer

import bitmill
from bitmill.checkpoint.reader import open_checkpoint
from bitmill.checkpoint.verify import verify_quality
from bitmill.errors import CheckpointError
from helpers.workspace import save_model, write_text

BOS = 1


@pytest.fixture
def source(tmp_path):
    folder = save_model(tmp_path / "source")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", BOS)]
    )
    tokenizer.save_pretrained(folder)
    return folder


def perplexity(model, tokenizer, text, seqlen, windows):
    """Perplexity of [<s>, seqlen - 1 tokens] windows of the last fifth, by the loss of transformers."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    ids = ids[int(len(ids) * 0.8) :]
    rows = [[BOS, *ids[i * (seqlen - 1) : (i + 1) * (seqlen - 1)]] for i in range(windows)]
    with torch.no_grad():
        losses = [float(model(torch.tensor([row]), labels=torch.tensor([row])).loss) for row in rows]
    return math.exp(sum(losses) / len(losses))


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_calibrated_and_measured_behind_the_prefix(source, tmp_path, method):
    text = write_text(tmp_path / "text.txt")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(source), AutoTokenizer.from_pretrained(source)
    expected = perplexity(model, tokenizer, text.read_text(), 32, 3)
    measured = bitmill.evaluate(source, text=str(text), seqlen=32, windows=3)
    assert measured["perplexity"] == pytest.approx(expected, rel=1e-4)
    assert measured["prefix"] == [BOS]

    out, calibration = tmp_path / "out", bitmill.CalibrationData(str(text), 4, 32)
    report = bitmill.quantize(source, method, bits=4, group_size=16, out=out, calib=calibration, measure=3).report
    recorded = report["measured"][0]
    assert recorded["reference_perplexity"] == pytest.approx(expected, rel=1e-4)
    assert recorded["prefix"] == [BOS]
    if method == "gptq":
        assert report["identity"]["calibration"]["prefix"] == [BOS]
    again = bitmill.evaluate(out, text=str(text), seqlen=32, windows=3)
    assert again["perplexity"] == pytest.approx(recorded["perplexity"], rel=1e-4)

    document = json.loads((out / "report.json").read_text())  # as bitmill wrote it before windows had a prefix
    del document["measured"][0]["prefix"]
    (out / "report.json").write_text(json.dumps(document))
    with pytest.raises(CheckpointError, match=r"without the special tokens \[1\]"):
        verify_quality(open_checkpoint(out), lambda entry: again)


def test_text_that_a_model_writes_itself_starts_with_the_prefix(source, tmp_path):
    from bitmill.calibration.token_windows import token_windows
    from bitmill.sources.open import open_source

    calibration = bitmill.CalibrationData("self", 3, 8)
    data = token_windows(open_source(source), calibration, True, 0)
    assert data.windows.shape == (3, 8)
    assert data.windows[:, 0].tolist() == [BOS] * 3
    assert data.described["calibration"]["prefix"] == [BOS]
