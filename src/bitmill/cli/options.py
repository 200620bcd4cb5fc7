"""Options shared by several commands, and the parsing of their values."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from bitmill.cli.complete import complete_demo_models, complete_kv
from bitmill.errors import UsageError

_POWERS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}

# models and folders
Model = Annotated[
    str,
    typer.Argument(
        help="Demo model, Hugging Face folder or hub id, or .gguf file.",
        autocompletion=complete_demo_models,
        show_default=False,
    ),
]
AnyModel = Annotated[
    str,
    typer.Argument(
        help="Quantized folder, or any float model.", autocompletion=complete_demo_models, show_default=False
    ),
]
QuantizedFolder = Annotated[
    Path, typer.Argument(metavar="DIR", help="Folder written by bitmill quantize.", show_default=False)
]
HeadBits = Annotated[
    str | None,
    typer.Option(
        metavar="8|6|4|float",
        help="Bits of token embeddings and output head; by default 8, but for a vocabulary below 1,024.",
        show_default=False,
    ),
]
MethodSettings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Option of the method; repeatable.", show_default=False),
]
Propagate = Annotated[
    Literal["quantized", "float"],
    typer.Option(help="Inputs for calibrating later blocks: outputs of the quantized or of the float blocks."),
]

Ray = Annotated[
    str | None,
    typer.Option(
        metavar="local|ADDRESS",
        help="Measure as tasks of a Ray cluster: local for one of this machine, or auto or HOST:PORT for another.",
        show_default=False,
    ),
]

# calibration and measurement
Samples = Annotated[int, typer.Option(metavar="N", help="Calibration windows.")]
Seqlen = Annotated[int, typer.Option(metavar="L", help="Tokens per window.")]
Seed = Annotated[int, typer.Option(metavar="S", help="Seed that selects the calibration windows.")]

# packed keys and values
Kv = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="Pack keys and values with this KV method (see bitmill methods).",
        autocompletion=complete_kv,
        show_default=False,
    ),
]
KvBits = Annotated[int | None, typer.Option(metavar="B", help="Short for --kv-set bits=B.", show_default=False)]
KvSet = Annotated[
    list[str] | None,
    typer.Option(metavar="KEY=VALUE", help="Option of the KV method; repeatable.", show_default=False),
]
KvSamples = Annotated[int, typer.Option(metavar="N", help="Windows that calibrate keys and values.")]
KvSeqlen = Annotated[
    int | None,
    typer.Option(
        metavar="L",
        help="Tokens per window that calibrates keys and values; 2048, or the model's context if shorter.",
        show_default=False,
    ),
]

# execution and output
Device = Annotated[str, typer.Option(help="cpu or cuda.")]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run Python code that comes with the model.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


def parse_pairs(settings: list[str] | None, flag: str = "--set") -> dict[str, Any]:
    """Return the KEY=VALUE pairs of a repeatable option, values as strings.

    Args:
        settings: values of the option.
        flag: name of the option, for messages.

    Raises:
        UsageError: a value is no pair, or a key is given twice.
    """
    options: dict[str, Any] = {}
    for setting in settings or []:
        key, equals, value = setting.partition("=")
        key = key.strip().replace("-", "_")
        if not equals or not key.isidentifier():
            example = "damp=0.05" if flag == "--set" else "sink=2"
            raise UsageError(f"{flag} expects KEY=VALUE, not {setting!r}; for example {flag} {example}.")
        if key in options:
            raise UsageError(
                f"{flag} gives {key!r} twice, as {options[key]!r} and {value.strip()!r}; give it once."
            )
        options[key] = value.strip()
    return options


def parse_method_options(
    bits: str | None, group_size: str | None, settings: list[str] | None, type: str | None = None
) -> dict[str, Any]:
    """Return the options of a method as strings, from --bits, --group-size, --type and --set.

    Raises:
        UsageError: an option is given twice.
    """
    options = parse_pairs(settings)
    for key, shortcut in (("bits", bits), ("group_size", group_size), ("type", type)):
        if shortcut is None:
            continue
        if key in options:
            flag = "--" + key.replace("_", "-")
            raise UsageError(f"{key!r} is given twice, as {flag} {shortcut} and --set {key}={options[key]}.")
        options[key] = shortcut
    return options


def parse_head_bits(text: str | None) -> Any:
    """Return the value of --head-bits as a number where it is one; `with_head` refuses all others but "float"."""
    try:
        return None if text is None else int(text)
    except ValueError:
        return text


def kv_arguments(
    kv: str | None,
    kv_bits: int | None,
    kv_set: list[str] | None,
    kv_samples: int | None = None,
    kv_seqlen: int | None = None,
) -> dict[str, Any]:
    """Convert the options about keys and values to arguments.

    Args:
        kv: --kv.
        kv_bits: --kv-bits.
        kv_set: values of --kv-set.
        kv_samples: --kv-samples.
        kv_seqlen: --kv-seqlen.

    Returns:
        Keyword arguments of `quantize` and `evaluate`.

    Raises:
        UsageError: a value of --kv-set is no pair.
    """
    return {
        "kv": kv,
        "kv_bits": kv_bits,
        "kv_options": parse_pairs(kv_set, "--kv-set"),
        "kv_samples": kv_samples,
        "kv_seqlen": kv_seqlen,
    }


def split_list(text: str) -> list[str]:
    """Return the non-empty items of a comma-separated list."""
    return [item.strip() for item in text.split(",") if item.strip()]


def parse_bytes(text: str) -> int:
    """Return the bytes of a size such as 80GB (80 * 10^9), 80g, or 80GiB (80 * 2^30).

    Raises:
        UsageError: the text has another form.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt])(i?)b?", text.strip().lower())
    if found is None or not float(found[1]):
        raise UsageError(f"--memory is {text!r}; write it as 80GB (80 * 10^9 bytes) or 80GiB (80 * 2^30 bytes).")
    return int(float(found[1]) * (1024 if found[3] else 1000) ** _POWERS[found[2]])


def parse_tokens(text: str) -> int:
    """Return the tokens of a length such as 4096, 128k (128 * 2^10) or 1M (2^20).

    Raises:
        UsageError: the text has another form.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([km]?)", text.strip().lower().replace("_", ""))
    tokens = int(float(found[1]) * 1024 ** _POWERS[found[2]]) if found else 0
    if tokens < 1:
        raise UsageError(f"--context is {text!r}; write it as 32768, 128k (128 * 1024) or 1M (1024 * 1024).")
    return tokens
