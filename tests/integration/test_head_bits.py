"""--head-bits in every command: quantized, resumed, verified, measured, run, compared, and reported."""

from __future__ import annotations

import json
import shutil

import pytest
from safetensors import safe_open

import bitmill
from bitmill.checkpoint.reader import open_checkpoint
from bitmill.checkpoint.writer import FolderSink
from bitmill.cli.main import main
from bitmill.workflows.comparison.process import VariantFailed
from bitmill.workflows.comparison.run import run_grid
from bitmill.workflows.comparison.worker import main as work
from helpers.selection import thin
from helpers.workspace import arguments, interrupted_after, save_model, snapshot, write_text


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def place(request, tmp_path_factory):
    """A folder with a model, a text, and what quantizing it leaves behind."""
    root = tmp_path_factory.mktemp("ends")
    save_model(root / "source")
    if request.param:
        source = root / "source"
        config = json.loads((source / "config.json").read_text())
        (source / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
        from safetensors.torch import load_file, save_file

        tensors = load_file(source / "model.safetensors")
        del tensors["lm_head.weight"]
        save_file(tensors, source / "model.safetensors", {"format": "pt"})
    write_text(root / "text.txt")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        assert main(arguments(root / "source", "text.txt", root / "done", "--head-bits", "8")) == 0
    return root


@pytest.fixture
def root(place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return shutil.copytree(place, tmp_path, dirs_exist_ok=True)


@pytest.fixture
def run(capsys):
    def run(*arguments: object, status: int = 0):
        capsys.readouterr()
        assert main([str(a) for a in arguments]) == status
        printed = capsys.readouterr()
        return json.loads(printed.out) if "--json" in arguments else printed.err if status else printed.out

    return run


def quantize(root, out, *more):
    return arguments(root / "source", "text.txt", root / out, *more)


def test_measured_equals_packed(root, run):
    recorded = open_checkpoint(root / "done").report["measured"][0]
    terms = ["--text", "text.txt", "--seqlen", 32, "--windows", 2, "--reference", root / "source", "--json"]
    found = run("eval", root / "done", *terms)
    for key in ("perplexity", "kl_divergence", "top1_agreement", "reference_perplexity"):
        assert found[key] == pytest.approx(recorded[key], rel=1e-5), key
    assert run("verify", root / "done", "--json")["perplexity_change"] < 1e-6
    dense = bitmill.load(root / "done", dense=True)
    again = bitmill.evaluate(
        dense, text="text.txt", seqlen=32, windows=2, tokenizer=bitmill.load_tokenizer(root / "done")
    )
    assert again["perplexity"] == pytest.approx(recorded["perplexity"], rel=1e-5)
    alone = bitmill.quantize(root / "source", "gptq", out=root / "float", group_size=16, **_terms()).summary
    assert alone["measured"][0]["perplexity"] != recorded["perplexity"]
    assert alone["measured"][0]["reference_perplexity"] == recorded["reference_perplexity"]


def _terms():
    return {"calib": bitmill.CalibrationData("text.txt", 4, 32), "measure": 2}


def test_it_generates(root, run):
    result = run("generate", root / "done", "--prompt", "w1 w2", "--max-new-tokens", 4, "--json")
    assert result["new_tokens"] > 0


@pytest.mark.parametrize("method", thin(["gptq", "rtn", "omniquant"], ["gptq"]))
@pytest.mark.parametrize("stop", [-1, 0, 1])
def test_resume_is_byte_identical(root, run, monkeypatch, stop, method):
    options = ("--head-bits", "6", "--method", method)
    run(*quantize(root, "whole", *options))
    expected = snapshot(root / "whole")
    with monkeypatch.context() as patch:
        interrupted_after(stop, patch)
        run(*quantize(root, "cut", *options), status=130)
    journal = json.loads((root / "cut.partial" / "journal.json").read_text())
    assert [block["index"] for block in journal["blocks"]] == list(range(-1, stop))
    solved = []
    write = FolderSink.write
    monkeypatch.setattr(FolderSink, "write", lambda self, r, s: (solved.append(r.index), write(self, r, s))[1])
    run(*quantize(root, "cut", *options, "--resume"))
    assert solved == list(range(stop, 2))  # what was finished was not done again
    assert snapshot(root / "cut") == expected
    assert run(*quantize(root, "cut", *options, "--resume", "--json"))["head_bytes"] > 0


def test_other_bits_refused_on_resume(root, run, monkeypatch):
    interrupted_after(1, monkeypatch)
    run(*quantize(root, "out", "--head-bits", "6"), status=130)
    monkeypatch.undo()
    monkeypatch.chdir(root)
    for other, fragment in ((["--head-bits", "4"], "recipe.head.bits was 6 and is now 4"), ([], "recipe.head")):
        assert fragment in run(*quantize(root, "out", *other, "--resume"), status=1)
    assert "recipe.head" in run(*quantize(root, "done", "--resume"), status=1)
    identity = json.loads((root / "done" / "report.json").read_text())["identity"]
    assert identity["recipe"]["head"]["bits"] == 8


def test_recipe_repeats_run(root, run):
    command = ["quantize", root / "source", "--method", root / "done" / "recipe.yaml", "-o", root / "again"]
    run(*command, "--calib", "text.txt", "--samples", 4, "--seqlen", 32, "--measure", 2)
    for file in (root / "done").glob("*.safetensors"):
        assert file.read_bytes() == (root / "again" / file.name).read_bytes()


def test_reports_show_head_bits(root, run):
    checkpoint = open_checkpoint(root / "done")
    report, tied = checkpoint.report, checkpoint.report["ends"]["tied"]
    assert report["head_bits_per_weight"] == checkpoint.head_bits_per_weight == 8 + (16 + 8) / 32
    result = run("inspect", root / "done", "--json")
    assert result["head_bits_per_weight"] == report["head_bits_per_weight"]
    assert "8.750 in embedding and head" in run("inspect", root / "done")
    text = run(*quantize(root, "out", "--head-bits", "8", "--dry-run"))
    assert "embedding and head" in text
    assert "8.750" in text
    with safe_open(root / "done" / "model-00001-of-00003.safetensors", "pt") as file:
        size = {key: file.get_tensor(key).nbytes for key in file.keys()}  # noqa: SIM118
    assert report["unquantized_bytes"] == sum(
        entry["size_bytes"] for entry in result["tensors"] if entry["format"] == "float32"
    )
    assert report["head_bytes"] == sum(nbytes for key, nbytes in size.items() if key != "model.norm.weight")
    for name in ("README.md", "report.html"):
        page = (root / "done" / name).read_text()
        assert "Token embeddings and head are stored packed too, in uniform (bits 8, group_size 64" in page
        assert ("one matrix for both" in page) == tied
        assert "token embeddings and head" in page
    assert "as in the source" in (root / "done" / "README.md").read_text()


def test_compare_with_head_bits(root, run, monkeypatch):
    def here(folder, name, log, progress):
        """A cell without a process of its own."""
        result = []
        monkeypatch.setattr("builtins.print", lambda line, **_: result.append(json.loads(line)))
        try:
            work([str(folder), name])
        finally:
            monkeypatch.undo()
            monkeypatch.chdir(root)
        if "failed" in result[-1]:
            raise VariantFailed(result[-1]["failed"])
        return result[-1]["result"]

    def compare(**more):
        calibration = bitmill.CalibrationData("text.txt", 4, 32)
        monkeypatch.setattr(run_grid, "__kwdefaults__", {**run_grid.__kwdefaults__, "run": here})
        from bitmill.workflows.comparison.compare import compare

        return compare(
            root / "source", ["rtn"], [4], out=root / "grid", calib=calibration, windows=2, **more,
            options={"rtn": {"group_size": 16}}, prompts=["w1"], max_new_tokens=2,
        )  # fmt: skip

    results = compare(head_bits=8)
    done = results.variants[0]
    assert done.status == "done", done.reason
    assert done.recipe["head"]["bits"] == 8
    assert len(done.layers) == 14
    assert "--head-bits 8" in results.commands[-1]
    with pytest.raises(bitmill.BitmillError, match="with another recipe"):
        compare(head_bits=4)
    with pytest.raises(bitmill.BitmillError, match="head_bits is 5"):
        compare(head_bits=5)
