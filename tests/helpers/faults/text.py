"""Invalid calibration text or windows."""

from __future__ import annotations

from pathlib import Path

from helpers.faults import Faults
from helpers.workspace import Workspace

fault = Faults()


def text_of(workspace: Workspace, content: bytes, name: str = "other.txt") -> Path:
    workspace.text = workspace.root / name
    workspace.text.write_bytes(content)
    return workspace.text


@fault
def text_missing(workspace, patch):
    workspace.text = workspace.root / "no.txt"
    return workspace.quantize(), ["no.txt"]


@fault
def text_empty(workspace, patch):
    text_of(workspace, b" \n")
    return workspace.quantize(), ["other.txt", "no text"]


@fault
def text_too_short(workspace, patch):
    text_of(workspace, b"w1 " * 30)
    return workspace.quantize(), ["24 tokens"]


@fault
def text_too_short_to_measure(workspace, patch):
    text_of(workspace, b"w1 " * 100)
    return workspace.quantize(), ["20 tokens"]


@fault
def text_not_utf8(workspace, patch):
    text_of(workspace, b"w1 w2 \xff\xfe w3")
    return workspace.quantize(), ["other.txt", "0xff"]


@fault
def text_jsonl_bad(workspace, patch):
    text_of(workspace, b'{"text": "w1"}\n{"text": 3}\n', "other.jsonl")
    return workspace.quantize(), ["Line 2", "other.jsonl"]


@fault
def text_jsonl_broken(workspace, patch):
    text_of(workspace, b'{"text": "w1"}\n{"te', "other.jsonl")
    return workspace.quantize(), ["Line 2", "other.jsonl"]


@fault
def text_is_a_folder(workspace, patch):
    workspace.text = workspace.source
    return workspace.quantize(), ["source"]


@fault
def windows_longer_than_the_model_reads(workspace, patch):
    return workspace.quantize("--seqlen", "65"), ["seqlen is 65", "64"]


@fault
def samples_zero(workspace, patch):
    return workspace.quantize("--samples", "0"), ["samples is 0"]


@fault
def seqlen_negative(workspace, patch):
    return workspace.quantize("--seqlen", "-4"), ["seqlen is -4"]


@fault
def measure_negative(workspace, patch):
    return workspace.quantize("--measure", "-1"), ["measure is -1"]
