"""Tensors of other programs become matrices that decode to the numbers of their readers to the bit."""

from __future__ import annotations

import json

import pytest
import torch

from bitmill.errors import SourceError
from bitmill.exports.base import TARGETS, Layer
from bitmill.formats.normal_float import NormalFloat
from bitmill.formats.nvfp4 import NVFP4
from bitmill.formats.permuted import Permuted
from bitmill.formats.quantized import fit_matrix, nearest_matrix
from bitmill.formats.quantized_inputs import QuantizedInputs
from bitmill.formats.uniform import Uniform
from bitmill.imports.base import IMPORTERS
from bitmill.numerics.minifloat import ELEMENTS
from bitmill.numerics.packing import pack

OUT, IN = 64, 96


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def weights(shape=(OUT, IN)) -> torch.Tensor:
    return torch.randn(shape, generator=generator())


def held(name: str) -> list[Uniform]:
    bits = {"gptq": (2, 3, 4, 8), "awq": (4,), "compressed-tensors": range(1, 9)}[name]
    return [
        Uniform(bits=b, group_size=group, symmetric=symmetric)
        for b in bits
        for group in (32, "row")
        for symmetric in (True, False)
    ]


@pytest.mark.parametrize(
    ("name", "format"), [(name, f) for name in ("gptq", "awq", "compressed-tensors") for f in held(name)]
)
def test_what_is_exported(name, format):
    """Codes, scales and zeros come back."""
    quantized = nearest_matrix(format, weights(), fit_matrix(format, weights(), None, search=False))
    target, layer = TARGETS.get(name)(), Layer(format, quantized.shape)
    importer = IMPORTERS.get(name)(target.config({"a": layer}, []))
    made = importer.quantized("a", target.tensors(quantized))
    assert made.format == format
    assert torch.equal(made.codes, quantized.codes)
    assert made.params.keys() == quantized.params.keys()
    assert all(torch.equal(value, quantized.params[key]) for key, value in made.params.items())


def gptq_tensors(bits: int, group: int, order: torch.Tensor | None = None):
    codes = torch.randint(0, 1 << bits, (OUT, IN), generator=generator()).to(torch.uint8)
    zero = torch.randint(1, 1 << bits, (OUT, IN // group), generator=generator())
    scale = (torch.rand(OUT, IN // group, generator=generator()) + 0.1).half()
    index = torch.arange(IN) // group if order is None else (torch.arange(IN) // group)[order]
    tensors = {
        "qweight": pack(codes, bits).T.contiguous(),
        "qzeros": pack((zero.T - 1).contiguous(), bits),
        "scales": scale.T.contiguous(),
        "g_idx": index.to(torch.int32),
    }
    return tensors, (codes.float() - zero[:, index]) * scale.float()[:, index]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptq_with_shuffled_groups(bits):
    tensors, expected = gptq_tensors(bits, 32, torch.randperm(IN, generator=generator(1)))
    importer = IMPORTERS.get("gptq")({"bits": bits, "group_size": 32, "desc_act": True})
    made = importer.quantized("a", tensors)
    assert isinstance(made.format, Permuted)
    assert torch.equal(made.dequantize(), expected)


def test_gptq_refused():
    tensors, _ = gptq_tensors(4, 32)
    importer = IMPORTERS.get("gptq")({"bits": 4, "group_size": 32})
    with pytest.raises(SourceError, match="no tensor 'qzeros'"):
        importer.quantized("a", {k: v for k, v in tensors.items() if k != "qzeros"})
    with pytest.raises(SourceError, match="groups that do not have 32 columns"):
        importer.quantized("a", {**tensors, "g_idx": torch.zeros(IN, dtype=torch.int32)})
    with pytest.raises(SourceError, match="A zero is 16"):
        importer.quantized("a", {**tensors, "qzeros": torch.full_like(tensors["qzeros"], -1)})
    with pytest.raises(SourceError, match="NaN or infinite"):
        importer.quantized("a", {**tensors, "scales": torch.full_like(tensors["scales"], torch.inf)})
    with pytest.raises(SourceError, match="format 'marlin'"):
        IMPORTERS.get("gptq")({"checkpoint_format": "marlin"})


def compressed(format: str, weights: dict, **group):
    described = {"targets": ["Linear"], "format": format, "weights": weights, **group}
    return IMPORTERS.get("compressed-tensors")({"format": format, "config_groups": {"group_0": described}})


def test_padded_words_of_earlier_releases():
    """Ten codes of 3 bits a word."""
    codes = torch.randint(0, 8, (OUT, IN), generator=generator())
    padded = torch.zeros(OUT, 100, dtype=torch.int64)
    padded[:, :IN] = codes
    words = (padded.view(OUT, 10, 10) << torch.arange(10) * 3).sum(-1).to(torch.int32)
    scale = torch.rand(OUT, 1, generator=generator()).bfloat16()
    importer = compressed("pack-quantized", {"num_bits": 3, "symmetric": True, "strategy": "channel"})
    importer.dense = False
    tensors = {"weight_packed": words, "weight_scale": scale, "weight_shape": torch.tensor([OUT, IN])}
    assert torch.equal(importer.quantized("a", tensors).dequantize(), (codes - 4) * scale.float())


def test_fp32_scales():
    """A scale that fp16 cannot hold is stored in fp32."""
    codes = torch.randint(-128, 128, (OUT, IN), generator=generator()).to(torch.int8)
    scale = torch.rand(OUT, 1, generator=generator())
    token = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
    importer = compressed("int-quantized", {"num_bits": 8, "strategy": "channel"}, input_activations=token)
    made = importer.quantized("a", {"weight": codes, "weight_scale": scale})
    assert isinstance(made.format, QuantizedInputs)
    assert made.format.inner == Uniform(8, "row", symmetric=True, scale_type="float32")
    assert torch.equal(made.dequantize(), codes * scale)


@pytest.mark.parametrize(
    "scale", [torch.tensor([0.37]), torch.rand(OUT, 1), torch.rand(2, 3), torch.rand(OUT, 1).bfloat16()]
)
def test_fp8(scale):
    weight = weights().to(torch.float8_e4m3fn)
    importer = compressed("float-quantized", {"num_bits": 8, "type": "float", "block_structure": [32, 32]})
    made = importer.quantized("a", {"weight": weight, "weight_scale": scale})
    each = scale.float()
    if scale.shape == (2, 3):
        each = each.repeat_interleave(32, 0).repeat_interleave(32, 1)
    assert torch.equal(made.dequantize(), weight.float() * each)


def e2m1(packed: torch.Tensor) -> torch.Tensor:
    values = ELEMENTS["e2m1"].values()
    return torch.stack([values[(packed & 15).long()], values[(packed >> 4).long()]], -1).flatten(1)


@pytest.mark.parametrize("divisor", [1024.0, 1000.0, 2688 / 3.3])
def test_nvfp4(divisor):
    packed = torch.randint(0, 256, (OUT, IN // 2), generator=generator()).to(torch.uint8)
    scale = (torch.rand(OUT, IN // 16, generator=generator()) * 400).to(torch.float8_e4m3fn)
    whole = torch.tensor([divisor])
    importer = compressed("nvfp4-pack-quantized", {"num_bits": 4, "type": "float", "group_size": 16})
    tensors = {"weight_packed": packed, "weight_scale": scale, "weight_global_scale": whole}
    made = importer.quantized("a", tensors)
    assert torch.equal(made.dequantize(), e2m1(packed) * (scale.float() / whole).repeat_interleave(16, 1))
    assert isinstance(made.format, NVFP4) or divisor != 1024
    of_nvidia = IMPORTERS.get("modelopt")({})
    made = of_nvidia.quantized("a", {"weight": packed, "weight_scale": scale, "weight_scale_2": 1 / whole})
    assert torch.equal(made.dequantize(), e2m1(packed) * (scale.float() * (1 / whole)).repeat_interleave(16, 1))


def test_mxfp4():
    packed = torch.randint(0, 256, (OUT, IN // 2), generator=generator()).to(torch.uint8)
    scale = torch.randint(110, 130, (OUT, IN // 32), generator=generator()).to(torch.uint8)
    importer = compressed("mxfp4-pack-quantized", {"num_bits": 4, "type": "float", "group_size": 32})
    made = importer.quantized("a", {"weight_packed": packed, "weight_scale": scale})
    assert torch.equal(made.dequantize(), e2m1(packed) * (2.0 ** (scale.float() - 127)).repeat_interleave(32, 1))
    with pytest.raises(SourceError, match="is NaN"):
        importer.quantized("a", {"weight_packed": packed, "weight_scale": torch.full_like(scale, 255)})


@pytest.mark.parametrize("nested", [False, True])
def test_nf4(nested):
    rows, columns, block = 8, 128, 64
    packed = torch.randint(0, 256, (rows * columns // 2, 1), generator=generator()).to(torch.uint8)
    table = NormalFloat(4).table(torch.device("cpu")).values
    absmax = torch.rand(rows * columns // block, generator=generator())
    state = {"blocksize": block, "shape": [rows, columns], "nested_blocksize": 256, "nested_offset": 0.03}
    tensors = {"weight": packed, "weight.absmax": absmax, "weight.quant_map": table}
    if nested:
        levels = torch.rand(256, generator=generator())
        tensors["weight.absmax"] = torch.arange(len(absmax)).to(torch.uint8)
        tensors |= {"weight.nested_quant_map": levels, "weight.nested_absmax": torch.tensor([0.7])}
        absmax = levels[: len(absmax)] * 0.7 + 0.03
    encoded = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    tensors["weight.quant_state.bitsandbytes__nf4"] = encoded
    importer = IMPORTERS.get("bitsandbytes")({"load_in_4bit": True})
    assert importer.layers([f"a.{part}" for part in tensors]) == {"a": {part: f"a.{part}" for part in tensors}}
    codes = torch.stack([packed >> 4, packed & 15], -1).view(rows, columns).long()
    expected = absmax.view(rows, -1).repeat_interleave(block, 1) * table[codes]
    assert torch.equal(importer.quantized("a", tensors).dequantize(), expected)
    with pytest.raises(SourceError, match="quant_state of 'a' is damaged"):
        importer.quantized("a", {**tensors, "weight.quant_state.bitsandbytes__nf4": encoded[:5]})


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_mlx(bits):
    codes = torch.randint(0, 1 << bits, (OUT, 64), generator=generator())
    scales, biases = torch.rand(OUT, 2).bfloat16(), torch.randn(OUT, 2).bfloat16()
    importer = IMPORTERS.get("mlx")({"bits": 8, "group_size": 32, "a": {"bits": bits}})
    tensors = {"weight": pack(codes, bits).view(torch.uint32), "scales": scales, "biases": biases}
    expected = codes * scales.float().repeat_interleave(32, 1) + biases.float().repeat_interleave(32, 1)
    assert torch.equal(importer.quantized("a", tensors).dequantize(), expected)


def test_settings_that_are_refused():
    with pytest.raises(SourceError, match="rotates inputs"):
        IMPORTERS.get("compressed-tensors")({"transform_config": {"a": 1}})
    with pytest.raises(SourceError, match="sparse"):
        IMPORTERS.get("compressed-tensors")({"sparsity_config": {"format": "sparse-24-bitmask"}})
    with pytest.raises(SourceError, match="int8; nf4 is read"):
        IMPORTERS.get("bitsandbytes")({"load_in_8bit": True, "load_in_4bit": False})
    with pytest.raises(SourceError, match="mode 'mxfp4'"):
        IMPORTERS.get("mlx")({"mode": "mxfp4"})
    with pytest.raises(SourceError, match="version 'gemv'"):
        IMPORTERS.get("awq")({"version": "gemv"})


def packed_tensors(index: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Codes of 4 bits in groups of 32 columns that `index` names, as compressed-tensors packs them."""
    codes = torch.randint(0, 16, (OUT, IN), generator=generator()).to(torch.uint8)
    scale = (torch.rand(OUT, IN // 32, generator=generator()) + 0.1).half()
    tensors = {"weight_packed": pack(codes, 4), "weight_scale": scale, "weight_g_idx": index.to(torch.int32)}
    return tensors, (codes.float() - 8) * scale.float()[:, index.long().clamp(max=IN // 32 - 1)]


INTEGERS = {"num_bits": 4, "group_size": 32, "type": "int", "symmetric": True}


@pytest.mark.parametrize("kind", ["pack-quantized", "int-quantized"])
def test_compressed_tensors_with_shuffled_groups(kind):
    index = (torch.arange(IN) // 32)[torch.randperm(IN, generator=generator(1))]
    tensors, expected = packed_tensors(index)
    if kind == "int-quantized":
        codes = torch.randint(0, 16, (OUT, IN), generator=generator()).to(torch.int8) - 8
        tensors = {"weight": codes, **{k: v for k, v in tensors.items() if k != "weight_packed"}}
    assert torch.equal(compressed(kind, INTEGERS).quantized("a", tensors).dequantize(), expected)


@pytest.mark.parametrize(
    "index", [torch.tensor([0] * 20 + [1] * 44 + [2] * 32), torch.zeros(IN), torch.zeros(IN - 16)]
)
def test_compressed_tensors_with_uneven_groups(index):
    importer = compressed("pack-quantized", INTEGERS)
    with pytest.raises(SourceError, match=r"weight_g_idx|groups that do not have 32 columns"):
        importer.quantized("a", packed_tensors(torch.zeros(IN))[0] | {"weight_g_idx": index.to(torch.int32)})


@pytest.mark.parametrize("name", IMPORTERS.names())
def test_unknown_tensors_are_refused(name):
    """A tensor such as ModelOpt's pre_quant_scale changes what a layer computes."""
    kind = IMPORTERS.get(name)
    importer = kind({"bits": 4, "group_size": 32})
    importer.check_parts("a", kind.reads | kind.passes_over)
    with pytest.raises(SourceError, match="'pre_quant_scale' is not read"):
        importer.check_parts("a", {kind.marker, "pre_quant_scale"})


def test_blocks_in_words():
    weight = torch.randn(130, 256, generator=generator()).to(torch.float8_e4m3fn)
    scale = torch.rand(2, 2, generator=generator()) + 0.1
    made = {}
    for block in ("128x128", [128, 128]):
        importer = compressed("float-quantized", {"num_bits": 8, "type": "float", "block_structure": block})
        made[str(block)] = importer.quantized("a", {"weight": weight, "weight_scale": scale}).dequantize()
    assert torch.equal(*made.values())
    with pytest.raises(SourceError, match="3 blocks of 128 rows, for 130"):
        importer.quantized("a", {"weight": weight, "weight_scale": torch.ones(3, 2)})


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        ("gptq", {"bits": 4, "dynamic": {"+:.*down.*": {"bits": 8}}}, "bits by layer"),
        ("awq", {"bits": "8"}, "of 8 bits"),
    ],
)
def test_variants_are_refused_by_name(name, config, message):
    with pytest.raises(SourceError, match=message):
        IMPORTERS.get(name)(config)
    IMPORTERS.get("awq")({"bits": "4"})
