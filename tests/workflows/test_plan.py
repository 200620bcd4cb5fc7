"""A plan matches the figures of the paper, quantized folders, and caches of transformers."""

from __future__ import annotations

import json

import huggingface_hub
import pytest
import torch
from transformers import AutoConfig

import bitmill
from bitmill.cli.options import parse_bytes, parse_tokens
from bitmill.errors import BitmillError, SourceError, UsageError
from bitmill.kv.scheme import kv_method
from bitmill.kv.size import cache_size
from bitmill.models.config_only import open_config_only
from bitmill.models.kv_shapes import CachedLayer, cached_layers
from bitmill.sources.zoo import bundled_configs
from bitmill.workflows.plan.plan import plan
from bitmill.workflows.plan.weights import WeightStorage
from helpers.tiny_gguf import write_gguf
from helpers.tiny_models import tiny_config, tiny_model

GB, GIB = 10**9, 2**30
MILLION = 1 << 20
LLAMA_7B_WEIGHTS = 6_738_415_616
BARE = "kvquant:outliers=0,key_outliers=0,residual=0"
PAPER = "kvquant:channel_levels=false,equalize=false,outliers=0.01,key_outliers=0.01,residual=0"


def chosen(result: dict, key: str) -> dict:
    (row,) = (row for row in result[key] if row["chosen"])
    return row


def size(result: dict, method: str, bits: int) -> int:
    (found,) = (r["size_bytes"] for r in result["cache"] if (r["method"], r["bits"]) == (method, bits))
    return found


def refused(*arguments: object, **options: object) -> str:
    with pytest.raises(BitmillError) as caught:
        plan(*arguments, **options)
    return str(caught.value)


def config_only(folder, model_type: str, **changes):
    tiny_config(model_type, **changes).save_pretrained(folder)
    return folder


def test_llama_7b_cache() -> None:
    """arXiv 2401.18079, table 8: 512 in fp16 and 64 at 2 bits, for 1M tokens; gigabytes of 2^30 bytes."""
    bare = plan("llama-7b", context=MILLION, kv=BARE, kv_bits=2)
    assert size(bare, "float16", 16) == 512 * GIB
    assert size(bare, "kvquant", 2) / GIB == pytest.approx(64, rel=0.003)
    assert chosen(bare, "cache")["options"] == {"outliers": 0, "key_outliers": 0, "residual": 0}
    with_outliers = chosen(plan("llama-7b", context=MILLION, kv=PAPER, kv_bits=2), "cache")
    assert with_outliers["bits_per_element"] == pytest.approx(2.33, abs=0.01)
    assert with_outliers["size_bytes"] / GIB == pytest.approx(74.6, rel=0.005)


def test_million_tokens_one_device() -> None:
    """Without outliers, fp16 weights fit only if 80 GB are 80 GiB; with outliers, only 4-bit weights fit."""
    terms = {"context": MILLION, "kv_bits": 2}
    four = WeightStorage(bits=4)
    assert chosen(plan("llama-7b", **terms, kv=BARE), "weights")["size_bytes"] == 2 * LLAMA_7B_WEIGHTS
    assert plan("llama-7b", **terms, kv=BARE, memory=80 * GIB)["fits"] is True
    assert plan("llama-7b", **terms, kv=BARE, memory=80 * GB)["fits"] is False
    assert plan("llama-7b", **terms, kv=BARE, memory=80 * GB, weights=four)["fits"] is True
    assert plan("llama-7b", **terms, kv=PAPER, memory=80 * GIB)["fits"] is False
    assert plan("llama-7b", **terms, kv=PAPER, memory=80 * GIB, weights=four)["fits"] is True
    assert plan("llama-7b", **terms, kv=PAPER, memory=80 * GB, weights=WeightStorage(bits=2))["fits"] is False


def test_ten_million_tokens_8_devices() -> None:
    """10^7 tokens at 2 bits are 611 GiB, which eight devices of 80 GiB have, and eight of 80 GB have not."""
    terms = {"context": 10**7, "kv_bits": 2, "devices": 8}
    assert plan("llama-7b", **terms, kv=BARE, memory=80 * GIB)["fits"] is True
    assert plan("llama-7b", **terms, kv=BARE, memory=80 * GB)["fits"] is False
    assert plan("llama-7b", **terms, kv=PAPER, memory=80 * GIB)["fits"] is False
    assert plan("llama-7b", **{**terms, "context": 10 * MILLION}, kv=BARE, memory=80 * GIB)["fits"] is False


def test_llama_65b_cache() -> None:
    """46.5 for nuq2-1%, which its text gives for 32K tokens, and which is what 128K take."""
    terms = {"kv": PAPER, "kv_bits": 2}
    sizes = [chosen(plan("llama-65b", context=n << 10, **terms), "cache")["size_bytes"] / GIB for n in (32, 128)]
    assert sizes == pytest.approx([11.7, 46.5], abs=0.05)


def test_needed_is_sum() -> None:
    result = plan(
        "llama-7b", context=4096, batch=3, devices=2, weights=WeightStorage(bits=4), kv="kivi", kv_bits=4
    )
    shared = chosen(result, "weights")["size_bytes"] + chosen(result, "cache")["size_bytes"]
    numbers = 2 * 4096 + 4 * 4096 + 2 * 11008 + 4096  # input, residual, and what seven linears put out
    assert result["activations"]["prompt_bytes"] == 3 * (2 * 512 * numbers + 4 * 32000)
    assert result["activations"]["decode_bytes"] == 3 * (2 * numbers + 4 * 32000)
    assert result["activations"]["float_layer_bytes"] == 3 * 4 * 2 * 4096 * 4096
    assert result["needed_bytes"] == -(-shared // 2) + result["activations"]["prompt_bytes"]
    assert result["fits"] is None
    assert result["longest"] == []
    assert result["measured"] == []


@pytest.mark.parametrize("devices", [1, 3])
def test_longest_context(devices: int) -> None:
    terms = {"memory": 24 * GB, "devices": devices, "kv": "kvquant", "kv_bits": 3}
    result = plan("llama-7b", **terms)
    name = chosen(result, "weights")["name"]
    rows = [
        r["tokens"] for r in result["longest"] if (r["weights"], r["method"], r["bits"]) == (name, "kvquant", 3)
    ]
    assert plan("llama-7b", context=rows[0], **terms)["fits"] is True
    assert plan("llama-7b", context=rows[0] + 1, **terms)["fits"] is False


def test_context_limits(tmp_path) -> None:
    assert {r["tokens"] for r in plan("llama-7b", memory=GB)["longest"]} == {0}
    windowed = config_only(tmp_path / "windowed", "mistral", sliding_window=16)
    assert {r["tokens"] for r in plan(windowed, memory=GB)["longest"]} == {None}


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [("llama", {}), ("llama", {"num_key_value_heads": 1}), ("qwen3", {}), ("opt", {}), ("gpt2", {}),
     ("mistral", {"sliding_window": 16}), ("gemma2", {"sliding_window": 16}),
     ("gemma3_text", {"sliding_window": 8, "num_hidden_layers": 7})],
)  # fmt: skip
def test_layers_match_transformers(model_type: str, changes: dict) -> None:
    model, tokens = tiny_model(model_type, **changes), 40
    cache = model(torch.ones(1, tokens, dtype=torch.int64), use_cache=True).past_key_values
    layers = cached_layers(model.config)
    assert len(layers) == len(cache.layers)
    for layer, kept in zip(layers, cache.layers, strict=True):
        assert kept.keys.shape[1::2] == (layer.heads, layer.dim)
        assert kept.keys.numel() + kept.values.numel() == layer.num_elements(tokens)


def test_sliding_windows(tmp_path) -> None:
    folder = config_only(tmp_path / "m", "gemma2", sliding_window=512, num_hidden_layers=4)
    result = plan(folder, context=100_000)
    assert [layer["window"] for layer in result["layers"]] == [512, None, 512, None]
    numbers = 2 * 2 * 8 * (2 * 511 + 2 * 100_000)  # 2 heads of 8
    assert chosen(result, "cache")["size_bytes"] == 2 * numbers
    method = kv_method("kvquant", 4)
    terms = {"uses_gradients": method.uses_gradients}
    parts = [cache_size(method.scheme(), 2, 8, 2, 100_000, window=window, **terms) for window in (512, None)]
    assert size(result, "kvquant", 4) == sum(part.total for part in parts)
    assert 90 * parts[0].codes < parts[1].codes


def test_weights_match_quantization(tmp_path) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "float")
    result = plan(tmp_path / "float", weights=WeightStorage("rtn", 3, {"group_size": "16"}, 8))
    stored = bitmill.quantize(tmp_path / "float", "rtn", bits=3, group_size=16, head_bits=8, dry_run=True).summary
    row = chosen(result, "weights")
    assert row["name"] == "rtn, 3 bits"
    assert (row["size_bytes"], row["bits_per_weight"]) == (stored["size_bytes"], stored["bits_per_weight"])
    assert result["weights"][0]["size_bytes"] == 2 * result["weights"][1]["size_bytes"]  # fp32, 16 bits
    assert [r["name"] for r in result["weights"][2:]] == [f"rtn, {bits} bits" for bits in (8, 4, 3, 2)]


def test_config_alone(tmp_path) -> None:
    model = tiny_model("llama").half()
    model.save_pretrained(tmp_path / "whole")
    model.config.save_pretrained(tmp_path / "bare")
    (tmp_path / "bare" / "pytorch_model.bin").touch()  # never opened
    whole, bare = (plan(tmp_path / name, kv="kvquant", kv_bits=2, memory=GB) for name in ("whole", "bare"))
    assert {**whole, "model": ""} == {**bare, "model": ""}


def test_packed_folder(tmp_path) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "float")
    windows = torch.randint(3, 128, (4, 16))
    bitmill.quantize(tmp_path / "float", "rtn", bits=4, out=tmp_path / "packed", calib=windows, measure=0)
    report = tmp_path / "packed" / "report.json"
    data = json.loads(report.read_text())
    measured = [{"by": "eval", "text": "pydoc", "split": "eval", "seqlen": 8, "windows": 1, "perplexity": 9.0}]
    report.write_text(json.dumps({**data, "measured": measured}))
    result = plan(tmp_path / "packed")
    assert result["measured"] == measured
    row = chosen(result, "weights")
    assert row["name"] == "as stored"
    same = bitmill.quantize(tmp_path / "float", "rtn", bits=4, dry_run=True).summary
    assert row["size_bytes"] == same["size_bytes"]


def test_gguf_runs_decoded(tmp_path) -> None:
    model = tiny_model("llama", hidden_size=64, intermediate_size=96, head_dim=16)
    path = write_gguf(tmp_path / "m.gguf", model, kinds={"blk.0.ffn_up.weight": "Q8_0"})
    result = plan(path)
    row = chosen(result, "weights")
    assert (row["name"], row["bits_per_weight"]) == ("16 bits", 16)
    assert result["weights"][0]["name"] == "as stored"
    assert result["weights"][0]["size_bytes"] < 2 * row["size_bytes"]


def test_hub_config_only(tmp_path, monkeypatch) -> None:
    asked = []
    folder = config_only(tmp_path / "snapshot", "qwen3")

    def download(model, *, revision, allow_patterns):
        asked.append((model, allow_patterns))
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert len(plan("org/name")["layers"]) == 2
    assert asked == [("org/name", ["config.json"])]


def test_experts(tmp_path) -> None:
    folder = config_only(tmp_path / "m", "mixtral", num_local_experts=2, num_experts_per_tok=1)
    stored, *packed = plan(folder)["weights"]
    assert packed
    assert all(row["size_bytes"] < stored["size_bytes"] for row in packed)


def test_config_source_has_no_weights() -> None:
    assert bundled_configs() == ["llama-65b", "llama-7b", "mistral-7b"]
    for name, weights in (
        ("llama-65b", 65_285_660_672),
        ("llama-7b", LLAMA_7B_WEIGHTS),
        ("mistral-7b", 7_241_732_096),
    ):
        source = open_config_only(name)
        assert sum(torch.Size(source.shape(n)).numel() for n in source.names()) == weights
    for ask in (source.fingerprint, source.tokenizer, lambda: source.tensor("lm_head.weight")):
        with pytest.raises(SourceError, match="has a config but no weights"):
            ask()
    with pytest.raises(SourceError, match="no tensor 'x'"):
        source.shape("x")


def test_invalid_input_refused(tmp_path) -> None:
    assert "--kv-bits is 3 and no method is named" in refused("llama-7b", kv_bits=3)
    assert "use 2, 3 or 4" in refused("llama-7b", kv="kvquant", kv_bits=8)
    assert "no kv method 'nope'" in refused("llama-7b", kv="nope")
    assert "no option 'foo'" in refused("llama-7b", kv="kivi:foo=1")
    assert "--gpus is 0" in refused("llama-7b", devices=0)
    assert "--batch is -1" in refused("llama-7b", batch=-1)
    assert "1 to 8 bits, not 9" in refused("llama-7b", weights=WeightStorage(bits=9))
    assert "is a text encoder" in refused(config_only(tmp_path / "bert", "bert"))
    config = AutoConfig.for_model("t5", num_layers=1)
    config.save_pretrained(tmp_path / "t5")
    assert "an encoder and a decoder" in refused(tmp_path / "t5")
    assert "keeps a state" in refused(config_only(tmp_path / "mamba", "mamba"))
    assert "kv_lora_rank is 512" in refused(config_only(tmp_path / "mla", "deepseek_v3"))
    assert "no model at" in refused(tmp_path / "absent")


@pytest.mark.parametrize(
    ("text", "size"),
    [("80GB", 80 * GB), ("80GiB", 80 * GIB), ("24g", 24 * GB), ("1.5 TiB", 1536 * GIB), ("512mib", GIB // 2)],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["80", "GB", "0GB", "-1GB", "80 pounds", ""])
def test_invalid_sizes(text: str) -> None:
    with pytest.raises(UsageError, match="80GiB"):
        parse_bytes(text)


def test_lengths() -> None:
    assert [parse_tokens(t) for t in ("4096", "128k", "1M", "1.5K", "10_000_000")] == [
        4096, 131072, MILLION, 1536, 10**7,
    ]  # fmt: skip
    for text in ("0", "k", "1g", "-5", "many"):
        with pytest.raises(UsageError, match="128k"):
            parse_tokens(text)


def test_layer_bytes() -> None:
    assert CachedLayer(2, 8).num_elements(100) == 2 * 2 * 8 * 100
    assert CachedLayer(2, 8, 64).num_elements(100) == 2 * 2 * 8 * 63
