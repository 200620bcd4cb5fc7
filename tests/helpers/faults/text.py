"""Invalid calibration text or windows."""

from __future__ import annotations

from pathlib import Path

from helpers.faults import Faults
from helpers.workspace import World

fault = Faults()


def text_of(world: World, content: bytes, name: str = "other.txt") -> Path:
    world.text = world.root / name
    world.text.write_bytes(content)
    return world.text


@fault
def text_missing(world, patch):
    world.text = world.root / "no.txt"
    return world.quantize(), ["no.txt"]


@fault
def text_empty(world, patch):
    text_of(world, b" \n")
    return world.quantize(), ["other.txt", "no text"]


@fault
def text_too_short(world, patch):
    text_of(world, b"w1 " * 30)
    return world.quantize(), ["24 tokens"]


@fault
def text_too_short_to_measure(world, patch):
    text_of(world, b"w1 " * 100)
    return world.quantize(), ["20 tokens"]


@fault
def text_not_utf8(world, patch):
    text_of(world, b"w1 w2 \xff\xfe w3")
    return world.quantize(), ["other.txt", "0xff"]


@fault
def text_jsonl_bad(world, patch):
    text_of(world, b'{"text": "w1"}\n{"text": 3}\n', "other.jsonl")
    return world.quantize(), ["Line 2", "other.jsonl"]


@fault
def text_jsonl_broken(world, patch):
    text_of(world, b'{"text": "w1"}\n{"te', "other.jsonl")
    return world.quantize(), ["Line 2", "other.jsonl"]


@fault
def text_is_a_folder(world, patch):
    world.text = world.source
    return world.quantize(), ["source"]


@fault
def windows_longer_than_the_model_reads(world, patch):
    return world.quantize("--seqlen", "65"), ["seqlen is 65", "64"]


@fault
def samples_zero(world, patch):
    return world.quantize("--samples", "0"), ["samples is 0"]


@fault
def seqlen_negative(world, patch):
    return world.quantize("--seqlen", "-4"), ["seqlen is -4"]


@fault
def measure_negative(world, patch):
    return world.quantize("--measure", "-1"), ["measure is -1"]
