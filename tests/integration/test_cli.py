"""Every command, run through the command line."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import pytest

import bitmill
from bitmill.cli.main import main
from bitmill.cli.output import to_json_types
from bitmill.errors import UsageError
from bitmill.evaluation import answers
from bitmill.evaluation.generate import generate
from bitmill.version import __version__
from bitmill.workflows.load import read_folder
from helpers.selection import thin
from helpers.workspace import TEMPLATE, interrupted_after, save_model, snapshot


@pytest.fixture
def run(capsys):
    """Run a command that must succeed; its stdout, and with --json the object on it."""

    def run(*arguments: object, status: int = 0):
        assert main([str(a) for a in arguments]) == status
        out = capsys.readouterr().out
        return json.loads(out, parse_constant=pytest.fail) if "--json" in arguments else out

    return run


def test_version_and_help(run):
    assert run("--version") == f"bitmill {__version__}\n"
    commands = "quantize eval sweep plan generate chat inspect verify methods models"
    for command in commands.split():
        assert command in run("--help")
        assert "Usage: bitmill" in run(command, "--help")


def test_quantize_as_json(workspace, run):
    data = run(*workspace.quantize("--json", "--bits", "3"))
    assert data["method"] == "gptq"
    assert data["format"]["bits"] == 3
    assert data["out"] == str(workspace.out)
    assert data["layers"] == 14
    measured = data["measured"][0]
    assert measured["windows"] == 2
    assert measured["kl_divergence"] > 0
    assert data["peak_memory_bytes"] > 1e6


def test_quantize_as_text(workspace, run):
    text = run(*workspace.quantize("--set", "damp=0.02"))
    for word in ("bits per weight", "perplexity", "written to", str(workspace.out)):
        assert word in text
    assert "damp: 0.02" in (workspace.out / "recipe.yaml").read_text()


def test_default_method(workspace, run):
    import bitmill

    typed = run(*workspace.quantize("--dry-run", "--json", method=""))
    called = bitmill.quantize(workspace.source, group_size=16, dry_run=True).summary
    for key in ("method", "format", "chosen"):
        assert typed[key] == called[key]
    assert typed["method"] in typed["chosen"]
    assert typed["format"]["bits"] == 3


@pytest.mark.parametrize(
    ("given", "stored"), [("8", 8), ("row", "row"), ("-1", "row"), ("tensor", "tensor"), ("0", "tensor")]
)
def test_group_sizes(workspace, run, given, stored):
    command = ["quantize", workspace.source, "--method", "rtn", "--measure", "0", "--dry-run", "--json"]
    assert run(*command, "--group-size", given)["format"]["group_size"] == stored


def test_rules(workspace, run):
    command = [
        "quantize",
        workspace.source,
        "--method",
        "rtn",
        "--bits",
        "3",
        "--measure",
        "0",
        "--dry-run",
        "--json",
    ]
    plain = run(*command)["size_bytes"]
    ruled = run(*command, "--rule", "*.down_proj=uniform:bits=8", "--rule", "*.layers.0.*=float")["size_bytes"]
    assert ruled > plain


def test_dry_run_writes_nothing(workspace, run):
    before = snapshot(workspace.root)
    data = run(*workspace.quantize("--dry-run", "--json"))
    assert data["dry_run"] is True
    assert data["size_bytes"] > 0
    assert snapshot(workspace.root) == before


def test_recipe_file_repeats_run(workspace, run):
    command = [
        c
        for c in workspace.quantize(method=str(workspace.done / "recipe.yaml"))
        if c not in ("--group-size", "16")
    ]
    run(*command)
    assert snapshot(workspace.out) == snapshot(workspace.done)


def test_deterministic_bytes(workspace, run):
    run(*workspace.quantize())
    assert snapshot(workspace.out) == snapshot(workspace.done)


def test_interrupt_and_resume(workspace, run, capsys, monkeypatch):
    with monkeypatch.context() as patch:
        interrupted_after(1, patch)
        assert main(workspace.quantize()) == 130
    assert capsys.readouterr().err == "interrupted; continue with --resume\n"
    assert not workspace.out.exists()
    run(*workspace.quantize("--resume"))
    assert snapshot(workspace.out) == snapshot(workspace.done)
    assert not workspace.out.with_name("out.partial").exists()
    again = run(*workspace.quantize("--resume", "--json"))
    assert again["measured"][0]["windows"] == 2


def test_eval(workspace, run):
    data = run("eval", workspace.done, "--text", workspace.text, "--seqlen", 32, "--windows", 2, "--json")
    assert data["windows"] == 2
    recorded = json.loads((workspace.done / "report.json").read_text())["measured"][0]
    assert data["perplexity"] == pytest.approx(recorded["perplexity"], rel=1e-4)
    everything = run("eval", workspace.source, "--text", workspace.text, "--seqlen", 32, "--windows", 0, "--json")
    assert everything["windows"] == 400 // 32
    assert "perplexity" in run("eval", workspace.done, "--text", workspace.text, "--seqlen", 32, "--windows", 2)


def test_eval_records(workspace, run, monkeypatch):
    monkeypatch.setattr(answers, "generate", lambda *ids, **_: generate(*ids, max_new_tokens=4))  # 48 take seconds
    command = ["eval", workspace.done, "--text", workspace.text, "--seqlen", 32, "--windows", 3]
    command += ["--reference", workspace.source, "--record", "--json"]
    data = run(*command)
    assert data["recorded"] is True
    assert 0 <= data["top1_agreement"] <= 1
    assert run(*command)["perplexity"] == data["perplexity"]
    report = json.loads((workspace.done / "report.json").read_text())
    assert [m["by"] for m in report["measured"]] == ["quantize", "eval"]  # the repetition replaced itself
    assert report["measured"][1]["kl_divergence"] == data["kl_divergence"]
    assert "time_s" not in report["measured"][1]
    assert report["samples"] == data["samples"]
    assert [sample["prompt"] for sample in report["samples"]] == list(answers.PROMPTS)
    first = report["samples"][0]
    assert first["answer"]["new_tokens"] == len(first["answer"]["token_ids"]) > 0
    generated = run("generate", workspace.done, "--prompt", answers.PROMPTS[0], "--max-new-tokens", 4, "--json")
    assert first["answer"]["text"] == generated["text"]
    assert "## Answers" in (workspace.done / "README.md").read_text()
    assert answers.PROMPTS[0] in (workspace.done / "report.html").read_text()
    assert "bitmill eval" in (workspace.done / "README.md").read_text()
    run("verify", workspace.done)


def test_prompts_that_cannot_be_answered(workspace):
    """Figures are returned where a prompt is longer than the context of the model."""
    terms = {"text": str(workspace.text), "seqlen": 32, "windows": 1}
    found = bitmill.evaluate(workspace.done, prompts=["w1 " * 200], **terms)
    assert found["perplexity"] > 0
    assert "samples" not in found
    with pytest.raises(UsageError, match="leave kv out"):
        bitmill.evaluate(workspace.done, prompts=["w1"], kv="per_token", **terms)


def test_generate(workspace, run):
    command = ["generate", workspace.done, "--prompt", "w1 w2", "--max-new-tokens", 5]
    data = run(*command, "--json")
    assert data["new_tokens"] == 5 or data["stopped"] == "eos"
    assert data["chat"] is True
    assert data["text"].strip() in run(*command)
    assert run(*command, "--json")["text"] == data["text"]
    assert run(*command, "--dense", "--json")["text"] == data["text"]
    raw = run(*command, "--raw", "--json")
    assert raw["chat"] is False
    assert run(*command, "--raw").startswith("w1 w2")
    warm = [run(*command, "--temperature", 1.5, "--seed", s, "--json")["text"] for s in (1, 1, 2)]
    assert warm[0] == warm[1] != warm[2]


def test_generate_context_limit(workspace, run):
    data = run("generate", workspace.done, "--raw", "--prompt", "w1 " * 60, "--max-new-tokens", 20, "--json")
    assert data["new_tokens"] <= 4


def test_chat(workspace, capsys, monkeypatch):
    import io

    for turns in ("w1 w2\n\nw3\n/quit\nw4\n", "w1 w2\nw3"):
        monkeypatch.setattr(sys, "stdin", io.StringIO(turns))
        assert main(["chat", str(workspace.done), "--max-new-tokens", "4"]) == 0
        assert len(capsys.readouterr().out.splitlines()) == 2


def test_chat_context_limit(workspace, monkeypatch, capsys):
    import io

    monkeypatch.setattr(sys, "stdin", io.StringIO("w1 w2 w3 w4 w5\n" * 4))
    assert main(["chat", str(workspace.done), "--max-new-tokens", "16"]) == 0
    assert capsys.readouterr().err == ""


def test_chat_ends_with_ctrl_c(workspace, monkeypatch):
    class Stopped:
        def isatty(self):
            return False

        def readline(self):
            raise KeyboardInterrupt

    monkeypatch.setattr(sys, "stdin", Stopped())
    assert main(["chat", str(workspace.done)]) == 0


def test_inspect(workspace, run):
    data = run("inspect", workspace.done, "--json")
    names = {t["name"]: t for t in data["tensors"]}
    layer = names["model.layers.1.mlp.down_proj"]
    assert set(layer) == {"name", "format", "shape", "bits_per_weight", "size_bytes"}
    assert layer["shape"] == [32, 48]
    assert layer["format"] == "uniform"
    assert names["model.norm.weight"]["bits_per_weight"] == 32
    assert data["size_bytes"] == sum(t["size_bytes"] for t in data["tensors"])
    quantized = [t for t in data["tensors"] if t["format"] == "uniform"]
    weights = sum(math.prod(t["shape"]) for t in quantized)
    assert data["bits_per_weight"] == pytest.approx(8 * sum(t["size_bytes"] for t in quantized) / weights)
    assert data["recipe"]["name"] == "gptq"
    text = run("inspect", workspace.done)
    assert "model.layers.*.mlp.down_proj" in text
    assert "bits per weight" in text


def test_verify(workspace, run):
    data = run("verify", workspace.done, "--json")
    assert data["sound"] is True
    assert data["layers"] == 14
    assert data["perplexity_change"] < 1e-3
    assert run("verify", workspace.done, "--no-quality", "--json")["perplexity_change"] is None
    assert "sound" in run("verify", workspace.done)


def test_verify_loads_once(workspace, run, monkeypatch):
    """A folder that states float32 is read once, for the trial and for both measurements."""
    loaded = []

    def read(*arguments, **options):
        loaded.append(arguments[2])
        return read_folder(*arguments, **options)

    for module in ("trial", "load"):
        monkeypatch.setattr(f"bitmill.workflows.{module}.read_folder", read)
    run("verify", workspace.done)
    assert loaded == ["auto"]


def test_methods(run):
    names = {m["name"]: m["description"] for m in run("methods", "--json")["methods"]}
    assert "GPTQ" in names["gptq"]
    data = run("methods", "gptq", "--json")
    assert "arXiv" in data["card"]
    assert {"name": "damp", "type": "float", "default": 0.01}.items() <= data["options"][3].items()
    text = run("methods", "gptq")
    assert "Equation" in text
    assert "group_size" in text
    assert "rtn" in run("methods")


def test_method_cards_and_options(run):
    for method in run("methods", "--json")["methods"]:
        data = run("methods", method["name"], "--json")
        assert "Paper" in data["card"], method
        assert all(option["help"] for option in data["options"]), method


def test_models(run):
    data = run("models", "--json")
    assert {"minilm", "smollm2-135m"} < {model["name"] for model in data["demo_models"]}
    assert "llama" in {a["name"] for a in data["architectures"]}
    assert "smollm2-135m" in run("models")


def test_json_without_nan():
    assert to_json_types({"a": math.nan, "b": [math.inf, 1.0], "c": None, 1: "x"}) == {
        "a": None, "b": [None, 1.0], "c": None, "1": "x",
    }  # fmt: skip


def test_unexpected_exception(workspace, run, capsys, monkeypatch):
    import bitmill.checkpoint.reader

    def broken(folder):
        raise ZeroDivisionError("of our\nmaking")

    monkeypatch.setattr(bitmill.checkpoint.reader, "open_checkpoint", broken)
    assert main(["inspect", str(workspace.done), "--json"]) == 70
    out, err = capsys.readouterr()
    assert json.loads(out)["error"]["type"] == "ZeroDivisionError"
    assert err.startswith("error: Unexpected ZeroDivisionError (of our making)")
    assert err.count("\n") == 1
    assert "BITMILL_DEBUG=1" in err
    monkeypatch.setenv("BITMILL_DEBUG", "1")
    assert main(["inspect", str(workspace.done)]) == 70
    assert "Traceback" in capsys.readouterr().err


def test_no_chat_template(tmp_path, built, capsys):
    source = save_model(tmp_path / "plain", chat=False)
    assert main(["generate", str(source), "--prompt", "w1", "--max-new-tokens", "2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["chat"] is False
    assert TEMPLATE


ORDERS = {
    "bitmill first": "import bitmill, transformers",
    "transformers first": "import transformers, bitmill",
    "transformers in use first": "from transformers import AutoModelForCausalLM; import bitmill",
    "api first": "import bitmill; bitmill.load; import bitmill.evaluation.generate; bitmill.evaluate.__code__",
}


@pytest.mark.parametrize("order", thin(ORDERS, ["transformers in use first", "api first"]))
def test_transformers_loads_folder(built, order):
    program = (
        f"{ORDERS[order]}; import sys; from transformers import AutoModelForCausalLM as A; "
        "print(type(A.from_pretrained(sys.argv[1]).model.layers[0].mlp.up_proj).__name__)"
    )
    done = subprocess.run([sys.executable, "-c", program, built.done], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "QuantLinear"


def test_cli_starts_without_torch():
    program = (
        "import sys; import bitmill.cli.main as m; m.main(['models', '--json']); m.main(['--help'])\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True, stdout=subprocess.DEVNULL)


def test_closed_pipe(built):
    command = f'"{sys.executable}" -m bitmill.cli.main inspect "{built.done}" --json | head -c 1'
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
    assert done.stdout == "{"
    assert done.stderr == ""
