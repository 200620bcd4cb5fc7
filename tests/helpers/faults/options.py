"""Invalid options and recipes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from helpers.faults import Faults
from helpers.workspace import Workspace

fault = Faults()


def with_options(*options: str, method: str = "gptq", words: list[object]):
    def spoil(workspace, patch):
        command = ["quantize", str(workspace.source), "--calib", "text.txt", "--samples", "4", "--seqlen", "32"]
        return [*command, "--method", method, "-o", str(workspace.out), *options], words

    return spoil


fault |= {
    "bits 0": with_options("--bits", "0", words=["not 0"]),
    "bits 9": with_options("--bits", "9", words=["not 9"]),
    "bits x": with_options("--bits", "x", words=["bits", "'x'"]),
    "bits 2.5": with_options("--set", "bits=2.5", words=["bits", "'2.5'"]),
    "bits twice": with_options("--bits", "3", "--set", "bits=4", words=["--bits 3", "bits=4"]),
    "group size -7": with_options("--group-size", "-7", words=["'-7'"]),
    "group size wide": with_options("--group-size", "wide", words=["'wide'"]),
    "head bits 5": with_options("--head-bits", "5", words=["head_bits is 5", "8, 6 or 4"]),
    "head bits 0": with_options("--head-bits", "0", words=["head_bits is 0"]),
    "head bits 16": with_options("--head-bits", "16", words=["head_bits is 16"]),
    "head bits many": with_options("--head-bits", "many", words=["many"]),
    "set without value": with_options("--set", "damp", words=["'damp'"]),
    "set without key": with_options("--set", "=3", words=["'=3'"]),
    "set unknown key": with_options("--set", "dumb=3", words=["'dumb'", "damp"]),
    "set twice": with_options("--set", "damp=3", "--set", "damp=4", words=["damp", "'4'"]),
    "set word for number": with_options("--set", "damp=much", words=["damp", "'much'"]),
    "set nan": with_options("--set", "damp=nan", words=["damp", "nan"]),
    "set negative": with_options("--set", "damp=-1", words=["damp", "-1"]),
    "set word for truth": with_options("--set", "act_order=maybe", words=["act_order", "'maybe'"]),
    "set contradiction": with_options("--set", "static_groups=false", words=["act_order"]),
    "method unknown": with_options(method="gtpq", words=["'gtpq'", "gptq"]),
    "recipe missing": with_options(method="none.yaml", words=["none.yaml"]),
    "recipe with options": with_options("--bits", "3", method="none.yaml", words=["none.yaml", "bits"]),
    "device unknown": with_options("--device", "toaster", words=["'toaster'"]),
    "flag unknown": with_options("--bit", "3", words=["--bit"]),
    "number wanted": with_options("--samples", "many", words=["many"]),
}


@fault
def device_not_available(workspace, patch):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    return workspace.quantize("--device", "cuda"), ["'cuda'"]


def recipe_of(workspace: Workspace, change: Callable[[str], str]) -> list[str]:
    path = workspace.root / "mine.yaml"
    path.write_text(change((workspace.done / "recipe.yaml").read_text()))
    command = ["quantize", str(workspace.source), "--calib", "text.txt", "--samples", "4", "--seqlen", "32"]
    return [*command, "--method", str(path), "-o", str(workspace.out)]


@fault
def recipe_no_yaml(workspace, patch):
    return recipe_of(workspace, lambda text: text.replace("weight:", "weight: {[")), ["YAML"]


@fault
def recipe_empty(workspace, patch):
    return recipe_of(workspace, lambda text: ""), ["recipe"]


@fault
def recipe_unknown_key(workspace, patch):
    return recipe_of(workspace, lambda text: text + "extra: 1\n"), ["extra"]


@fault
def recipe_unknown_format(workspace, patch):
    return recipe_of(workspace, lambda text: text.replace("format: uniform", "format: round")), ["'round'"]


@fault
def recipe_unknown_field(workspace, patch):
    return recipe_of(workspace, lambda text: text.replace("symmetric:", "symmetrical:")), ["symmetrical"]


@fault
def recipe_word_for_number(workspace, patch):
    return recipe_of(workspace, lambda text: text.replace("bits: 4", "bits: four")), ["'four'"]


@fault
def recipe_ignores_everything(workspace, patch):
    return recipe_of(workspace, lambda text: text.replace("ignore: []", "ignore: ['*']")), ["ignores every"]


@fault
def recipe_head_that_decodes_as_a_whole(workspace, patch):
    rotated = "head: {format: rotated, kind: hadamard, inner: {format: uniform, bits: 4}}\n"
    return recipe_of(workspace, lambda text: text + rotated), ["'rotated'", "uniform"]
