"""A folder measured on the suite: figures of every domain, recorded, shown and verified."""

from __future__ import annotations

import io
import json
import random
import re

import numpy as np
import pytest

import bitmill
from bitmill.cli.main import main
from bitmill.data.domain import SUITE, Document
from bitmill.report import formatting
from bitmill.report.results import read_results
from bitmill.workflows.comparison import worker
from bitmill.workflows.comparison.run import run_grid
from helpers import tiny_domains
from helpers.workspace import save_model


def document(number: int) -> Document:
    words = random.Random(number)
    return Document(f"{number}", " ".join(f"w{words.randrange(125)}" for _ in range(60)))


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """The float model and a folder that was calibrated on the mixture."""
    root = tmp_path_factory.mktemp("suite")
    documents = {
        name: [document(100 * at + n) for n in range(99)] for at, name in enumerate((*SUITE, "languages"))
    }
    with pytest.MonkeyPatch.context() as monkeypatch:
        tiny_domains.install(monkeypatch, documents)
        source = save_model(root / "source")
        calib = bitmill.CalibrationData("mix", samples=4, seqlen=32)
        bitmill.quantize(source, "gptq", bits=3, group_size=16, calib=calib, out=root / "done")
        yield source, root / "done"


def evaluate(capsys, folder, source, *more: str) -> dict:
    capsys.readouterr()
    command = ["eval", folder, "--text", "suite", "--seqlen", 32, "--windows", 3, "--reference", source, *more]
    assert main([str(word) for word in command]) == 0
    return capsys.readouterr().out


def test_measured_by_quantize(done, capsys):
    _, folder = done
    (measured,) = json.loads((folder / "report.json").read_text())["measured"]
    assert list(measured["domains"]) == list(SUITE)
    assert (measured["windows"], measured["windows_per_domain"]) == (5, 1)
    capsys.readouterr()
    assert main(["verify", str(folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["perplexity_change"] < 1e-3


def test_measured_on_the_suite(done, capsys, monkeypatch):
    monkeypatch.setattr("bitmill.evaluation.answers.PROMPTS", ())  # which take seconds
    source, folder = done
    found = json.loads(evaluate(capsys, folder, source, "--record", "--json"))
    each = found["domains"]
    assert list(each) == list(SUITE)
    assert found["kl_divergence"] == pytest.approx(np.mean([of["kl_divergence"] for of in each.values()]))
    assert found["windows"] == 15
    alone = bitmill.evaluate(folder, text="prose", seqlen=32, windows=3, reference=source)
    assert alone["kl_divergence"] == pytest.approx(each["prose"]["kl_divergence"], rel=1e-4)
    assert alone["kl_p99"] == pytest.approx(each["prose"]["kl_p99"], rel=1e-4)
    assert "domains" not in alone

    recorded = json.loads((folder / "report.json").read_text())["measured"][-1]
    assert recorded["domains"] == each
    assert recorded["kl_interval"] == found["kl_interval"]
    assert main(["verify", str(folder)]) == 0
    card, page = (folder / "README.md").read_text(), (folder / "report.html").read_text()
    for name, of in each.items():
        assert f"| {name} | 3 |" in card
        assert formatting.number(of["kl_divergence"], 3) in card
        assert re.search(rf'<th scope="row">{name}</th>', page)
    assert page.count('class="domains"') > 1  # a chart for each of several measures


def test_printed_by_domain(done, capsys):
    source, folder = done
    text = evaluate(capsys, folder, source)
    for name in (*SUITE, "mean"):
        assert name in text
    assert "95 %" in text


def test_windows_by_default(done):
    source, _ = done
    found = bitmill.evaluate(source, text="suite", seqlen=32)
    assert {of["windows"] for of in found["domains"].values()} == {8}
    assert found["domains"]["code"].keys() == {"windows", "perplexity", "tokens"}


def in_this_process(folder, name, log, progress):
    """Run a variant here, where the tiny domains are."""
    sent = io.StringIO()
    assert worker.main([str(folder), name], stdout=sent) == 0
    return json.loads(sent.getvalue().splitlines()[-1])["result"]


def test_compare_on_the_suite(done, tmp_path, monkeypatch, capsys):
    source, _ = done
    monkeypatch.setattr(run_grid, "__kwdefaults__", {**run_grid.__kwdefaults__, "run": in_this_process})
    command = ["compare", source, "--methods", "rtn,gptq", "--bits", "4", "--calib", "code", "--text", "suite"]
    command += ["--samples", 4, "--seqlen", 32, "--windows", 2, "--max-new-tokens", 1, "-o", tmp_path / "grid"]
    assert main([str(word) for word in [*command, "--keep-models"]]) == 0
    results = read_results(tmp_path / "grid" / "results.json")
    assert (results.settings.calibration.source, results.settings.evaluation.source) == ("code", "suite")
    assert results.settings.evaluation.domains == dict.fromkeys(SUITE, 2)
    for variant in results.done():
        assert list(variant.domains) == list(SUITE)
        mean = np.mean([of.kl_divergence for of in variant.domains.values()])
        assert variant.kl_divergence == pytest.approx(mean)
        folder = tmp_path / "grid" / "cells" / variant.name
        measured = json.loads((folder / "report.json").read_text())["measured"][-1]
        assert measured["domains"]["prose"]["kl_divergence"] == variant.domains["prose"].kl_divergence
    assert list(results.float.domains) == list(SUITE)
    assert "--text suite --windows 2" in results.commands[-1]
    page = (tmp_path / "grid" / "report.html").read_text()
    assert all(f"<figcaption>{name}</figcaption>" in page for name in SUITE)
    capsys.readouterr()
    other = [*command[: command.index("--text")], *command[command.index("--text") + 2 :]]
    assert main([str(word) for word in other]) != 0  # measured on another text
    assert "settings.evaluation" in capsys.readouterr().err


def test_packed_cache_by_domain(done):
    source, folder = done
    found = bitmill.evaluate(folder, text="suite", seqlen=32, windows=1, kv="per_token", reference=source)
    assert list(found["domains"]) == list(SUITE)
    assert found["kv_bits_per_element"] > 0
