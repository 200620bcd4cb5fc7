"""DINOv2 of an ONNX file as a folder of transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitmill.files import write_tensors
from bitmill.sources.onnx import OnnxWeights, read_onnx

CONFIG: dict[str, Any] = {
    "architectures": ["Dinov2Model"],
    "dtype": "float32",
    "hidden_act": "gelu",
    "hidden_size": 384,
    "image_size": 518,
    "layer_norm_eps": 1e-06,
    "mlp_ratio": 4,
    "model_type": "dinov2",
    "num_attention_heads": 6,
    "num_channels": 3,
    "num_hidden_layers": 12,
    "patch_size": 14,
    "qkv_bias": True,
    "use_swiglu_ffn": False,
}
PREPROCESSOR: dict[str, Any] = {
    "crop_size": {"height": 224, "width": 224},
    "do_center_crop": True,
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.485, 0.456, 0.406],
    "image_processor_type": "BitImageProcessor",
    "image_std": [0.229, 0.224, 0.225],
    "resample": 3,
    "rescale_factor": 0.00392156862745098,
    "size": {"shortest_edge": 256},
}
# linear layer of a block in transformers -> its name in the graph
_LINEARS = {
    "attention.q_proj": "attention.attention.query",
    "attention.k_proj": "attention.attention.key",
    "attention.v_proj": "attention.attention.value",
    "attention.o_proj": "attention.output.dense",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
_VECTORS = ("norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias")
_SCALES = ("layer_scale1.lambda1", "layer_scale2.lambda1")


def write_dinov2(onnx: Path, folder: Path) -> None:
    """Write the backbone of an ONNX file as a folder that transformers loads as Dinov2Model.

    Args:
        onnx: file that transformers' Dinov2Model was exported to as `backbone`; what follows it is left out.
        folder: folder to write; its bytes depend on the file alone.

    Raises:
        SourceError: the graph is that of another model, or is damaged.
    """
    weights = read_onnx(onnx)
    folder.mkdir(parents=True)
    for name, content in (("config.json", CONFIG), ("preprocessor_config.json", PREPROCESSOR)):
        (folder / name).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    write_tensors(folder / "model.safetensors", _tensors(weights))


def _tensors(weights: OnnxWeights) -> dict[str, Tensor]:
    """Return the parameters of Dinov2Model by name."""
    graph, width = weights.tensors, CONFIG["hidden_size"]
    patches = (CONFIG["image_size"] // CONFIG["patch_size"]) ** 2
    # the exporter split the table into those of the class token and of the patches, which it named anew
    shapes = {(1, 1, width): 0, (1, patches, width): 1}
    renamed = {n: t for n, t in graph.items() if n.startswith("onnx::") and tuple(t.shape) in shapes}
    positions = torch.cat(sorted(renamed.values(), key=lambda tensor: tensor.shape[1]), 1)
    patch = "embeddings.patch_embeddings.projection"
    found = {
        "embeddings.cls_token": graph["backbone.embeddings.cls_token"],
        "embeddings.mask_token": torch.zeros(1, width),  # of the training; not in the graph, and never read
        "embeddings.position_embeddings": positions,
        **{f"{patch}.{kind}": graph[f"backbone.{patch}.{kind}"] for kind in ("weight", "bias")},
        **{f"layernorm.{kind}": graph[f"backbone.layernorm.{kind}"] for kind in ("weight", "bias")},
    }
    for index in range(CONFIG["num_hidden_layers"]):
        block = f"encoder.layer.{index}"
        for name in (*_VECTORS, *_SCALES):
            found[f"{block}.{name}"] = graph[f"backbone.{block}.{name}"]
        for linear, exported in _LINEARS.items():
            node = f"/backbone/encoder/layer.{index}/{exported.replace('.', '/')}/MatMul"
            found[f"{block}.{linear}.weight"] = weights.linear(node)
            found[f"{block}.{linear}.bias"] = graph[f"backbone.{block}.{exported}.bias"]
    return found
