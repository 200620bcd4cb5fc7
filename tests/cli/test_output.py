"""Results and failures on stdout, everything else on stderr, more or less of it."""

from __future__ import annotations

import importlib.resources
import json
import logging
import subprocess
import sys

import pytest

from bitmill.cli.main import app, main


def run(capsys, *words):
    status = main(list(words))
    return status, *capsys.readouterr()


@pytest.mark.parametrize(
    ("words", "kind", "status"),
    [
        (["methods", "nope", "--json"], "RecipeError", 2),
        (["plan", "./nope", "--json"], "SourceError", 1),
        (["--json", "quantise"], "UsageError", 2),
        (["plan", "--nope", "--json"], "UsageError", 2),
        (["methods", "--json", "-v", "-q"], "UsageError", 2),
    ],
)
def test_failure_as_json(words, kind, status, capsys):
    found, out, err = run(capsys, *words)
    error = json.loads(out)["error"]
    assert (error["type"], error["exit_code"], found) == (kind, status, status)
    assert err.splitlines()[-1] == f"error: {error['message']}"


def test_failure_with_a_result_is_one_object(capsys):
    status, out, _ = run(capsys, "plan", "llama-7b", "--memory", "1GB", "--json", "-q")
    data = json.loads(out)
    assert status == data["error"]["exit_code"] == 1
    assert data["fits"] is False


def test_interrupt_as_json(capsys, monkeypatch):
    def interrupt(package):
        raise KeyboardInterrupt

    monkeypatch.setattr("bitmill.cli.catalog.listings", interrupt)
    status, out, err = run(capsys, "methods", "--json")
    assert status == json.loads(out)["error"]["exit_code"] == 130
    assert err == "interrupted\n"


def test_quiet_and_verbose(capsys, monkeypatch):
    monkeypatch.setattr("bitmill.progress.terminal.SHOW_AFTER_S", 0.0)
    assert run(capsys, "plan", "llama-7b", "--quiet")[2] == ""
    _, out, err = run(capsys, "plan", "llama-7b", "-v", "--json")
    json.loads(out)
    assert "DEBUG bitmill: begins: starting" in err
    assert not logging.getLogger("bitmill").handlers


def test_every_command_has_them():
    import typer.main

    group = typer.main.get_command(app)
    commands = [*group.commands.values(), *group.commands["bench"].commands.values()]
    for command in commands:
        if not hasattr(command, "commands"):
            assert {"--verbose", "--quiet"} <= {option for one in command.params for option in one.opts}


def test_as_module():
    done = subprocess.run(
        [sys.executable, "-m", "bitmill", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("bitmill ")


@pytest.mark.parametrize(
    ("typed", "completed"),
    [
        ("bitmill quantize smol", "smollm2-135m"),
        ("bitmill quantize M --method gptq", "gptqt"),
        ("bitmill quantize M --format unif", "uniform"),
        ("bitmill compare M --methods rtn,gp", "rtn,gptq"),
        ("bitmill eval M --kv kvq", "kvquant"),
        ("bitmill plan llama-7", "llama-7b"),
        ("bitmill quantize M --calib encyc", "encyclopedia"),
        ("bitmill texts sui", "suite"),
    ],
)
def test_completion(typed, completed, capsys, monkeypatch):
    monkeypatch.setenv("_BITMILL_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", typed)
    monkeypatch.setenv("COMP_CWORD", str(len(typed.split()) - 1))
    with pytest.raises(SystemExit):
        main([])
    assert completed in capsys.readouterr().out.split()


def test_listing_does_not_import_torch():
    code = "import sys; from bitmill.cli.main import main; main(['methods']); sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL, check=True)


def test_types_are_shipped():
    assert importlib.resources.files("bitmill").joinpath("py.typed").is_file()
