"""Fields of another type or value in a folder's documents end in one of bitmill's errors, or change nothing."""

from __future__ import annotations

import copy
import json
import random
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

import bitmill
from bitmill.checkpoint.reader import open_checkpoint
from bitmill.checkpoint.verify import verify
from bitmill.errors import BitmillError
from bitmill.evaluation.generate import eos_tokens
from bitmill.files import file_records
from bitmill.workflows.load import load_tokenizer
from bitmill.workflows.trial import try_folder
from helpers.tiny_models import tiny_model
from helpers.workspace import save_model

VALUES = (
    None,
    True,
    0,
    -1,
    10**9,
    10**30,
    1.5,
    float("nan"),
    "",
    "x",
    "\0",
    "../x",
    [],
    {},
    [1],
    [None],
    {"a": 1},
)
DOCUMENTS = ("config.json", "report.json", "model.safetensors.index.json", "tokenizer_config.json")


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("documents")
    bitmill.quantize(
        save_model(root / "source"), "rtn", bits=4, group_size=16, head_bits=4, out=root / "out", measure=0
    )
    return root / "out"


def places(data: Any, above: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in items:
        yield (*above, key)
        yield from places(value, (*above, key))


def mutated(document: Any, rng: random.Random) -> Any:
    document = copy.deepcopy(document)
    every = list(places(document))
    place = rng.choice(every if rng.random() < 0.7 else [p for p in every if len(p) < 3])
    inner = document
    for key in place[:-1]:
        inner = inner[key]
    if rng.random() < 0.15 and isinstance(inner, dict):
        del inner[place[-1]]
    else:
        inner[place[-1]] = rng.choice(VALUES)
    return document


def record(folder: Path) -> None:
    """Record the files as they are, so that no comparison of sizes and digests hides what is in them."""
    report = json.loads((folder / "report.json").read_text())
    if isinstance(report, dict):
        report["files"] = file_records(folder, {"report.json", "README.md", "report.html"})
        (folder / "report.json").write_text(json.dumps(report))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("name", DOCUMENTS)
def test_mutated_documents(written, name, seed, tmp_path):
    rng = random.Random(f"{name} {seed}")
    for turn in range(3):
        folder = shutil.copytree(written, tmp_path / str(turn))
        document = mutated(json.loads((folder / name).read_text()), rng)
        (folder / name).write_text(json.dumps(document))
        if name != "report.json":
            record(folder)
        with suppress(BitmillError):
            checkpoint = open_checkpoint(folder)
            assert list(checkpoint.layers())
            verify(checkpoint)
            try_folder(checkpoint)
            eos_tokens(bitmill.load(folder), load_tokenizer(folder))


@pytest.mark.parametrize("key", ["num_hidden_layers", "vocab_size"])
def test_number_that_no_model_has(written, key, tmp_path):
    """It is refused before transformers builds a list or modules of that length."""
    folder = shutil.copytree(written, tmp_path / "out")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, key: 10**13}))
    record(folder)
    for refuses in (open_checkpoint, bitmill.load, load_tokenizer):
        with pytest.raises(BitmillError, match=f"gives '{key}' as 10000000000000"):
            refuses(folder)


def test_overflow_in_stated_dtype(tmp_path):
    """A model that was measured in float32 is not sound where the dtype of its config cannot hold it."""
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(1e7)
    out = bitmill.quantize(model, "rtn", bits=4, group_size=16, out=tmp_path / "out", measure=0).out
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, "dtype": "float16"}))
    record(out)
    with pytest.raises(BitmillError, match="gives NaN or Inf in float16"):
        try_folder(open_checkpoint(out))
