"""The record of a folder says how its calibration windows were cut from documents."""

from __future__ import annotations

import json

import pytest

import bitmill
from bitmill.config.texts import VARIABLE
from bitmill.data.domain import SUITE, Document
from helpers import tiny_domains
from helpers.workspace import save_model


@pytest.fixture
def model(tmp_path, monkeypatch):
    """A tiny model with a tokenizer; every domain in its words."""
    documents = [Document(f"{n}", f"w{n % 50} " * 30) for n in range(40)]
    tiny_domains.install(monkeypatch, dict.fromkeys((*SUITE, "languages"), documents))
    return save_model(tmp_path / "model")


def test_record_of_weights(model, tmp_path):
    calib = bitmill.CalibrationData("mix", samples=4, seqlen=16)
    report = bitmill.quantize(model, "gptq", calib=calib, measure=2, out=tmp_path / "out").report
    counts = {"prose": 1, "encyclopedia": 1, "dialogue": 1, "code": 1, "documentation": 0, "languages": 0}
    found = report["identity"]["calibration"]
    assert (found["source"], found["part"], found["domains"]) == ("mix", "calib", counts)
    assert len(found["separator"]) == 1
    measured = report["measured"][0]
    assert (measured["text"], measured["part"]) == ("mix", "eval")
    assert {name: of["windows"] for name, of in measured["domains"].items()} == dict.fromkeys(SUITE, 2)
    assert (measured["windows"], measured["windows_per_domain"]) == (10, 2)


def test_record_of_keys_and_values(model, tmp_path):
    calib = bitmill.CalibrationData("prose", samples=4, seqlen=40)
    kv = {"kv": "kvquant", "kv_bits": 3, "kv_samples": 3, "kv_seqlen": 40}
    done = bitmill.quantize(model, "none", calib=calib, measure=0, out=tmp_path / "out", **kv)
    about = json.loads((tmp_path / "out" / "report.json").read_text())["kv"]["calibration"]
    assert (about["source"], about["domains"]) == ("prose", {"prose": 3})
    assert done.report["kv"]["calibration"] == about


def test_default_text(monkeypatch):
    monkeypatch.delenv(VARIABLE)
    assert bitmill.CalibrationData().source == "mix"
    monkeypatch.setenv(VARIABLE, "pydoc")
    assert bitmill.CalibrationData().source == "pydoc"
