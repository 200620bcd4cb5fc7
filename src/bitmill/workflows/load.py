"""Load models and tokenizers, quantized or in float."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from bitmill.checkpoint.reader import is_bitmill_folder, is_checkpoint, open_checkpoint
from bitmill.compat import plain_meta_model
from bitmill.config.arguments import checked_arguments
from bitmill.config.paths import user_path
from bitmill.errors import BitmillError, CheckpointError, UsageError, one_line
from bitmill.integrations.saving import protect_saves
from bitmill.models.streamed import StreamedModel
from bitmill.runtime.decode import attach
from bitmill.runtime.modules.dequantize import dequantize_model
from bitmill.sources.open import open_source
from bitmill.tasks.base import Task, task_for
from bitmill.workflows.checks import check_device
from bitmill.workflows.free_memory import check_float_fits, check_folder_fits


@checked_arguments("device")
def load(
    model: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    dense: bool = False,
    trust_remote_code: bool = False,
) -> nn.Module:
    """Load a quantized folder or any float model, ready to run; quantized weights stay packed.

    Args:
        model: a folder, the name of a demo model, a hub id, or a .gguf file.
        dtype: type of activations and unquantized weights.
        device: device to run on.
        dense: unpack all weights, which gives an ordinary model with the memory of a float model.
        trust_remote_code: allow Python code in the folder to run.

    Raises:
        BitmillError: the model cannot be loaded.
    """
    check_device(device)
    if isinstance(model, (str, Path)) and is_checkpoint(user_path(model)):
        checkpoint = open_checkpoint(model)  # refuses damage before anything is read
        check_folder_fits(checkpoint, dtype, device, dense)
        return read_folder(model, checkpoint.config, dtype, device, dense, trust_remote_code)
    recorded = _check_float_folder(model)
    streamed = StreamedModel(open_source(model, trust_remote_code=trust_remote_code), device)
    check_float_fits(model, streamed, dtype, device)
    streamed.load(streamed.names())
    if recorded:
        protect_saves(streamed.model)
    return attach(streamed.model.to(dtype))


@checked_arguments()
def load_tokenizer(model: str | Path, *, trust_remote_code: bool = False) -> Any:
    """Load the tokenizer of a quantized folder or of any float model."""
    if is_checkpoint(user_path(model)):
        from transformers import AutoTokenizer

        open_checkpoint(model, digests="but weights")
        return _from_folder(AutoTokenizer, model, trust_remote_code, check=_try_tokenizer)
    _check_float_folder(model)
    return open_source(model, trust_remote_code=trust_remote_code).tokenizer()


def reader_of(model: str | Path | nn.Module, given: Any, task: Task, trust_remote_code: bool) -> Any:
    """Return what turns text or pictures into the windows of a model: its tokenizer or its image processor.

    Args:
        model: the model.
        given: by the caller; live modules have none of their own.
        task: of the model.
        trust_remote_code: allow Python code in the folder to run.
    """
    if given is not None or task.reads == "text":
        return tokenizer_of(model, given, trust_remote_code)
    if isinstance(model, nn.Module):
        raise UsageError(f"A live model has no {task.reader_class_name}; pass one as tokenizer=... with it.")
    if is_checkpoint(user_path(model)):
        import transformers

        open_checkpoint(model, digests="but weights")
        return _from_folder(getattr(transformers, task.reader_class_name), model, trust_remote_code)
    return task.reader(open_source(model, trust_remote_code=trust_remote_code))


def tokenizer_of(model: str | Path | nn.Module, given: Any, trust_remote_code: bool) -> Any:
    """Return the tokenizer that a caller gave, or the one of the model; live modules have none."""
    if given is not None:
        return given
    if isinstance(model, nn.Module):
        raise UsageError("A live model has no tokenizer; pass tokenizer=... with it.")
    return load_tokenizer(model, trust_remote_code=trust_remote_code)


def _check_float_folder(model: str | Path) -> bool:
    """Check a folder with float weights and a KV calibration against its record, which sources do not read.

    Returns:
        True for such a folder, False for any other model.
    """
    recorded = is_bitmill_folder(user_path(model))
    if recorded:
        open_checkpoint(model, digests="all")
    return recorded


def live_model(model: str | Path | nn.Module, device: str, trust_remote_code: bool) -> nn.Module:
    """Return a live module unchanged, and load anything else."""
    if isinstance(model, nn.Module):
        return model
    return load(model, device=device, trust_remote_code=trust_remote_code)


def read_folder(
    folder: str | Path,
    config: Any,
    dtype: torch.dtype | Literal["auto"] = torch.float32,
    device: str = "cpu",
    dense: bool = False,
    trust_remote_code: bool = False,
) -> nn.Module:
    """Load the model of a folder that bitmill wrote, by transformers.

    Args:
        folder: the folder.
        config: its config.json.
        dtype, device, dense, trust_remote_code: as for `load`; "auto" is the dtype that the config names.

    Raises:
        CheckpointError: the folder is damaged.
    """
    loaded = _from_folder(task_for(config).auto_class, folder, trust_remote_code, dtype=dtype)
    if dense:
        loaded = dequantize_model(loaded, loaded.dtype if dtype == "auto" else dtype)
    return loaded.eval().to(device)


def _try_tokenizer(tokenizer: Any) -> None:
    """Encode and decode a word: tokenizers check their options only when they are used."""
    tokenizer.decode(tokenizer("a")["input_ids"], skip_special_tokens=True)


def _from_pretrained(kind: Any, folder: str, trust_remote_code: bool, **options: Any) -> Any:
    """Call `from_pretrained`, without what is slow to import where the model allows it."""
    load = partial(kind.from_pretrained, folder, trust_remote_code=trust_remote_code, **options)
    if not trust_remote_code:
        with suppress(RuntimeError), plain_meta_model():  # Gemma 4 mixes numbers in memory with those that are not
            return load()
    return load()


def _from_folder(
    kind: Any,
    folder: str | Path,
    trust_remote_code: bool,
    check: Callable[[Any], None] | None = None,
    **options: Any,
) -> Any:
    """Call `from_pretrained` on a folder that bitmill wrote; every error, of `check` too, becomes one sentence."""
    folder = user_path(folder)
    try:
        loaded = _from_pretrained(
            kind, str(folder), trust_remote_code=trust_remote_code, local_files_only=True, **options
        )
        if check is not None:
            check(loaded)
        return loaded
    except BitmillError:
        raise
    except Exception as error:  # transformers raises all sorts
        readers = {
            "AutoTokenizer": "tokenizer",
            "AutoImageProcessor": "image processor",
            "AutoProcessor": "processor",
        }
        what = readers.get(kind.__name__, "model")
        advice = "copy the folder again, or quantize the model again"
        if "trust_remote_code" in str(error):
            advice = "if you trust the Python code in it, pass --trust-remote-code (trust_remote_code=True)"
        raise CheckpointError(f"The {what} of {folder} cannot be loaded ({one_line(error)}); {advice}.") from error
