"""The float model's predictions on a few hundred tokens, small enough to stay in the quantized folder.

Kept for each position are the log-probabilities of the most likely tokens; all others count as one outcome. The KL
divergence over these outcomes is a lower bound of that over the vocabulary (data processing inequality), and needs
no float model.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from bitmill.errors import CheckpointError, one_line

FILE = "reference.safetensors"
TOKENS = 512  # predicted from, in all windows together
TOP = 256  # tokens with a log-probability of their own
_POSITIONS = 32  # whose probabilities are in memory at a time: of 262144 tokens in float64, 67 MB
_MISSING = 1e-12  # least mass of all other tokens that counts, above the rounding of sums in float64


@dataclass(frozen=True)
class ReferencePredictions:
    """Predictions of the float model.

    Attributes:
        tokens: (windows, length) int32 token ids.
        indices: (windows, length, k) int32, the k most likely next tokens, the likeliest first.
        log_probabilities: (windows, length, k) float32, their log-probabilities in nats.
    """

    tokens: Tensor
    indices: Tensor
    log_probabilities: Tensor

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors of the file."""
        return dict(vars(self))

    def compare(self, window: int, logits: Iterable[Tensor]) -> tuple[float, int]:
        """Compare predictions of a model on one window.

        Args:
            window: number of the window.
            logits: (n, vocabulary) of consecutive positions, the whole window in pieces.

        Returns:
            KL(float || model) in nats and the number of positions whose most likely token agrees, summed over the
            positions.
        """
        divergence, agreed, start = 0.0, 0, 0
        for piece in (part for whole in logits for part in whole.split(_POSITIONS)):
            positions = slice(start, start + len(piece))
            start += len(piece)
            indices = self.indices[window, positions].long()
            log_q = self.log_probabilities[window, positions].double()
            log_p = torch.log_softmax(piece.double().cpu(), -1).gather(1, indices)
            divergence += float((log_q.exp() * (log_q - log_p)).masked_fill_(log_q == -torch.inf, 0.0).sum())
            rest_q, rest_p = (1 - log.exp().sum(-1) for log in (log_q, log_p))
            rest = rest_q.clamp(min=0) * (rest_q.clamp(min=_MISSING) / rest_p.clamp(min=_MISSING)).log()
            divergence += float(rest.sum())
            agreed += int((piece.argmax(-1).cpu() == indices[:, 0]).sum())
        return divergence, agreed


@dataclass
class ReferenceRecorder:
    """Collects predictions of the float model, window after window, until TOKENS positions are complete."""

    _tokens: list[Tensor] = field(default_factory=list)
    _indices: list[Tensor] = field(default_factory=list)
    _log_probabilities: list[Tensor] = field(default_factory=list)

    def add(self, tokens: Tensor, logits: Iterable[Tensor]) -> None:
        """Add one window unless there are enough; windows of another length than the first one are left out.

        Args:
            tokens: (length,) token ids.
            logits: (n, vocabulary) of consecutive positions, in pieces; read as far as they are needed.
        """
        left = TOKENS - sum(len(window) for window in self._tokens)
        length = len(self._tokens[0]) if self._tokens else min(len(tokens), left)
        if length > left or len(tokens) < length:
            return
        self._tokens.append(tokens[:length].to("cpu", torch.int32))
        likeliest = []
        for piece in logits:
            likeliest += [_likeliest(part) for part in piece[:length].split(_POSITIONS)]
            length -= len(piece)
            if length <= 0:
                break
        self._indices.append(torch.cat([indices for indices, _ in likeliest]))
        self._log_probabilities.append(torch.cat([values for _, values in likeliest]))

    def result(self) -> ReferencePredictions | None:
        """Return the predictions; None where no window was added."""
        if not self._tokens:
            return None
        return ReferencePredictions(
            torch.stack(self._tokens), torch.stack(self._indices), torch.stack(self._log_probabilities)
        )


def reference_layout(
    windows: Sequence[Tensor] | Tensor, vocabulary: int
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Return name -> shape and type of the tensors that a recorder keeps.

    Args:
        windows: token ids (length,) of each window.
        vocabulary: tokens that the model predicts.
    """
    length = min(len(windows[0]), TOKENS)
    count = min(TOKENS // length, sum(len(window) >= length for window in windows))
    shape, found = (count, length), (count, length, min(TOP, vocabulary))
    return {
        "tokens": (shape, torch.int32),
        "indices": (found, torch.int32),
        "log_probabilities": (found, torch.float32),
    }


def _likeliest(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return indices (n, k) int32 and log-probabilities (n, k) float32 of the most likely tokens."""
    log_q = torch.log_softmax(logits.double(), -1)
    found = log_q.topk(min(TOP, log_q.shape[-1]), -1)
    return found.indices.to("cpu", torch.int32), found.values.to("cpu", torch.float32)


def read_reference(folder: Path) -> ReferencePredictions | None:
    """Read the predictions in a folder; None where there are none.

    Raises:
        CheckpointError: the file is damaged.
    """
    path = folder / FILE
    if not path.is_file():
        return None
    try:
        found = load_file(path)
        reference = ReferencePredictions(**found)
    except (OSError, SafetensorError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read ({one_line(error)}); quantize the model again.") from None
    tokens, indices, values = reference.tokens, reference.indices, reference.log_probabilities
    sound = (
        (tokens.dtype, indices.dtype, values.dtype) == (torch.int32, torch.int32, torch.float32)
        and tokens.dim() == 2
        and tokens.numel() > 0
        and indices.shape == values.shape
        and indices.shape[:-1] == tokens.shape
        and indices.shape[-1] > 0
        and int(tokens.min()) >= 0
        and int(indices.min()) >= 0
        and bool((values <= 1e-6).all())
    )
    if not sound:
        raise CheckpointError(f"{path} holds no predictions of a model; quantize the model again.")
    return reference
