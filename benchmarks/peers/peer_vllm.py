"""vLLM on the CPU, bf16: whole requests, since its engine has no single step to call."""

from __future__ import annotations

import math
import os
import time
from pathlib import Path
from typing import Any

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}

import vllm
from worker import Engine, serve


class Vllm(Engine):
    """A folder of transformers."""

    def __init__(self, model: Path, threads: int, context: int, option: str) -> None:
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        self.model = vllm.LLM(
            str(model),
            dtype="bfloat16",
            max_model_len=context,
            max_num_seqs=1,
            skip_tokenizer_init=True,
            enable_prefix_caching=False,
            disable_log_stats=True,
        )
        self.size = sum(f.stat().st_size for f in model.glob("*.safetensors"))

    def settings(self) -> dict[str, Any]:
        return {"version": vllm.__version__, "size_bytes": self.size}

    def check(self, prompt: list[int], tokens: int) -> dict[str, Any]:
        text, likely = self._generate(prompt, tokens)
        return {"tokens": text, "finite": math.isfinite(likely), "vocabulary": None, "logits": []}

    def decode(self, prompt: list[int], tokens: int) -> float:
        """Return the time of all tokens but the first divided by their number: single tokens cannot be timed."""
        started = time.perf_counter()
        self._generate(prompt, 1)
        first = time.perf_counter()
        self._generate(prompt, tokens + 1)
        return (time.perf_counter() - first - (first - started)) / tokens

    def prefill(self, prompt: list[int]) -> float:
        started = time.perf_counter()
        self._generate(prompt, 1)
        return time.perf_counter() - started

    def _generate(self, prompt: list[int], tokens: int) -> tuple[list[int], float]:
        """Greedy tokens and the sum of their log probabilities."""
        params = vllm.SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        (request,) = self.model.generate([{"prompt_token_ids": prompt}], params, use_tqdm=False)
        answer = request.outputs[0]
        return list(answer.token_ids), float(answer.cumulative_logprob or 0.0)


if __name__ == "__main__":
    serve(Vllm)
