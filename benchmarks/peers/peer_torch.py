"""transformers on torch: the float model, option fp32 or bf16."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from worker import Engine, serve

import bitmill
from bitmill.runtime.decode import detach
from bitmill.workflows.bench.memory import timed

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Transformers(Engine):
    """Any causal model as transformers runs it: its own cache, one call a token."""

    def __init__(self, model: Path, threads: int, context: int, option: str) -> None:
        torch.set_num_threads(threads)
        torch.set_grad_enabled(False)
        self.model = self.load(model, option)
        self.cache: Any = None

    def load(self, model: Path, option: str) -> Any:
        dtype = DTYPES[option]
        if model.is_dir():
            return transformers.AutoModelForCausalLM.from_pretrained(model, dtype=dtype).eval()
        return detach(bitmill.load(str(model), dtype=dtype))  # or its tokens would take bitmill's own step

    def read(self, tokens: list[int]) -> np.ndarray:
        self.cache = None
        return self._run(tokens)

    def step(self, token: int) -> np.ndarray:
        return self._run([token])

    def settings(self) -> dict[str, Any]:
        size = sum(p.nbytes for p in self.model.parameters())
        return {"version": f"{transformers.__version__}, torch {torch.__version__}", "size_bytes": size}

    def score(self, prompt: list[int], continuation: list[int]) -> float:
        """Mean -log p of a continuation, nats a token: what the float model thinks of another one's words."""
        logits = self.model(torch.tensor([prompt + continuation])).logits[0].float()
        chosen = logits[len(prompt) - 1 : -1].log_softmax(-1)
        return -float(chosen.gather(-1, torch.tensor(continuation)[:, None]).mean())

    def arithmetic(self) -> float:
        """fp32 operations a second of a large matrix product."""
        a, b = torch.randn(2, 1536, 1536)
        return 2 * 1536**3 / min(timed(lambda: a @ b) for _ in range(8))

    def _run(self, tokens: list[int]) -> np.ndarray:
        ids = torch.tensor([tokens])
        output = self.model(ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        self.cache = output.past_key_values
        return output.logits[0, -1].float().numpy()


if __name__ == "__main__":
    serve(Transformers)
