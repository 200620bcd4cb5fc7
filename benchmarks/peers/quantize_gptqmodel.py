"""Quantize a folder with GPTQModel, in its own environment: see quantize.py."""

from __future__ import annotations

import importlib.metadata
import os

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # it asks for two, of which it allows one on two cores

from gptqmodel import GPTQModel, QuantizeConfig
from peer_arguments import report, request


def main() -> None:
    asked = request()
    model = GPTQModel.load(asked.model, QuantizeConfig(bits=asked.bits, group_size=asked.group))
    model.quantize([ids.tolist() for ids in asked.windows()], batch_size=1)
    model.save(str(asked.out))
    report(asked, importlib.metadata.version("gptqmodel"), "symmetric, act_group_aware, bf16")


if __name__ == "__main__":
    main()
