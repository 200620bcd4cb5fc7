"""A folder measured on the suite: figures of every domain, recorded, shown and verified."""

from __future__ import annotations

import json
import random
import re

import numpy as np
import pytest

import bitmill
from bitmill.cli.main import main
from bitmill.data.domain import SUITE, Document
from bitmill.report import formatting
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


def test_measured_on_the_suite(done, capsys):
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
