"""The port of textgenrnn in examples/ computes what NumPy computes."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import torch

EXAMPLE = Path(__file__).parents[2] / "examples" / "textgenrnn.py"
SHAPES = {
    "embedding/embeddings": (20, 6),
    "rnn_1/kernel": (6, 32),
    "rnn_1/recurrent_kernel": (8, 32),
    "rnn_1/bias": (64,),
    "rnn_2/kernel": (8, 32),
    "rnn_2/recurrent_kernel": (8, 32),
    "rnn_2/bias": (64,),
    "attention/attention_W": (22, 1),
    "output/kernel": (22, 20),
    "output/bias": (20,),
}


def example():
    spec = importlib.util.spec_from_file_location("textgenrnn_example", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@torch.no_grad()
def test_equals_numpy():
    module, draw = example(), np.random.default_rng(0)
    arrays = {name: draw.normal(0, 0.5, shape).astype(np.float32) for name, shape in SHAPES.items()}
    model = module.port(arrays)
    windows = module.windows_of("abcdefghij", {module.START: 19, **{c: n + 1 for n, c in enumerate("abcdefghij")}})
    assert windows.shape == (10, 41)
    found = model(windows[:, :-1]).logits[:, -1].softmax(-1).numpy()
    for ids, probabilities in zip(windows[:, :-1].numpy(), found):
        assert np.allclose(module.reference(arrays, ids), probabilities, atol=1e-6)
