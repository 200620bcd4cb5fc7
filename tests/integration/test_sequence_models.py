"""Encoder-decoders and classifiers in the commands of language models."""

from __future__ import annotations

import json

import pytest
import torch
import transformers

import bitmill
from bitmill.calibration.walk import HiddenStates, walk_blocks
from bitmill.errors import RecipeError
from bitmill.models.streamed import StreamedModel
from bitmill.sources.module import ModuleSource
from bitmill.tasks.base import task_for
from helpers.sequence_models import sequence_model, sequence_windows

ENCODER_DECODERS = ["bart", "marian", "t5", "whisper"]
CLASSIFIERS = ["bert", "roberta", "distilbert"]
LINEARS = {"bart": 32, "marian": 32, "t5": 47, "whisper": 32, "bert": 12, "roberta": 12, "distilbert": 12}


@pytest.mark.parametrize("kind", ENCODER_DECODERS)
@torch.no_grad()
def test_blocks_one_after_another_give_the_logits_of_the_model(kind):
    model, windows = sequence_model(kind), sequence_windows(kind)
    streamed = StreamedModel(ModuleSource(model))
    with streamed.non_block_weights("embedding"):
        states = HiddenStates(streamed, windows.split(4))
    for index, block in walk_blocks(streamed):
        states.advance(block, index)
    with streamed.non_block_weights("head"):
        found = torch.cat([streamed.head(w, h) for w, h in zip(windows.split(4), states.batches)])
    assert torch.allclose(found, streamed.task.call(model, windows).logits, atol=1e-4)


@pytest.mark.parametrize("kind", ENCODER_DECODERS + CLASSIFIERS)
@torch.no_grad()
def test_a_folder_is_loaded_with_equal_logits(kind, tmp_path):
    model, windows = sequence_model(kind), sequence_windows(kind)
    model.save_pretrained(tmp_path / "float")
    task = task_for(model.config)
    outcome = bitmill.quantize(
        tmp_path / "float", "gptq", bits=8, out=tmp_path / "out", calib=windows, measure=0, progress=False
    )
    assert len(outcome.report["layers"]) == LINEARS[kind]
    packed = task.call(task.auto_class.from_pretrained(tmp_path / "out", dtype=torch.float32), windows).logits
    decoded = task.call(bitmill.load(tmp_path / "out", dense=True), windows).logits
    expected = task.call(model, windows).logits
    assert float((packed - decoded).norm() / decoded.norm()) < 1e-2
    assert float((packed - expected).norm() / expected.norm()) < 0.1


@pytest.mark.parametrize(("kind", "packed"), [("t5", []), ("whisper", ["model.decoder.embed_tokens"])])
@torch.no_grad()
def test_embeddings_are_packed_unless_two_modules_share_them(kind, packed, tmp_path):
    model, windows = sequence_model(kind, 1200), sequence_windows(kind)
    model.save_pretrained(tmp_path / "float")
    outcome = bitmill.quantize(tmp_path / "float", "rtn", bits=8, out=tmp_path / "out", measure=0, progress=False)
    names = [layer["name"] for layer in outcome.report["layers"]]
    assert [name for name in names if "layer" not in name and "block" not in name] == packed
    task = task_for(model.config)
    found = task.call(task.auto_class.from_pretrained(tmp_path / "out", dtype=torch.float32), windows).logits
    decoded = task.call(bitmill.load(tmp_path / "out", dense=True), windows).logits
    assert float((found - decoded).norm() / decoded.norm()) < 1e-2


@pytest.mark.parametrize("kind", ["t5", "whisper"])
@pytest.mark.parametrize("method", ["gptaq", "pvq", "gptqt"])
@torch.no_grad()
def test_methods_quantize_a_live_encoder_decoder(kind, method):
    windows, errors = sequence_windows(kind), {}
    for name in ("rtn", method):
        model = sequence_model(kind)
        expected = task_for(StreamedModel(ModuleSource(model)).source.config).call(model, windows).logits
        bitmill.quantize(model, name, bits=4, calib=windows, measure=0, progress=False)
        found = task_for(ModuleSource(model).config).call(model, windows).logits
        errors[name] = float((found - expected).norm())
    assert errors[method] < errors["rtn"]


def test_gradients_do_not_pass_an_encoder_decoder():
    with pytest.raises(RecipeError, match="encoder and a decoder"):
        bitmill.quantize(sequence_model("bart"), "squeezellm", bits=4, calib=sequence_windows("bart"), measure=0)


def tokenizer(folder):
    """Save a tokenizer of letters."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {chr(code): code for code in range(32, 127)} | {"[UNK]": 0}
    own = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    own.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    transformers.PreTrainedTokenizerFast(tokenizer_object=own, unk_token="[UNK]").save_pretrained(folder)


def test_text_measures_an_encoder_decoder(tmp_path, capsys):
    from bitmill.cli.main import main

    sequence_model("bart").save_pretrained(tmp_path / "float")
    tokenizer(tmp_path / "float")
    sentences = " ".join(f"The {word} sat on the mat by the {word}." for word in map(str, range(200)))
    (tmp_path / "text.txt").write_text(sentences.replace("0", "o"), encoding="utf-8")
    text, out = str(tmp_path / "text.txt"), str(tmp_path / "out")
    given = ["--method", "gptq", "--bits", "8", "--calib", text, "--samples", "8", "--seqlen", "24", "-o", out]
    assert main(["quantize", str(tmp_path / "float"), *given]) == 0
    capsys.readouterr()
    assert (
        main(["eval", out, "--reference", str(tmp_path / "float"), "--text", text, "--seqlen", "48", "--json"])
        == 0
    )
    figures = json.loads(capsys.readouterr().out)
    assert 0 <= figures["kl_divergence"] < 0.1
    assert main(["verify", out]) == 0
    assert main(["inspect", out]) == 0


def test_labels_measure_a_classifier(tmp_path):
    sequence_model("bert").save_pretrained(tmp_path / "float")
    tokenizer(tmp_path / "float")
    lines = [json.dumps({"text": f"This is text {n}, of label {n % 3}.", "label": n % 3}) for n in range(90)]
    path = tmp_path / "texts.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8")
    calib = bitmill.CalibrationData(str(path), samples=8, seqlen=16)
    bitmill.quantize(tmp_path / "float", "gptq", bits=8, out=tmp_path / "out", calib=calib, measure=9)
    figures = bitmill.evaluate(
        tmp_path / "out", text=str(path), seqlen=32, reference=tmp_path / "float", windows=0
    )
    assert figures["classes"] == 3
    assert figures["top1_agreement"] > 0.9
    assert 0 <= figures["top1_accuracy"] <= 1
    low, high = figures["accuracy_change_interval"]
    assert low <= figures["accuracy_change"] <= high
