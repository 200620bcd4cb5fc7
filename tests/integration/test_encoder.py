"""An encoder in every command: quantized, loaded packed, measured by embeddings, refused where unsupported."""

from __future__ import annotations

import json
import random
import shutil

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoModel, PreTrainedTokenizerFast

import bitmill
from bitmill.checkpoint.reader import open_checkpoint
from bitmill.cli.main import main
from bitmill.files import folder_bytes
from bitmill.runtime.modules.linear import QuantLinear
from helpers.tiny_models import tiny_model

WORDS = [a + b + c for a in "bdgk" for b in "aeiou" for c in "mnrst"]
FIGURES = {"cosine_similarity", "neighbour_agreement", "pair_cosine", "reference_pair_cosine"}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A tiny BERT with a tokenizer that frames texts, and a description of its pooling."""
    folder = tmp_path_factory.mktemp("encoder") / "bert"
    tiny_model("bert").save_pretrained(folder)
    own = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(own + WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]", pad_token="[PAD]").save_pretrained(folder)
    kinds = {"": "Transformer", "1_Pooling": "Pooling"}
    listed = [{"path": path, "type": f"sentence_transformers.models.{kind}"} for path, kind in kinds.items()]
    (folder / "modules.json").write_text(json.dumps(listed))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode_cls_token": true}')
    choose = random.Random(0)
    sentences = (" ".join(choose.choices(WORDS, k=choose.randrange(5, 12))) + "." for _ in range(300))
    (folder.parent / "text.txt").write_text(" ".join(sentences))
    return folder


@pytest.fixture(scope="module")
def done(source):
    """The folder it is quantized to."""
    out, text = source.parent / "out", str(source.parent / "text.txt")
    command = ["quantize", str(source), "--method", "gptq", "--bits", "4", "--group-size", "16", "-o", str(out)]
    assert main([*command, "--calib", text, "--samples", "4", "--seqlen", "32", "--measure", "8"]) == 0
    return out


@pytest.fixture
def run(capsys):
    def run(*arguments: object, status: int = 0) -> dict | str:
        capsys.readouterr()
        assert main([*map(str, arguments)]) == status
        printed = capsys.readouterr()
        return json.loads(printed.out) if "--json" in arguments else printed.out if status == 0 else printed.err

    return run


def test_measured_during_quantization(done):
    (measured,) = open_checkpoint(done).report["measured"]
    assert set(measured) >= FIGURES | {"sentences", "tokens"}
    assert "perplexity" not in measured
    assert measured["pooling"] == "cls"
    assert 0.8 < measured["cosine_similarity"] < 1


def test_transformers_loads_packed(source, done):
    model = AutoModel.from_pretrained(done)
    assert sum(isinstance(m, QuantLinear) for m in model.modules()) == 12
    tokens = torch.arange(4, 20)[None]
    with torch.no_grad():
        ours = bitmill.load(done)(tokens).last_hidden_state
        floats = bitmill.load(source)(tokens).last_hidden_state
        assert torch.equal(model(tokens).last_hidden_state, ours)
    assert 0 < (ours - floats).norm() < 0.5 * floats.norm()


def test_eval_compares_embeddings(source, done, run):
    command = ["eval", done, "--text", source.parent / "text.txt", "--seqlen", 32, "--windows", 8, "--json"]
    alone, with_reference = run(*command), run(*command, "--reference", source)
    assert set(with_reference) - set(alone) == FIGURES - {"pair_cosine"}
    assert "perplexity" not in with_reference
    (recorded,) = open_checkpoint(done).report["measured"]
    for figure in FIGURES:
        assert with_reference[figure] == pytest.approx(recorded[figure], abs=1e-4)
    assert "same neighbour" in run(*command[:-1], "--reference", source)
    same = run("eval", source, *command[2:], "--reference", source)
    assert same["neighbour_agreement"] == 1


def test_verify_and_inspect(done, run):
    assert (done / "1_Pooling" / "config.json").is_file()
    assert "1_Pooling/config.json" in open_checkpoint(done).report["files"]
    found = run("verify", done, "--json")
    assert found["pair_cosine_change"] < 1e-4
    assert found["perplexity_change"] is None
    card, page = (done / "README.md").read_text(), (done / "report.html").read_text()
    assert "AutoModel.from_pretrained" in card
    assert "| cosine to float | same neighbour |" in card
    assert "same neighbour" in page
    for text in (card, page, run("inspect", done)):
        assert "perplexity" not in text
        assert "None" not in text


def test_recorded_measurement(source, done, run, tmp_path):
    folder = shutil.copytree(done, tmp_path / "copy")
    text = source.parent / "text.txt"
    run("eval", folder, "--text", text, "--seqlen", 32, "--reference", source, "--record", "--json")
    assert set(open_checkpoint(folder).report["measured"][1]) >= FIGURES | {"sentences", "pooling", "reference"}


@pytest.mark.parametrize(
    ("command", "fragment"),
    [
        (["generate", "DONE", "--prompt", "x"], "writes no text"),
        (["chat", "DONE"], "writes no text"),
        (["compare", "SOURCE", "--methods", "rtn", "--bits", "4", "-o", "OUT"], "is a text encoder"),
        (["sweep", "SOURCE", "--text", "TEXT"], "no perplexity"),
        (["quantize", "SOURCE", "--method", "gptq", "--calib", "self", "-o", "OUT"], "writes no text"),
    ],
)
def test_unsupported_commands_refused(source, done, run, tmp_path, command, fragment):
    places = {"SOURCE": source, "DONE": done, "OUT": tmp_path / "out", "TEXT": source.parent / "text.txt"}
    seqlen = ["--seqlen", "32"] if command[0] in ("compare", "quantize", "sweep") else []
    message = run(*(places.get(word, word) for word in command), *seqlen, status=2)
    assert fragment in message
    assert message.strip().startswith("error: ")
    assert message.strip().count("\n") == 0


def test_unknown_pooling_refused_early(source, run, tmp_path):
    folder = shutil.copytree(source, tmp_path / "copy")
    (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode_lasttoken": true}')
    command = ["quantize", folder, "--method", "rtn", "-o", tmp_path / "out", "--seqlen", 32]
    text = ["--calib", source.parent / "text.txt"]
    assert "--measure 0" in run(*command, *text, status=1)
    assert not list(tmp_path.glob("out*"))
    assert run(*command, "--measure", 0, "--json")["measured"] == []


def test_sweep_without_text(source, run):
    cells = run("sweep", source, "--json")["cells"]
    assert cells[0]["sqnr_db"] > cells[-1]["sqnr_db"]


def test_embedding_table_quantized(source, run, tmp_path):
    out, text = tmp_path / "out", source.parent / "text.txt"
    command = ["quantize", source, "--method", "rtn", "--bits", 8, "--head-bits", 8, "-o", out, "--json"]
    summary = run(*command, "--calib", text, "--seqlen", 32, "--measure", 8)
    checkpoint = open_checkpoint(out)
    assert checkpoint.outside == ("embeddings.word_embeddings",)
    assert summary["head_bits_per_weight"] == checkpoint.head_bits_per_weight == 8 + (16 + 8) / 32
    found = run("eval", out, "--text", text, "--seqlen", 32, "--windows", 8, "--reference", source, "--json")
    for key in FIGURES:
        assert found[key] == pytest.approx(summary["measured"][0][key], rel=1e-5), key
    assert found["cosine_similarity"] > 0.99
    assert "Token embeddings are stored packed too" in (out / "README.md").read_text()
    run("verify", out)


def test_estimate(source, run, done):
    terms = ["--calib", source.parent / "text.txt", "--samples", 4, "--seqlen", 32, "--measure", 8]
    options = ["--method", "gptq", "--bits", 4, "--group-size", 16, "--estimate", "--json"]
    size = run("quantize", source, *options, *terms)["size_bytes"]
    assert size == pytest.approx(folder_bytes(done), rel=1e-2)
