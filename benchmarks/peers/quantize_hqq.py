"""Quantize a folder with HQQ, in its own environment: see quantize.py."""

from __future__ import annotations

import importlib.metadata

import torch
from hqq.core.quantize import BaseQuantizeConfig, HQQLinear
from hqq.models.hf.base import AutoHQQHFModel
from peer_arguments import report, request
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM


def main() -> None:
    asked = request()
    model = AutoModelForCausalLM.from_pretrained(asked.model, dtype=torch.float32)
    config = BaseQuantizeConfig(nbits=asked.bits, group_size=asked.group)
    AutoHQQHFModel.quantize_model(model, config, compute_dtype=torch.float16, device="cpu")
    tensors: dict[str, torch.Tensor] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, HQQLinear):
            parts = {"codes": layer.W_q.data, "scale": layer.meta["scale"], "zero": layer.meta["zero"]}
            tensors |= {f"{name}.stored.{part}": value.contiguous() for part, value in parts.items()}
            tensors[f"{name}.weight"] = layer.dequantize().float().contiguous()
    save_file(tensors, asked.out / "dense.safetensors")
    zero = "whole zero points" if config["weight_quant_params"]["round_zero"] else "zero points of float"
    report(asked, importlib.metadata.version("hqq"), f"without calibration, groups along the inputs, {zero}")


if __name__ == "__main__":
    main()
