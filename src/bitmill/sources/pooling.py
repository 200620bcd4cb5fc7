"""How the hidden states of an encoder become one embedding, as the folder of a sentence encoder says it.

    modules.json           the modules in turn: Transformer, Pooling, Normalize
    1_Pooling/config.json  which pooling

A folder that says nothing means the mean over tokens, as sentence-transformers takes it too.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bitmill.errors import SourceError, one_line

MEAN = "mean"
_MODES = {
    "pooling_mode_mean_tokens": MEAN,
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
}


def read_pooling(folder: Path) -> str:
    """ "mean", "cls" or "max". Raises SourceError for a damaged description, and for embeddings made otherwise."""
    chosen = MEAN
    for module in sentence_modules(folder):
        kind = str(module.get("type")).rpartition(".")[2]
        if kind == "Pooling":
            chosen = _mode(folder / str(module["path"]) / "config.json")
        elif kind not in ("Transformer", "Normalize"):
            raise SourceError(
                f"The embeddings of {folder} pass a module {kind!r}, which bitmill does not know; measure nothing "
                "(--measure 0)."
            )
    return chosen


def sentence_modules(folder: Path) -> list[dict[str, Any]]:
    """The entries of modules.json, whose paths lie in the folder; none where there is no such file."""
    file = folder / "modules.json"
    if not file.is_file():
        return []
    modules = _json(file)
    for module in modules if isinstance(modules, list) else [None]:
        path = module.get("path") if isinstance(module, dict) else None
        if not isinstance(path, str) or Path(path).name != path or path == "..":
            raise SourceError(f"{file} does not list modules inside its folder; fetch it again.")
    return list(modules)


def _mode(file: Path) -> str:
    plain = _json(file)
    flags = plain if isinstance(plain, dict) else {}
    asked = [key for key, value in flags.items() if key.startswith("pooling_mode_") and value is True]
    if len(asked) != 1 or asked[0] not in _MODES:
        raise SourceError(
            f"{file} asks for {', '.join(asked) or 'no pooling'}, and bitmill knows {', '.join(_MODES)}, one at a "
            "time; measure nothing (--measure 0)."
        )
    return _MODES[asked[0]]


def _json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise SourceError(f"{file} cannot be read ({error.strerror}); fetch it again.") from error
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{file} is no valid JSON ({one_line(error)}); fetch it again.") from error
