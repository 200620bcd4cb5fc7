"""The processes that are compared, and what is asked of them."""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from bitmill.progress import high_water_mark
from models import BITS, GGUF_TYPES, HERE, Model, types_of

PEERS = ("llama.cpp", "torch", "vllm")
SAID = 12  # tokens of a check
MOST_NATS = 5.0  # a token, that the float model may give to a continuation; guessing is worth 10.8


@dataclass(frozen=True)
class Engine:
    """A program, a model's file, and how the two are called in tables.

    made: what the file holds, or by which command it was made. bits: of bitmill's.
    """

    name: str
    peer: str
    script: str
    python: str
    file: str
    made: str = ""
    option: str | None = None
    bits: int | None = None


def engines_of(model: Model, files: Path, pythons: dict[str, str]) -> list[Engine]:
    """The float model, by which the others are checked, then bitmill between its peers; makes what is missing."""
    peers: list[Engine] = []
    if "llama.cpp" in pythons:
        python = pythons["llama.cpp"]
        for kind in GGUF_TYPES:
            file = model.gguf(files, kind, python)
            peers.append(
                Engine(f"llama.cpp {kind}", "llama.cpp", "peer_llama_cpp.py", python, str(file), types_of(file))
            )
        model.tidy(files)
    source, ours = model.source(files), pythons["bitmill"]
    if "torch" in pythons:
        peers.append(Engine("torch bf16", "torch", "peer_torch.py", ours, source, option="bf16"))
    if "vllm" in pythons:
        peers.append(Engine("vLLM bf16", "vllm", "peer_vllm.py", pythons["vllm"], model.folder(files)))
    float32 = Engine("torch fp32", "torch", "peer_torch.py", ours, source, option="fp32")
    packed = [
        Engine(
            f"bitmill {bits}",
            "bitmill",
            "peer_bitmill.py",
            ours,
            str(model.packed(files, bits)),
            " ".join(model.command(bits)),
            bits=bits,
        )
        for bits in BITS
    ]
    turns = [float32]
    while peers or packed:
        turns += [queue.pop(0) for queue in (packed, peers) if queue]
    return turns


class Worker:
    """An engine's process, and the seconds it took."""

    def __init__(self, engine: Engine, threads: int, logs: Path) -> None:
        self.engine = engine
        self.seconds: dict[str, list[float]] = {"decode": [], "prefill": []}
        self.checked: dict[str, Any] = {}
        self.settings: dict[str, Any] = {}
        logs.mkdir(parents=True, exist_ok=True)
        self.log = logs / f"{engine.name.replace(' ', '-')}.log"
        command = [engine.python, str(HERE / engine.script), engine.file, "--threads", str(threads)]
        command += ["--option", engine.option] if engine.option else []
        variables = {**os.environ, "OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
        with self.log.open("w", encoding="utf-8") as log:
            self.process = subprocess.Popen(
                command, env=variables, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
            )
        self._answer()

    def ask(self, do: str, **rest: Any) -> Any:
        """The answer to one request."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"do": do, **rest}) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def check(self, prompt: list[int], model: Model, reference: Worker) -> bool:
        """Whether it computes the model; what it said is kept."""
        answer = self.ask("check", prompt=prompt, tokens=SAID)
        logits = answer.pop("logits")
        expected = reference.checked["logits"] if self is not reference else logits
        answer["cosine"] = cosine(logits, expected) if logits else None
        answer["nats"] = None
        if model.text is not None:
            answer["nats"] = reference.ask("score", prompt=prompt, continuation=answer["tokens"])
        answer["text"] = " ".join(model.words(answer["tokens"]).split())
        answer["passed"] = (
            answer["finite"]
            and (not logits or (len(logits) == len(expected) and answer["cosine"] >= model.least_cosine))
            and (model.text is None or answer["nats"] <= MOST_NATS)
        )
        self.checked = {**answer, "logits": logits}
        self.settings = self.ask("settings")
        return bool(answer["passed"])

    def settle(self, prompt: list[int]) -> None:
        """Warm up, and let it choose its settings."""
        self.ask("tune", prompt=prompt, tokens=SAID)
        self.settings = self.ask("settings")

    def decode(self, prompt: list[int], tokens: int) -> None:
        self.seconds["decode"].append(self.ask("decode", prompt=prompt, tokens=tokens))

    def prefill(self, prompt: list[int]) -> None:
        self.prompt = len(prompt)
        self.seconds["prefill"].append(self.ask("prefill", prompt=prompt))

    def result(self) -> dict[str, Any]:
        """Plain data."""
        decode, prefill = self.seconds["decode"], self.seconds["prefill"]
        settings = dict(self.settings)
        return {
            "name": self.engine.name,
            "peer": self.engine.peer,
            "bits": self.engine.bits,
            "size_bytes": settings.pop("size_bytes", 0),
            "made": self.engine.made,
            "settings": settings,
            "check": {name: value for name, value in self.checked.items() if name != "logits"},
            "decode": {"tokens_per_s": 1 / median(decode), "seconds": decode} if decode else None,
            "prefill": {"tokens_per_s": self.prompt / median(prefill), "seconds": prefill} if prefill else None,
            "peak_memory_bytes": self.peak_memory_bytes(),
        }

    def peak_memory_bytes(self) -> int:
        """Most resident memory so far, mapped files included; 0 where the system does not tell."""
        return high_water_mark(self.process.pid) or 0

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()

    def _answer(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.engine.name} stopped; see {self.log}.")
        return json.loads(line)


def cosine(a: list[float], b: list[float]) -> float:
    """Of two vectors about their means."""
    x, y = (np.asarray(v) - np.mean(v) for v in (a, b))
    return float(x @ y / np.sqrt((x @ x) * (y @ y)))
