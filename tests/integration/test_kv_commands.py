"""Packed keys and values in every command: calibration, evaluation, generation, refusals."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

import bitmill
from bitmill.cli.main import main
from bitmill.errors import UsageError
from bitmill.files import sha256
from bitmill.kv.cache import QuantizedCache
from bitmill.kv.calibration_file import FILE, read_calibration
from bitmill.kv.config import parse_kv_config
from bitmill.kv.size import calibration_bytes
from helpers.tiny_models import tiny_model
from helpers.workspace import interrupted_after, snapshot

KV = ["--kv", "kvquant:residual=0", "--kv-bits", "3", "--kv-samples", "4"]


@pytest.fixture
def run(capsys):
    """Run a command; the object it printed, or of one that must fail its sentence."""

    def run(*arguments: object, status: int = 0):
        capsys.readouterr()
        assert main([*map(str, arguments), *(["--json"] if status == 0 else [])]) == status
        out, err = capsys.readouterr()
        if status == 0:
            return json.loads(out)
        assert err.count("\n") == 1
        return err

    return run


@pytest.fixture
def kept(workspace, run):
    """A folder of float weights and a calibration."""
    out = workspace.root / "kept"
    run("quantize", workspace.source, "--method", "none", "--calib", workspace.text, *KV, "-o", out)
    return out


def measured(workspace, *more: object) -> list[object]:
    return ["--text", workspace.text, "--seqlen", 64, "--windows", 1, *more]


def test_quantize_with_keys_and_values(workspace, run):
    data = run(*workspace.quantize(*KV))
    calibration = read_calibration(workspace.out)
    assert calibration.method.bits == 3
    assert calibration.about["samples"] == 4
    assert calibration.about["seqlen"] == 64  # as many as the model reads
    with safe_open(workspace.out / FILE, "pt") as file:
        size = sum(file.get_tensor(name).nbytes for name in file.keys())  # noqa: SIM118
    report = json.loads((workspace.out / "report.json").read_text())
    assert data["kv"] == report["kv"]
    assert data["kv"]["size_bytes"] == size
    plain = json.loads((workspace.done / "report.json").read_text())
    assert data["bits_per_weight"] == pytest.approx(
        plain["bits_per_weight"] + 8 * size / data["quantized_weights"]
    )
    assert run("inspect", workspace.out)["bits_per_weight"] == pytest.approx(data["bits_per_weight"])
    assert FILE in report["files"]
    assert "kvquant (bits 3" in (workspace.out / "README.md").read_text()
    assert "kvquant (bits 3" in (workspace.out / "report.html").read_text()
    assert run("verify", workspace.out)["sound"] is True
    shards = [name for name in snapshot(workspace.done) if name.startswith("model")]
    assert all(snapshot(workspace.out)[name] == snapshot(workspace.done)[name] for name in shards)


def test_resume_is_byte_identical(workspace, run, monkeypatch):
    run(*workspace.quantize(*KV))
    other = workspace.root / "other"
    with monkeypatch.context() as patch:
        interrupted_after(1, patch)
        assert main(workspace.quantize(*KV, out=other)) == 130
    assert "kv.method.bits was 3" in run(
        *workspace.quantize(*KV[:3], "2", *KV[4:], "--resume", out=other), status=1
    )
    with monkeypatch.context() as patch:
        patch.setattr("bitmill.workflows.kv.calibrate", _stop)
        assert main(workspace.quantize(*KV, "--resume", out=other)) == 130
    run(*workspace.quantize(*KV, "--resume", out=other))
    assert snapshot(other) == snapshot(workspace.out)
    assert run(*workspace.quantize(*KV, "--resume", out=other))["kv"]["method"]["bits"] == 3


def _stop(*_: object) -> None:
    raise KeyboardInterrupt


def test_dry_run(workspace, run):
    before = snapshot(workspace.root)
    data = run(*workspace.quantize(*KV, "--dry-run"))
    assert data["kv"]["bits_per_element"] > 3
    assert snapshot(workspace.root) == before


def test_float_weights_with_kv_file(workspace, run, kept):
    mine, theirs = (AutoModelForCausalLM.from_pretrained(f).state_dict() for f in (kept, workspace.source))
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    assert run("verify", kept)["layers"] == 0
    assert run("inspect", kept)["kv"]["method"]["kv method"] == "kvquant"
    data = run("eval", kept, *measured(workspace, "--kv", "kvquant", "--record"))
    assert (data["kv_options"]["bits"], data["kv_calibration"]) == (3, "folder")
    assert data["bits_per_weight"] > 32
    assert "through kvquant" in (kept / "README.md").read_text()
    plain = run("eval", kept, *measured(workspace))
    assert plain["perplexity"] == run("eval", workspace.source, *measured(workspace))["perplexity"]
    assert "kv_method" not in plain
    assert run("verify", kept)["sound"] is True


def test_verify_incomplete_calibration(workspace, run, kept):
    calibration = read_calibration(kept)
    values = replace(calibration.layers[1][1], levels=None)
    report = json.loads((kept / "report.json").read_text())
    for layers in (calibration.layers[:1], (calibration.layers[0], (calibration.layers[1][0], values))):
        path = replace(calibration, layers=layers).save(kept)
        report["files"][FILE] = sha256(path)
        (kept / "report.json").write_text(json.dumps(report))
        fragment = run("verify", kept, status=1)
        assert "1 layers" in fragment if len(layers) == 1 else "levels of the values of layer 1" in fragment


def test_calibrate_existing_folder(workspace, run, kept, capsys):
    before = snapshot(workspace.done)
    copy, command = workspace.root / "copy", ["--method", "none", "--calib", workspace.text]
    run("quantize", workspace.done, *command, *KV, "-o", copy)
    assert snapshot(workspace.done) == before
    assert run("verify", copy)["layers"] == 14
    run("eval", copy, *measured(workspace, "--kv", "kvquant", "--record"))
    run("eval", copy, *measured(workspace, "--record"))
    again = ["quantize", copy, *command, "--kv", "kvquant", "--kv-bits", 2, "--kv-samples", 4, "--json"]
    assert main([str(word) for word in again]) == 0
    out, err = capsys.readouterr()
    assert "replaces the calibration for kvquant at 3 bits, residual 0" in err
    data = json.loads(out.splitlines()[-1])
    assert data["out"] == str(copy)
    assert [m["by"] for m in data["measured"]] == ["quantize", "eval"]  # not what the old calibration was worth
    assert read_calibration(copy).method.bits == 2
    run("quantize", kept, *command, "--kv", "per_token", "--kv-bits", "4")
    assert read_calibration(kept).layers == ()
    for folder in (copy, kept):
        assert run("verify", folder)["sound"] is True


def test_eval_with_other_text(workspace, run):
    data = run("eval", workspace.done, *measured(workspace, "--kv", "kvquant", "--kv-bits", 4, "--kv-samples", 3))
    assert data["kv_calibration"] == f"{workspace.text}, calib split, 3 x 64 tokens"
    assert data["kv_bytes"] * 8 == pytest.approx(data["kv_bits_per_element"] * 2 * 2 * 64 * 16)
    method = parse_kv_config("kvquant", 4, None).method()
    assert data["kv_table_bytes"] == calibration_bytes(bitmill.load(workspace.source), method)
    exact = run(
        "eval", workspace.source, *measured(workspace, "--kv", "per_token", "--reference", workspace.source)
    )
    assert exact["kv_calibration"] is None
    assert exact["kv_table_bytes"] == 0
    assert 0 < exact["kl_divergence"] < 0.05  # 8 bits


def test_eval_on_calibration_text(workspace, run, kept, capsys):
    command = ["eval", kept, *measured(workspace, "--kv", "kvquant")]
    assert run(*command)["kv_on_calibration_text"] is False
    assert run(*command, "--split", "all", "--record")["kv_on_calibration_text"] is True
    recorded = json.loads((kept / "report.json").read_text())["measured"][-1]
    assert recorded["kv_calibration"] == "folder"
    assert recorded["kv_on_calibration_text"] is True
    assert recorded["kv_bits_per_element"] > 3
    on_the_fly = [*measured(workspace, "--kv", "kvquant", "--kv-samples", 3), "--split", "calib"]
    assert run("eval", workspace.source, *on_the_fly)["kv_on_calibration_text"] is True
    exact = [*measured(workspace, "--kv", "per_token"), "--split", "calib"]
    assert run("eval", workspace.source, *exact)["kv_on_calibration_text"] is False
    assert main([str(word) for word in (*command, "--split", "calib")]) == 0
    assert "measured on text that keys and values were calibrated on" in capsys.readouterr().out


def test_generate_as_calibrated(workspace, run, kept):
    command = ["generate", kept, "--prompt", "w1 w2", "--max-new-tokens", 40]
    data = run(*command)
    assert data["kv_method"] == "kvquant"
    assert data["kv_options"]["bits"] == 3
    assert data["kv_table_bytes"] == read_calibration(kept).bytes > 0
    plain = run(*command, "--kv", "none")
    assert "kv_method" not in plain
    assert plain["text"] == run("generate", workspace.source, *command[2:])["text"]
    assert run("generate", workspace.done, *command[2:], "--kv", "kivi:group=8")["kv_bytes"] > 0
    model, tokenizer = bitmill.load(kept), bitmill.load_tokenizer(kept)
    ids = torch.tensor([tokenizer("user w1 w2 assistant", add_special_tokens=False)["input_ids"]])
    cache = QuantizedCache(model)
    more = {"attention_mask": torch.ones_like(ids), "max_new_tokens": data["new_tokens"], "do_sample": False}
    out = model.generate(ids, past_key_values=cache, **more)
    assert tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True) == data["text"]


def test_long_prompts_in_chunks(workspace, monkeypatch):
    from bitmill.evaluation.generate import PROMPT_CHUNK, generate
    from bitmill.workflows import kv as caching

    model, tokenizer = bitmill.load(workspace.source), bitmill.load_tokenizer(workspace.source)
    kv_config = parse_kv_config("per_token", 8, None)
    caches, seen = caching.CacheFactory(model, kv_config, "it"), []
    model.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    prompt = list(range(3, 53))
    done = generate(model, tokenizer, prompt, max_new_tokens=3, past=caches.new(), chunk=20)
    assert seen == [20, 20, 10, 1, 1]
    assert done.tokens == generate(model, tokenizer, prompt, max_new_tokens=3).tokens
    assert caches.chunk == PROMPT_CHUNK


def test_chat(workspace, kept, capsys, monkeypatch):
    import io

    monkeypatch.setattr("sys.stdin", io.StringIO("w1 w2\nw3\n"))
    assert main(["chat", str(kept), "--max-new-tokens", "4"]) == 0
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 2
    assert err.count("bytes, mostly the page in fp16") == 2  # more than 16 bits per number


def test_damage(workspace, run, kept):
    path = kept / FILE
    whole = path.read_bytes()
    path.write_bytes(whole[:-8] + bytes(8))
    assert "altered" in run("verify", kept, status=1)
    path.write_bytes(whole[:50])
    for command in (["generate", kept, "--prompt", "w1"], ["eval", kept, *measured(workspace, "--kv", "kvquant")]):
        assert FILE in run(*command, status=1)
    path.unlink()
    assert "missing" in run("verify", kept, status=1)


@pytest.mark.parametrize(
    ("flags", "fragment"),
    [
        (["--kv", "mine"], "choose one of: kivi, kvquant"),
        (["--kv", "kvquant", "--kv-bits", "5"], "bits of keys and values are 5; use 2, 3 or 4"),
        (["--kv", "kivi"], "heads have 8; use a divisor of 8"),
        (["--kv", "kivi", "--kv-set", "sink=1"], "has no option 'sink'"),
        (["--kv", "per_token", "--kv-set", "group=x"], "use a whole number or null"),
        (["--kv", "per_token", "--kv-bits", "4", "--kv-set", "bits=4"], "given twice"),
        (["--kv", "per_token:bits=4", "--kv-bits", "4"], "given twice"),
        (["--kv-bits", "4"], "no method is named"),
        (["--kv", "per_token", "--kv-set", "4"], "--kv-set expects KEY=VALUE"),
        (["--kv", "kvquant", "--kv-samples", "0"], "--kv-samples is 0"),
        (["--kv", "kvquant", "--kv-seqlen", "65"], "lower --kv-seqlen"),
    ],
)
def test_refused(workspace, run, flags, fragment):
    status = 1 if fragment.startswith(("--kv-samples", "lower")) else 2
    assert fragment in run("eval", workspace.source, *measured(workspace, *flags), status=status)
    assert fragment in run(*workspace.quantize(*flags), status=status)
    assert not workspace.out.exists()


def test_advice_names_alternatives(kept):
    with pytest.raises(UsageError, match=r"has one for kvquant at 3 bits, residual 0; .*residual=64 -o"):
        QuantizedCache(bitmill.load(kept), "kvquant", bits=3)


def test_missing_calibration_refused(workspace, run):
    assert "--method none --kv kvquant --kv-bits 4" in run(
        "generate", workspace.source, "--prompt", "w1", "--kv", "kvquant", status=2
    )
    asked_for = ["--kv", "kvquant", "--kv-bits", "3", "--kv-set", "sink=4", "--kv-set", "nuq=false"]
    command = (
        f"quantize {workspace.source} --method none --kv kvquant --kv-bits 3 --kv-set sink=4 --kv-set nuq=false"
    )
    assert f"make one by bitmill {command} -o DIR." in run(
        "generate", workspace.source, "--prompt", "w1", *asked_for, status=2
    )
    with pytest.raises(UsageError, match=re.escape(f"make one by bitmill {command} -o DIR.")):
        QuantizedCache(bitmill.load(workspace.source), "kvquant", bits=3, sink=4, nuq=False)
    assert "name a KV method" in run(
        "quantize", workspace.source, "--method", "none", "-o", workspace.out, status=2
    )
    none = ["quantize", workspace.source, "--method", "none", *KV]
    assert "parts of a recipe" in run(*none, "--format", "uniform", "-o", workspace.out, status=2)
    assert "no option of weights" in run(*none, "--bits", "4", "-o", workspace.out, status=2)
    with pytest.raises(UsageError, match="Nowhere to write"):
        bitmill.quantize(workspace.source, "none", kv="per_token")


@pytest.mark.parametrize(("kind", "fragment"), [("bert", "a text encoder"), ("gpt2", "no rotary embedding")])
def test_refused_models(workspace, run, kind, fragment):
    folder = workspace.root / kind
    tiny_model(kind).save_pretrained(folder)
    for file in workspace.source.glob("tokenizer*"):
        shutil.copy(file, folder)
    command = [
        "quantize",
        folder,
        "--method",
        "rtn",
        *KV,
        "--calib",
        workspace.text,
        "--measure",
        0,
        "-o",
        workspace.out,
    ]
    assert fragment in run(*command, status=2)
    assert not workspace.out.exists()
