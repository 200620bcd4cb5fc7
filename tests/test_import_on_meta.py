"""Modules are imported inside `from_pretrained`, where new tensors are on the meta device."""

from __future__ import annotations

import subprocess
import sys

EVERY_MODULE = """
import importlib, pkgutil, torch
with torch.device("meta"):
    import bitmill
    for module in pkgutil.walk_packages(bitmill.__path__, "bitmill."):
        if not any(part in module.name for part in ("__main__", "_native", "sitecustomize", "triton", "vllm.")):
            importlib.import_module(module.name)
print("imported")
"""


def test_every_module_is_imported_on_meta():
    done = subprocess.run([sys.executable, "-c", EVERY_MODULE], capture_output=True, text=True)
    assert done.stdout.strip() == "imported", done.stderr[-2000:]
