"""Load a folder as its users do, and run it for a few tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from bitmill.checkpoint.reader import Checkpoint
from bitmill.errors import BitmillError, CheckpointError, one_line
from bitmill.evaluation.reference import read_reference
from bitmill.models.block_call import output_tensor
from bitmill.tasks.base import task_for
from bitmill.workflows.load import load_tokenizer, read_folder

TOKENS = 16
TOKENIZER = "tokenizer_config.json"


@torch.no_grad()
def try_folder(checkpoint: Checkpoint, device: str = "cpu", trust_remote_code: bool = False) -> nn.Module:
    """Run a folder in the dtype that it states, and in float32 where that is another.

    A model that was measured in float32 may overflow in the dtype of its config, which `from_pretrained` takes.

    Args:
        checkpoint: the folder.
        device: device to run on.
        trust_remote_code: allow Python code in the folder to run.

    Returns:
        The model in float32.

    Raises:
        CheckpointError: the model cannot be loaded or run, or its outputs are NaN or infinite; or its tokenizer
            cannot be loaded.
    """
    folder = checkpoint.folder
    if (folder / TOKENIZER).is_file():
        load_tokenizer(folder, trust_remote_code=trust_remote_code)
    model = read_folder(folder, checkpoint.config, "auto", device, trust_remote_code=trust_remote_code)
    _run(checkpoint, model, device)
    if any(p.dtype != torch.float32 for p in model.parameters() if p.is_floating_point()):
        del model  # before it is read again
        model = read_folder(folder, checkpoint.config, torch.float32, device, trust_remote_code=trust_remote_code)
        _run(checkpoint, model, device)
    return model


def _run(checkpoint: Checkpoint, model: nn.Module, device: str) -> None:
    """Run a model for a few tokens. Raises CheckpointError where it cannot, or gives NaN or Inf."""
    folder, name = checkpoint.folder, str(next(model.parameters()).dtype).removeprefix("torch.")
    try:
        outputs = output_tensor(task_for(checkpoint.config).call(model, _tokens(checkpoint, model).to(device)))
    except BitmillError:
        raise
    except Exception as error:  # of the model's own code, which meets the values of the config
        raise CheckpointError(
            f"The model of {folder} cannot be run in {name} ({one_line(error)}); quantize again."
        ) from error
    # some models give tokens that are never to be chosen the logit -inf
    if not bool(torch.isfinite(outputs).any(-1).all()) or bool((outputs.isnan() | outputs.isposinf()).any()):
        raise CheckpointError(
            f"The model of {folder} gives NaN or Inf in {name}; load it with dtype=torch.float32, or quantize "
            "again."
        )


def _tokens(checkpoint: Checkpoint, model: Any) -> Tensor:
    """Return the first tokens (1, length) that the folder was measured on, or another window."""
    reference = read_reference(checkpoint.folder)
    if reference is not None:
        return reference.tokens[:1, :TOKENS].long()
    return task_for(checkpoint.config).example(model.config)
