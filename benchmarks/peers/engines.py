"""The processes that are compared, and the requests to them."""

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
CHECK_TOKENS = 12  # tokens of a check
MAX_NATS = 5.0  # per token, of a continuation under the float model; a random guess has 10.8


@dataclass(frozen=True)
class Engine:
    """A program with a model's file, and its name in tables.

    Attributes:
        name: Name in tables.
        peer: Name of the program.
        script: The peer_*.py file.
        python: Interpreter of its environment.
        file: The model.
        made: Contents of the file, or the command that made it.
        option: Option of the script.
        bits: Bits of bitmill's models.
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
    """Return the float model, the reference of the checks, then bitmill between its peers; creates missing files.

    Args:
        model: The model.
        files: Folder of the files.
        pythons: Interpreters by peer.
    """
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
    """An engine's process, and its measurements."""

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

    def request(self, do: str, **rest: Any) -> Any:
        """Send a request and return the answer."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"do": do, **rest}) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def check(self, prompt: list[int], model: Model, reference: Worker) -> bool:
        """Return True if the engine computes the model; its answer is kept.

        Args:
            prompt: Token ids.
            model: The model.
            reference: The worker of the float model.
        """
        answer = self.request("check", prompt=prompt, tokens=CHECK_TOKENS)
        logits = answer.pop("logits")
        expected = reference.checked["logits"] if self is not reference else logits
        answer["cosine"] = cosine(logits, expected) if logits else None
        answer["nats"] = None
        if model.text is not None:
            answer["nats"] = reference.request("score", prompt=prompt, continuation=answer["tokens"])
        answer["text"] = " ".join(model.words(answer["tokens"]).split())
        answer["passed"] = (
            answer["finite"]
            and (not logits or (len(logits) == len(expected) and answer["cosine"] >= model.least_cosine))
            and (model.text is None or answer["nats"] <= MAX_NATS)
        )
        self.checked = {**answer, "logits": logits}
        self.settings = self.request("settings")
        return bool(answer["passed"])

    def warm_up(self, prompt: list[int]) -> None:
        """Warm up the engine, which may choose its settings."""
        self.request("tune", prompt=prompt, tokens=CHECK_TOKENS)
        self.settings = self.request("settings")

    def decode(self, prompt: list[int], tokens: int) -> None:
        self.seconds["decode"].append(self.request("decode", prompt=prompt, tokens=tokens))

    def prefill(self, prompt: list[int]) -> None:
        self.prompt = len(prompt)
        self.seconds["prefill"].append(self.request("prefill", prompt=prompt))

    def result(self) -> dict[str, Any]:
        """Return the results as plain data."""
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
        """Return the peak resident memory, mapped files included; 0 if the system does not report it."""
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
    """Return the cosine of two vectors minus their means."""
    x, y = (np.asarray(v) - np.mean(v) for v in (a, b))
    return float(x @ y / np.sqrt((x @ x) * (y @ y)))
