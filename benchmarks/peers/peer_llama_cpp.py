"""llama.cpp, called as its own programs call it: the C interface, no sampler, no Python object a token."""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llama_cpp as ll
import numpy as np
from worker import Engine, serve


class LlamaCpp(Engine):
    """A GGUF file."""

    def __init__(self, model: Path, threads: int, context: int, option: str) -> None:
        ll.llama_backend_init()
        self.model = ll.llama_model_load_from_file(str(model).encode(), ll.llama_model_default_params())
        if not self.model:
            raise SystemExit(f"llama.cpp cannot load {model}.")
        self.vocabulary = ll.llama_vocab_n_tokens(ll.llama_model_get_vocab(self.model))
        self.threads, self.context = threads, context
        self.chosen: dict[str, dict[str, int]] = {}
        self.live: Any = None
        self.uses = {"threads": threads, "ubatch": 512, "flash_attention": 0}
        self._open(self.uses)

    def read(self, tokens: list[int]) -> np.ndarray:
        ll.llama_memory_clear(ll.llama_get_memory(self.live), True)
        return self._run(tokens)

    def step(self, token: int) -> np.ndarray:
        return self._run([token])

    def decode(self, prompt: list[int], tokens: int) -> float:
        self._open(self.chosen.get("decode", self.uses))
        return super().decode(prompt, tokens)

    def prefill(self, prompt: list[int]) -> float:
        self._open(self.chosen.get("prefill", self.uses))
        return super().prefill(prompt)

    def tune(self, prompt: list[int], tokens: int) -> None:
        """Flash attention or not, all threads or one less, how much of a prompt at once: what is fastest."""
        sizes = sorted({max(1, self.threads - 1), self.threads})
        decode = [{"threads": n, "ubatch": 512, "flash_attention": flash} for n in sizes for flash in (0, 1)]
        prefill = [
            {"threads": self.threads, "ubatch": size, "flash_attention": flash}
            for size, flash in itertools.product((128, 512), (0, 1))
        ]
        short = prompt[:16]
        super().tune(prompt, tokens)
        self.chosen = {
            "decode": self._fastest(decode, lambda: Engine.decode(self, short, tokens)),
            "prefill": self._fastest(prefill, lambda: Engine.prefill(self, prompt[:256])),
        }

    def settings(self) -> dict[str, Any]:
        return {
            "version": ll.__version__,
            "system": ll.llama_print_system_info().decode().strip(),
            "size_bytes": ll.llama_model_size(self.model),
            **self.chosen,
        }

    def _fastest(self, settings: list[dict[str, int]], measure: Callable[[], float]) -> dict[str, int]:
        def seconds(uses: dict[str, int]) -> float:
            self._open(uses)
            return measure()

        return min(settings, key=seconds)

    def _open(self, uses: dict[str, int]) -> None:
        """A context of these settings, unless it is the one that is open."""
        if self.live and uses == self.uses:
            return
        if self.live:
            ll.llama_free(self.live)
        params = ll.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = self.context, 512, uses["ubatch"]
        params.n_threads = params.n_threads_batch = uses["threads"]
        params.flash_attn_type = uses["flash_attention"]
        self.live, self.uses = ll.llama_init_from_model(self.model, params), uses

    def _run(self, tokens: list[int]) -> np.ndarray:
        ids = (ll.llama_token * len(tokens))(*tokens)
        if ll.llama_decode(self.live, ll.llama_batch_get_one(ids, len(tokens))):
            raise SystemExit("llama.cpp could not read the tokens.")
        logits = ll.llama_get_logits_ith(self.live, -1)
        return np.ctypeslib.as_array(ctypes.cast(logits, ctypes.POINTER(ctypes.c_float)), (self.vocabulary,))


if __name__ == "__main__":
    serve(LlamaCpp)
