"""An unfinished run does not match the new one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable

from helpers.faults import Faults
from helpers.workspace import save_model

fault = Faults()


@fault
def unfinished_run(workspace, patch):
    return workspace.quantize(out=workspace.half), [workspace.partial, "--resume"]


@fault
def resume_with_another_recipe(workspace, patch):
    return workspace.quantize("--resume", "--bits", "3", out=workspace.half), [
        "recipe.weight.bits",
        "was 4",
        "now 3",
    ]


@fault
def resume_with_another_calibration(workspace, patch):
    return workspace.quantize("--resume", "--seed", "1", out=workspace.half), ["calibration.seed"]


@fault
def resume_with_another_text(workspace, patch):
    workspace.text.write_text(workspace.text.read_text().replace("w1 ", "w2 "))
    return workspace.quantize("--resume", out=workspace.half), ["calibration.sha256"]


@fault
def resume_with_another_model(workspace, patch):
    shutil.rmtree(workspace.source)
    save_model(workspace.source, seed=1)
    return workspace.quantize("--resume", out=workspace.half), ["model was"]


@fault
def resume_with_an_altered_shard(workspace, patch):
    shard = next((workspace.partial / "model").glob("*.safetensors"))
    raw = bytearray(shard.read_bytes())
    raw[-1] ^= 1
    shard.write_bytes(raw)
    return workspace.quantize("--resume", out=workspace.half), [shard]


@fault
def resume_without_a_shard(workspace, patch):
    shard = next((workspace.partial / "model").glob("*.safetensors"))
    shard.unlink()
    return workspace.quantize("--resume", out=workspace.half), [shard]


def journal_fault(change: Callable[[dict], object], words: list[object]):
    def spoil(workspace, patch):
        path = workspace.partial / "journal.json"
        journal = json.loads(path.read_text())
        change(journal)
        path.write_text(json.dumps(journal))
        return workspace.quantize("--resume", out=workspace.half), [workspace.partial, *words]

    return spoil


fault |= {
    "journal without blocks": journal_fault(lambda j: j.pop("blocks"), ["journal.json"]),
    "journal with blocks of no use": journal_fault(lambda j: j.update(blocks=[1]), ["journal.json"]),
    "journal entry without file": journal_fault(lambda j: j["blocks"][0].pop("file"), ["journal.json"]),
    "journal of another version": journal_fault(
        lambda j: j["identity"]["versions"].update(torch="1.0"), ["versions.torch", "'1.0'"]
    ),
    "journal with a wrong shape": journal_fault(
        lambda j: next(iter(j["blocks"][0]["layers"].values())).update(shape=[1, 2, 3]), ["journal.json"]
    ),
}


@fault
def journal_broken(workspace, patch):
    path = workspace.partial / "journal.json"
    path.write_text(path.read_text()[:-50])
    return workspace.quantize("--resume", out=workspace.half), [path]


@fault
def finished_with_another_recipe(workspace, patch):
    return workspace.quantize("--resume", "--bits", "3", out=workspace.done), ["recipe.weight.bits"]
