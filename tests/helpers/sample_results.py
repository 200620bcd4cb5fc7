"""Made-up results of a comparison and a made-up report of a folder."""

from __future__ import annotations

import copy
import math
import random
import re
import zlib
from typing import Any

from bitmill.data.domain import SUITE
from bitmill.recipes.method import build_recipe
from bitmill.report.results import Results

PERPLEXITY = {  # at 4, 3 and 2 bits
    "rtn": (14.67, 33.55, 689134.0),
    "gptq": (11.79, 14.03, 34.56),
    "gptqt": (11.62, 12.67, 23.92),
    "bcq": (41.3, 694.0, 152000.0),
    "awq": (12.95, 19.2, 4100.0),
    "hqq": (13.35, 95.27, None),
}
BITS = (4, 3, 2)
FLOAT = 11.23
LINEARS = [f"self_attn.{n}_proj" for n in "qkvo"] + [f"mlp.{n}_proj" for n in ("gate", "up", "down")]
PROMPTS = ("What is the capital of France?", "Explain in one sentence why the sky is blue.")
ANSWERS = (
    "The capital of France is Paris, which is also its largest city and lies on the Seine.",
    "The sky is blue because the air scatters the short waves of sunlight more than the long ones.",
)
OTHER = " one of those that people like to see, and so it is said to be"  # as a quantized model goes on
HASH = "0123456789abcdef" * 4


def tokens_of(text: str) -> dict[str, Any]:
    """Return made-up tokens of a text, one for each word with the space before it."""
    words = list(re.finditer(r"\s*\S+", text))
    return {
        "token_ids": [zlib.crc32(word[0].encode()) for word in words],
        "token_starts": [word.start() for word in words],
        "new_tokens": len(words),
    }


def sample(text: str, stopped: str = "length") -> dict[str, Any]:
    return {"text": text, "stopped": stopped, **tokens_of(text)}


def layers(error: float, blocks: int, calibrated: bool, seed: int) -> list[dict[str, Any]]:
    noise = random.Random(seed)
    return [
        {
            "name": f"model.layers.{block}.{linear}",
            "format": "uniform",
            "shape": [576, 576],
            "bits_per_weight": 3.3,
            "size_bytes": 136_000,
            "weight_error": error * math.exp(noise.gauss(0, 0.3)),
            "output_error": error * math.exp(noise.gauss(0, 0.5) - block / 15) if calibrated else None,
        }
        for block in range(blocks)
        for linear in LINEARS
    ]


def variant(method: str, bits: int, perplexity: float | None, blocks: int = 30) -> dict[str, Any]:
    described = {"name": f"{method}-{bits}bit", "method": method, "bits": bits}
    if perplexity is None:
        reason = f"{method} cannot be had at {bits} bits; choose others."
        return {**described, "status": "not_applicable", "reason": reason}
    loss = math.log(perplexity / FLOAT)
    generated = [answer[: int(len(answer) * math.exp(-loss))] + OTHER for answer in ANSWERS]
    return {
        **described,
        "status": "done",
        "recipe": {"name": method},
        "bits_per_weight": bits + 0.1 + 0.03 * len(method),
        "size_bytes": int(56_000_000 + 106e6 * (bits + 0.1 + 0.03 * len(method)) / 8),
        "perplexity": perplexity,
        "kl_divergence": 0.9 * loss,
        "top1_agreement": max(0.02, 1 - 0.35 * loss),
        "tokens": 20480,
        "quantize_time_s": 14.0 * len(method) ** 2 / bits,
        "peak_memory_bytes": int(1.1e9 + 1e8 * len(method)),
        "layers": layers(
            0.4 * 4.0 ** (1 - bits) * (1 + loss), blocks, method not in ("rtn", "hqq"), len(method) + bits
        ),
        "samples": [sample(text) for text in generated],
    }


def document(perplexity: dict[str, tuple[float | None, ...]] | None = None, blocks: int = 30) -> dict[str, Any]:
    """Return the content of a results.json."""
    grid = PERPLEXITY if perplexity is None else perplexity
    variants = [variant(m, b, p, blocks) for m, row in grid.items() for b, p in zip(BITS, row)]
    text = {"source": "pydoc", "seqlen": 512}
    return {
        "schema_version": 1,
        "commands": [f"bitmill compare smollm2-135m --methods {','.join(grid)} --bits 4,3,2 -o grid"],
        "settings": {
            "model": "smollm2-135m",
            "fingerprint": HASH,
            "calibration": {**text, "windows": 128, "seed": 0, "sha256": HASH},
            "evaluation": {**text, "windows": 40, "sha256": HASH},
            "prompts": list(PROMPTS),
            "chat": True,
            "max_new_tokens": 48,
            "propagate": "quantized",
            "device": "cpu",
        },
        "machine": {
            "cpu": "A processor",
            "cores": 2,
            "threads": 2,
            "memory_bytes": 16_000_000_000,
            "gpu": None,
            "system": "Linux x86_64",
            "versions": {"bitmill": "0.1.0", "python": "3.11.7", "torch": "2.13.0", "transformers": "5.23.0"},
        },
        "float": {
            "bits_per_weight": 16.0,
            "size_bytes": 269_000_000,
            "perplexity": FLOAT,
            "tokens": 20480,
            "samples": [sample(answer, "eos") for answer in ANSWERS],
        },
        "variants": variants,
    }  # fmt: skip


def results(**changes: Any) -> Results:
    return Results.model_validate({**document(), **changes})


EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\"'"
CALIBRATION = {"source": "pydoc", "samples": 128, "seqlen": 512, "seed": 3, "sha256": HASH}
MEASURED = {"by": "quantize", "text": "pydoc", "split": "eval", "windows": 4, "seqlen": 512, "perplexity": 12.67}
COMPARED = {**MEASURED, "reference_perplexity": 11.23, "kl_divergence": 0.15, "top1_agreement": 0.814}


def figures(kl: float) -> dict[str, Any]:
    """Figures of a domain, or the mean of several, from its KL divergence."""
    return {
        "tokens": 4096,
        "perplexity": FLOAT * math.exp(kl),
        "reference_perplexity": FLOAT,
        "perplexity_ratio": math.exp(kl),
        "kl_divergence": kl,
        "kl_interval": [0.85 * kl, 1.2 * kl],
        "kl_p99": 8 * kl,
        "kl_p999": 20 * kl,
        "top1_agreement": math.exp(-2 * kl),
    }


def domains_of(kl: float) -> dict[str, Any]:
    """Figures of the five domains of the suite, whose divergences have this mean."""
    return {name: {"windows": 8, **figures(kl * (0.6 + 0.2 * at))} for at, name in enumerate(SUITE)}


def measured_by_domain(kl: float = 0.15) -> dict[str, Any]:
    cut = {"by": "eval", "text": "suite", "split": "eval", "windows": 40, "windows_per_domain": 8, "seqlen": 512}
    return {**cut, **figures(kl), "tokens": 20480, "domains": domains_of(kl)}


def recorded_answers() -> list[dict[str, Any]]:
    """The `samples` of a report."""
    about = {"prompt": PROMPTS[0], "chat": True, "max_new_tokens": 48}
    answers = (sample("The capital of France was found\nat *night*."), sample(ANSWERS[0], "eos"))
    return [{**about, "answer": answers[0], "reference_answer": answers[1]}]


def by_domain() -> dict[str, Any]:
    """Return the content of a results.json of a comparison by domain."""
    content = document()
    content["settings"]["evaluation"] |= {"source": "suite", "domains": dict.fromkeys(SUITE, 8)}
    for row in content["variants"]:
        if row["status"] == "done":
            row["domains"] = domains_of(row["kl_divergence"])
    return content


def report(**changes) -> dict:
    report = {
        "bitmill": "0.1.0",
        "source": "smollm2-135m",
        "recipe": build_recipe("gptq").to_dict(),
        "identity": {"calibration": CALIBRATION},
        "bits_per_weight": 3.297,
        "measured": [COMPARED],
        "layers": layers(0.05, 30, True, 0),
        **changes,
    }
    return copy.deepcopy(report)  # a test may change it
