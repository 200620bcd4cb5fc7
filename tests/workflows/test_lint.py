"""Lint says of good and bad checkpoints whether each engine loads them."""

from __future__ import annotations

import pytest

import bitmill
from bitmill.errors import UsageError
from bitmill.exports.base import Layer
from bitmill.formats.affine import Affine
from bitmill.formats.codebook import Codebook
from bitmill.formats.permuted import Permuted
from bitmill.formats.uniform import Uniform
from bitmill.workflows.lint.base import ENGINES, Described
from helpers.tiny_models import tiny_model

SIZES = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 16}
NAMES = ("q_proj", "k_proj", "v_proj", "o_proj")
FOUR = Uniform(4, 32, symmetric=True)


def described(kind, format=FOUR, shape=(64, 128), tied=False, model_type="llama", **others) -> Described:
    """A block whose layers have one format, but for `others`; None leaves one in float."""
    formats = {**dict.fromkeys(NAMES, format), **others}
    layers = {
        f"model.layers.0.self_attn.{n}": Layer(f, shape) for n, f in formats.items() if f and "head" not in n
    }
    layers |= {name: Layer(f, shape) for name, f in formats.items() if "head" in name}
    return Described(kind, layers, model_type, tied)


ZEROS, THREE, EIGHT = Uniform(4, 32), Uniform(3, 32, symmetric=True), Uniform(8, 32, symmetric=True)
GROUPS = Uniform(4, 16, symmetric=True)
TABLE = [  # a checkpoint, an engine, and what it finds; "" for nothing
    (described("gptq"), "vllm", ""),
    (described("gptq", EIGHT), "vllm", ""),
    (described("gptq", ZEROS), "vllm", "has zeros"),
    (described("gptq", THREE), "vllm", "has 3 bits"),
    (described("gptq", GROUPS), "vllm", "groups of 16"),
    (described("gptq", Permuted(FOUR)), "vllm", "desc_act"),
    (described("gptq"), "sglang", ""),
    (described("gptq", THREE), "sglang", "has 3 bits"),
    (described("gptq", THREE), "transformers", ""),
    (described("gptq", shape=(72, 128)), "transformers", "no multiple of 32"),
    (described("gptq"), "llama.cpp", "reads .gguf files"),
    (described("gptq"), "mlx", "its own checkpoints"),
    (described("awq", ZEROS), "vllm", ""),
    (described("awq", ZEROS), "sglang", ""),
    (described("awq", Uniform(4, 48)), "vllm", "groups of 48 of 128 columns"),
    (described("compressed-tensors", THREE), "vllm", ""),
    (described("compressed-tensors", Uniform(1, 32)), "vllm", "has 1 bits"),
    (described("compressed-tensors", THREE), "sglang", "has 3 bits"),
    (described("compressed-tensors", FOUR), "sglang", ""),
    (described("compressed-tensors", k_proj=EIGHT), "vllm", "has another format"),
    (described("compressed-tensors", v_proj=None), "vllm", "is in float"),
    (described("compressed-tensors", o_proj=EIGHT), "vllm", ""),
    (described("compressed-tensors", lm_head=FOUR, tied=True), "vllm", "tied to the embedding"),
    (described("compressed-tensors", lm_head=FOUR), "vllm", ""),
    (described("compressed-tensors", FOUR), "transformers", ""),
    (described("compressed-tensors", ZEROS), "transformers", "dequantize=True"),
    (described("mlx", Affine(4, 32)), "mlx", ""),
    (described("mlx", Affine(4, 32)), "vllm", "does not read mlx"),
    (described("mlx", Affine(4, 32)), "transformers", "no quantizer for mlx"),
    (described("gguf"), "llama.cpp", ""),
    (described("modelopt"), "transformers", "no quantizer for modelopt"),
    (described("bitmill"), "vllm", ""),
    (described("bitmill", Codebook(4)), "vllm", "cannot hold it"),
    (described("bitmill", Codebook(4)), "transformers", ""),
    (described("bitmill", Uniform(4, 48)), "llama.cpp", "groups of 48"),
    (described("bitmill", THREE), "llama.cpp", ""),
    (described("bitmill", model_type="opt"), "llama.cpp", "'opt' are not exported"),
    (described("bitmill", THREE), "mlx", ""),
    (described("bitmill", Uniform(7, 32)), "mlx", "has 7 bits"),
]


@pytest.mark.parametrize(("model", "engine", "expected"), TABLE)
def test_table(model, engine, expected):
    judge = ENGINES.get(engine)()
    found = list((judge.findings_of_folder if model.kind == "bitmill" else judge.findings)(model))
    assert bool(found) == bool(expected)
    assert expected in " ".join(finding.reason for finding in found)
    assert all(finding.layer in {"", "model.layers.0.self_attn.v_proj", *model.layers} for finding in found)


def test_files_and_recipes(tmp_path):
    model = tiny_model("llama", **SIZES)
    model.save_pretrained(tmp_path / "float")
    bitmill.quantize(model, "rtn", bits=3, group_size=32, out=tmp_path / "packed", measure=0)
    assert bitmill.lint(tmp_path / "packed", "vllm").loads
    bitmill.export(tmp_path / "packed", "gptq", tmp_path / "gptq")
    result = bitmill.lint(tmp_path / "gptq", "vllm")
    assert not result.loads
    assert "has 3 bits" in str(result)
    assert "judged from its source" in str(result)
    asked = {"method": "rtn", "options": {"bits": 3, "group_size": 32}}
    assert bitmill.lint(tmp_path / "float", "mlx", **asked).loads
    assert not bitmill.lint(tmp_path / "float", "sglang", **asked).loads
    with pytest.raises(UsageError, match=r"There is no engine 'trt'; choose one of llama\.cpp, mlx"):
        bitmill.lint(tmp_path / "packed", "trt")
