"""The two layouts of a packed matrix, on disk and in a kernel: only one is in memory, conversions are exact."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import bitmill
from bitmill.formats.additive import Additive
from bitmill.formats.pyramid import Pyramid
from bitmill.formats.quantized import Quantized
from bitmill.formats.uniform import Uniform
from bitmill.runtime.kernels.base import KERNELS, Kernel, KernelSpec
from bitmill.runtime.kernels.reference import Reference
from bitmill.runtime.modules.embedding import QuantEmbedding
from bitmill.runtime.modules.linear import QuantLinear
from helpers.native_kernels import needs_native, quantized
from helpers.tiny_models import tiny_model

pytestmark = needs_native
FORMATS = [*(Uniform(bits, 16) for bits in (4, 6, 8)), Uniform(3), Pyramid(2), Additive(4)]
IDS = torch.randint(3, 128, (2, 9), generator=torch.Generator().manual_seed(1))
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _fastest(monkeypatch):
    monkeypatch.delenv("BITMILL_KERNEL", raising=False)
    monkeypatch.delenv("BITMILL_ACTIVATIONS", raising=False)


def kernel_name(matrix: nn.Module) -> str | None:
    return None if matrix.kernel is None else KERNELS.name_of(type(matrix.kernel))


def held_bytes(model: nn.Module) -> int:
    return sum({t.data_ptr(): t.nbytes for t in (*model.parameters(), *model.buffers())}.values())


@torch.no_grad()
def answer(model: nn.Module) -> Tensor:
    return model(IDS).logits


def layer_of(matrix: Quantized) -> QuantLinear:
    layer = QuantLinear(matrix.format, matrix.shape, bias=False)
    layer.load_state_dict(matrix.pack())
    return layer


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def folder(request, tmp_path):
    model = tiny_model("llama", tie_word_embeddings=request.param)
    bitmill.quantize(model, "rtn", out=tmp_path / "out", head_bits=4, calib=IDS, measure=0)
    return tmp_path / "out"


def test_tied_head(folder, monkeypatch):
    model = bitmill.load(folder)
    table, head = model.model.embed_tokens, model.lm_head
    before = held_bytes(model)
    with monkeypatch.context() as patch:
        patch.setenv("BITMILL_KERNEL", "reference")
        reference = bitmill.load(folder)
        expected = answer(reference)
    first = answer(model)
    assert (first - expected).norm() < 0.02 * expected.norm()
    if head.tied is None:
        assert (kernel_name(table), kernel_name(head)) == (None, "lut")
    else:
        assert (kernel_name(table), kernel_name(head)) == ("lut", None)
        assert not list(head.buffers())
    kept = table.kernel
    assert torch.equal(answer(model), first)
    assert table.kernel is kept  # no layout is made twice
    kernels = [m.kernel for m in model.modules() if getattr(m, "kernel", None) is not None]
    packed = sum(k.spec.format.stored_bits(k.spec.shape) / 8 for k in kernels)
    laid_out = sum(t.nbytes for k in kernels for t in k.tensors.values())
    assert held_bytes(model) == pytest.approx(before + laid_out - packed)  # no second copy in memory
    assert torch.equal(answer(copy.deepcopy(model)), first)


def test_saved_after_use(folder, tmp_path):
    model = bitmill.load(folder)
    first = answer(model)
    model.save_pretrained(tmp_path / "again")
    stored = {name: t for file in folder.glob("*.safetensors") for name, t in load_file(file).items()}
    again = {name: t for file in (tmp_path / "again").glob("*.safetensors") for name, t in load_file(file).items()}
    assert stored.keys() == again.keys()
    assert all(torch.equal(stored[name], again[name]) for name in stored)
    assert torch.equal(answer(model), first)
    dense = bitmill.load(folder, dense=True)
    table = model.model.embed_tokens
    assert torch.equal(table(IDS), dense.model.embed_tokens(IDS))
    assert torch.equal(table.packed()["codes"], stored["model.embed_tokens.codes"])


@pytest.mark.parametrize("name", [name for name, kind in KERNELS.items()])
@pytest.mark.parametrize("format", FORMATS, ids=repr)
@pytest.mark.parametrize("rows", [1, 50])
def test_row_lookup(name, format, rows):
    matrix = quantized(format, (rows, 44))
    kind: type[Kernel] = dict(KERNELS.items())[name]
    spec = KernelSpec(format, matrix.shape, CPU)
    if kind.unsupported_reason(spec) is not None:
        pytest.skip("another format's")
    kernel, W = kind(spec, matrix.pack()), matrix.dequantize()
    for ids in (torch.tensor([rows - 1]), torch.randint(0, rows, (512,)), torch.zeros(0, dtype=torch.int64)):
        assert torch.equal(kernel.rows(ids), W[ids])


def test_row_out_of_range():
    matrix = quantized(Uniform(4, 16), (50, 44))
    for kind in (Reference, dict(KERNELS.items())["lut"]):
        with pytest.raises(IndexError):
            kind(KernelSpec(matrix.format, (50, 44), CPU), matrix.pack()).rows(torch.tensor([50]))


def test_concurrent_first_use():
    matrix, x = quantized(Uniform(4, 16), (200, 44)), torch.randn(1, 44)
    expected, failed = layer_of(matrix)(x), []
    for _ in range(10):
        layer, together = layer_of(matrix), threading.Barrier(4)

        def use(layer=layer, together=together):
            together.wait()
            try:
                assert torch.equal(layer(x), expected)
                assert torch.equal(layer.packed()["codes"], layer.state_dict()["codes"])
            except Exception as error:
                failed.append(error)

        threads = [threading.Thread(target=use) for _ in range(4)]
        for step in ("start", "join"):
            for thread in threads:
                getattr(thread, step)()
    assert not failed


def test_shared_parts():
    model = tiny_model("llama")
    small = {"shared": True, "codebook_bits": 4, "rounds": 2, "sweeps": 1, "epochs": 1}
    bitmill.quantize(model, "aqlm", calib=IDS, measure=0, **small)
    layers = [m for m in model.modules() if isinstance(m, QuantLinear)]
    books = {id(layer.shared): layer.shared.codebooks for layer in layers}
    before = {name: t.clone() for name, t in model.state_dict().items()}
    answer(model)
    assert all("additive_codes" in layer._buffers for layer in layers)
    assert all(layer.shared.codebooks is books[id(layer.shared)] for layer in layers)
    assert not any(t is book for layer in layers for t in layer._buffers.values() for book in books.values())
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert all(layer.shared.codebooks is books[id(layer.shared)] for layer in layers)
    assert not isinstance(model.model.embed_tokens, QuantEmbedding)
