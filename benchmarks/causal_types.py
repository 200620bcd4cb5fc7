"""Quantize a tiny random model of every causal type of transformers, load it, and compare its logits.

A type is right where all matrices of its blocks that can be packed are, where the loaded model gives the logits of
the decoded weights, and where those are near the float model's. Results go to results/causal_types.json, and from
there to docs/architectures.md.

    python benchmarks/causal_types.py                       # all types: minutes on one core
    python benchmarks/causal_types.py mixtral gpt_oss --method gptq --bits 4 --print
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import signal
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as TYPES

import bitmill
from bitmill.errors import BitmillError

RESULTS = Path(__file__).parent / "results" / "causal_types.json"
PAGE = Path(__file__).parent.parent / "docs" / "architectures.md"
SECONDS = 90  # of one type
NEAR = 0.25  # relative error of 8-bit logits; a token that a router sends to another expert changes much
LARGEST = 60e6

_NAMES = {
    64: "hidden_size d_model n_embd embed_dim word_embed_proj_dim rnn_hidden_size lru_width hidden_dim dim",
    128: "intermediate_size ffn_dim ffn_hidden_size n_inner d_ff inner_dim decoder_ffn_dim encoder_ffn_dim "
    "ffn_hidden",
    2: "num_hidden_layers num_layers n_layer n_layers decoder_layers encoder_layers num_experts_per_tok",
    4: "num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads num_experts "
    "num_local_experts n_routed_experts moe_num_experts",
}
SMALL: dict[str, int] = {name: size for size, names in _NAMES.items() for name in names.split()}
SMALL |= {"num_key_value_heads": 2, "head_dim": 16, "vocab_size": 256, "max_position_embeddings": 128}
SMALL |= {"n_positions": 128, "n_ctx": 128, "moe_intermediate_size": 32, "expert_ffn_size": 32}
SMALL |= {"shared_expert_intermediate_size": 32, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 16}
SMALL |= {"qk_rope_head_dim": 8, "v_head_dim": 16, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
SMALL |= {"state_size": 8, "mamba_d_state": 8, "mamba_n_heads": 4, "mamba_d_head": 32, "mamba_expand": 2}
SMALL |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "rotary_dim": 8, "attention_window": 8}
SMALL |= {"sliding_window": 16, "linear_num_key_heads": 2, "linear_num_value_heads": 4}
SMALL |= {"linear_key_head_dim": 16, "linear_value_head_dim": 16, "vocab_size_per_layer_input": 256}
SMALL |= {"hidden_size_per_layer_input": 16}
SMALL |= {"expert_ffn_hidden_size": 32, "moe_topk": 2, "zero_expert_num": 2, "embedding_dim": 64, "num_blocks": 2}
SMALL |= {"unpadded_vocab_size": 256, "encoder_hash_byte_group_vocab": 256}
# set where a config leaves them open
UNSET = ("head_dim", "num_experts_per_tok", "num_key_value_heads", "n_routed_experts")
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
# encoders, which predict the next token where their config makes them decoders
ENCODERS = (
    *("bert", "bert-generation", "big_bird", "camembert", "data2vec-text", "electra", "ernie", "megatron-bert"),
    *(
        "rembert",
        "roberta",
        "roberta-prelayernorm",
        "roc_bert",
        "roformer",
        "xlm-roberta",
        "xlm-roberta-xl",
        "xmod",
    ),
)
# what the sizes above do not fit
SPECIAL: dict[str, dict[str, Any]] = {
    "gpt_neo": {"num_layers": 2, "attention_types": [[["global", "local"], 1]]},
    "reformer": {"is_decoder": True, "axial_pos_embds": False},
    "xlnet": {"d_head": 16},
    "xmod": {"default_language": "en_XX", "languages": ["en_XX"]},
    "mamba2": {"num_heads": 8, "head_dim": 16, "n_groups": 1},
    "zamba": {
        "mamba_dt_rank": 4,
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
    },
    "zamba2": {
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
        "mamba_headdim": 16,
        "layers_block_type": ["linear_attention", "hybrid"],
    },
    "dbrx": {"max_seq_len": 128, "n_heads": 4, "n_layers": 2, "d_model": 64},
    "cohere_compass_text": {"rope_parameters": {"full_attention": _ROPE, "sliding_attention": _ROPE}},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "longcat_flash": {"head_dim": 8},
    "xlstm": {"num_heads": 4},
    "xlm": {"causal": True},
    "dots1": {"n_shared_experts": 1},
    "gemma3n_text": {
        "num_kv_shared_layers": 0,
        "intermediate_size": 128,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "nemotron": {"head_dim": 16},
    "ministral": {"head_dim": 16},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "falcon_h1": {"mamba_d_ssm": 128, "mamba_n_groups": 1},
    "zaya": {"num_experts_per_tok": 1},
    "gemma4_assistant": {"hidden_size_per_layer_input": 0},
}


class Late(Exception):
    """The time of one type is over."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("types", nargs="*", help="default: all")
    parser.add_argument("--method", default="rtn")
    parser.add_argument("--bits", type=int, default=8)
    parser.add_argument("--print", action="store_true", help="write neither results nor the page")
    arguments = parser.parse_args()
    os.environ["BITMILL_ACTIVATIONS"] = "float32"
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.disable(logging.CRITICAL)
    signal.signal(signal.SIGALRM, _ring)
    rows = []
    for name in arguments.types or sorted(TYPES):
        with tempfile.TemporaryDirectory() as folder:
            rows.append(row(name, arguments.method, arguments.bits, Path(folder)))
        print(json.dumps(rows[-1]), flush=True)
    print(len(rows), dict(Counter(row["state"] for row in rows)))
    if not arguments.print:
        document = {"transformers": transformers.__version__, "method": arguments.method, "bits": arguments.bits}
        RESULTS.write_text(json.dumps({**document, "rows": rows}, indent=1) + "\n", encoding="utf-8")
        PAGE.write_text(page(PAGE.read_text(encoding="utf-8"), {**document, "rows": rows}), encoding="utf-8")


def row(name: str, method: str, bits: int, folder: Path) -> dict[str, Any]:
    """Return the state of a type: right, wrong, refused, not built, and figures or the sentence."""
    try:
        with _time_limit():
            model = built(name)
            expected = _logits(model)
            model.save_pretrained(folder / "float")
    except Late:
        return {"type": name, "state": "not built", "why": "its time was over"}
    except Exception as error:  # the code and the configs of transformers raise all sorts
        return {"type": name, "state": "not built", "why": f"{type(error).__name__}: {error}"[:200]}
    try:
        with _time_limit():
            return {"type": name, **quantized(expected, method, bits, folder)}
    except Late:
        return {"type": name, "state": "failed", "why": "its time was over"}
    except BitmillError as error:
        return {"type": name, "state": "refused", "why": str(error)}
    except Exception as error:  # a row, and not the end of the table
        return {"type": name, "state": "failed", "why": f"{type(error).__name__}: {error}"[:300]}


def quantized(expected: torch.Tensor, method: str, bits: int, folder: Path) -> dict[str, Any]:
    """Quantize a saved model, load the result, and return its figures.

    Args:
        expected: logits of the float model.
        method, bits: of the quantization.
        folder: with the model in `float`.
    """
    windows = torch.randint(3, 200, (8, 24), generator=torch.Generator().manual_seed(1))
    out = folder / "packed"
    outcome = bitmill.quantize(
        folder / "float", method, bits=bits, out=out, measure=0, calib=windows, progress=False
    )
    packed = _logits(AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval())
    decoded = _logits(bitmill.load(out, dense=True))
    rounding, distance = _relative(packed, decoded), _relative(packed, expected)
    floats = outcome.report.get("float_matrices", {"share": 0.0, "names": []})
    right = rounding < 1e-3 and (distance < NEAR or bits < 8)
    return {
        "state": "right" if right else "wrong",
        "share": 1 - floats["share"],
        "float": floats["names"],
        "packed_and_decoded": rounding,
        "packed_and_float": distance,
        "layers": len(outcome.report["layers"]),
    }


def built(name: str) -> Any:
    """Return a tiny random model of a type.

    Raises:
        ValueError: it has too many parameters.
    """
    special = {"is_decoder": True} if name in ENCODERS else {}
    config = _config(CONFIG_MAPPING[name], special | SPECIAL.get(name, {}))
    with torch.device("meta"):
        count = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    if count > LARGEST:
        raise ValueError(f"{count:,} parameters")
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(config).float().eval()
    return model


def _config(kind: Any, special: dict[str, Any]) -> Any:
    """Return a config of small sizes, also of the parts it consists of."""
    default = kind()
    sizes = _sizes(default) | special
    parts = {}
    for part in getattr(default, "sub_configs", {}):
        inner = getattr(default, part, None)
        if inner is not None and not isinstance(inner, dict):
            parts[part] = _config(type(inner), special).to_dict()
    for given in ({**sizes, **parts}, sizes):
        try:
            return kind(**given)
        except Exception:  # some configs do not take the sizes of others
            continue
    for name, value in sizes.items():
        try:
            setattr(default, name, value)
        except Exception:
            continue
    return default


def _sizes(config: Any) -> dict[str, int]:
    """Return the small sizes that a config has."""
    found = {
        name: size
        for name, size in SMALL.items()
        if isinstance(value := _value(config, name), int) or (value is None and name in UNSET)
    }
    if "qk_rope_head_dim" in found:  # compressed keys: rotary angles have this width
        found.pop("head_dim", None)
        found |= {"num_key_value_heads": found["num_attention_heads"]} if "num_key_value_heads" in found else {}
    return found


def _value(config: Any, name: str) -> Any:
    """Return a field of a config; "" where it has none, or one for each layer."""
    try:
        return getattr(config, name, "")
    except Exception:  # per-layer values of one name
        return ""


@torch.no_grad()
def _logits(model: nn.Module) -> torch.Tensor:
    ids = torch.randint(3, 200, (1, 12), generator=torch.Generator().manual_seed(0))
    found: torch.Tensor = model(input_ids=ids, use_cache=False).logits.float()
    return found


def _relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


def _ring(*_: Any) -> None:
    raise Late


@contextmanager
def _time_limit() -> Iterator[None]:
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)


def page(text: str, results: dict[str, Any]) -> str:
    """Return docs/architectures.md with the results between its marks."""
    rows, begin, end = results["rows"], "<!-- measured:begin -->\n", "<!-- measured:end -->"
    states = Counter(row["state"] for row in rows)
    counts = ", ".join(f"{count} {state}" for state, count in states.most_common())
    lines = [
        f"transformers {results['transformers']}, {results['method']} at {results['bits']} bits, {len(rows)} "
        f"types: {counts}.",
        "",
        "| type | | quantized share of the blocks' matrices | in float | packed against decoded | against float |",
        "|---|---|---|---|---|---|",
        *map(_line, rows),
    ]
    before, after = text.split(begin)[0], text.split(end)[1]
    return before + begin + "\n".join(lines) + "\n" + end + after


def _line(row: dict[str, Any]) -> str:
    if "why" in row:
        sentence = " ".join(row["why"].replace("|", "/").split())
        return f"| `{row['type']}` | {row['state']} | | {sentence[:160]} | | |"
    names = ", ".join(f"`{name}`" for name in row["float"][:3]) + (", ..." if len(row["float"]) > 3 else "")
    figures = f"{row['packed_and_decoded']:.0e} | {row['packed_and_float']:.3f}"
    return f"| `{row['type']}` | {row['state']} | {row['share']:.1%} | {names} | {figures} |"


if __name__ == "__main__":
    main()
