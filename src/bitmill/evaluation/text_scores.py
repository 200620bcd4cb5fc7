"""Log-probabilities of whole texts under a language model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from bitmill.errors import UsageError, quoted
from bitmill.evaluation.context import context_length
from bitmill.evaluation.vocabulary import outside_vocabulary, token_ids

_LOGITS = 1 << 26  # numbers of a batch of logits: 268 MB in fp32


@torch.no_grad()
def log_probabilities(
    logits_of: Callable[[Tensor], Tensor],
    config: Any,
    tokenizer: Any,
    texts: Sequence[str],
    *,
    batch_size: int = 16,
    score_end: bool = False,
    on_scored: Callable[[int], None] = lambda count: None,
) -> list[float]:
    """Return the log-probability of every text, in nats.

    The first token is given and not scored where the tokenizer, or this function, has put one in front that starts
    texts; a model without such a token cannot score the first token of a text.

    Args:
        logits_of: function of tokens (texts, length), which returns logits (texts, length, vocabulary).
        config: transformers config of the model, or None.
        tokenizer: of the model.
        texts: the texts.
        batch_size: texts that run together, sorted by length.
        score_end: count the end-of-text token after each text.
        on_scored: called with the number of texts after every batch.

    Raises:
        UsageError: a text is longer than the context of the model, or there is no end-of-text token to score.
    """
    rows = [_tokens(tokenizer, text, score_end) for text in texts]
    limit = context_length(config)
    for text, row in zip(texts, rows):
        if limit is not None and len(row) > limit:
            raise UsageError(
                f"A hypothesis has {len(row)} tokens, and the context of the model {limit}; "
                f"leave it out: {quoted(text)}."
            )
        if reason := outside_vocabulary(config, torch.tensor(row)):
            raise UsageError(f"A hypothesis holds {reason}; use the model's own tokenizer.")
    order = sorted(range(len(rows)), key=lambda index: len(rows[index]))
    scores = [0.0] * len(rows)
    vocabulary = getattr(config, "vocab_size", None) or 1 << 16
    while order:
        longest = len(rows[order[min(batch_size, len(order)) - 1]])
        count = max(1, min(batch_size, _LOGITS // (vocabulary * max(1, longest))))
        batch, order = order[:count], order[count:]
        for index, score in zip(batch, _scores(logits_of, [rows[index] for index in batch])):
            scores[index] = score
        on_scored(len(batch))
    return scores


def _tokens(tokenizer: Any, text: str, score_end: bool) -> list[int]:
    """Return the token ids of a text, behind one that starts texts where there is one."""
    ids = token_ids(tokenizer, text)
    starts = [token for token in (tokenizer.bos_token_id, tokenizer.eos_token_id) if token is not None]
    if starts and (not ids or ids[0] not in starts):
        ids = [starts[0], *ids]
    if score_end:
        if tokenizer.eos_token_id is None:
            raise UsageError("The tokenizer has no end-of-text token; leave --score-end out.")
        ids = ids if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id else [*ids, tokenizer.eos_token_id]
    return ids


def _scores(logits_of: Callable[[Tensor], Tensor], rows: list[list[int]]) -> list[float]:
    """Return the log-probabilities of the tokens after the first one of each row."""
    longest = max(len(row) for row in rows)
    if longest < 2:
        return [0.0] * len(rows)
    # padded at the end, where no scored token sees it
    tokens = torch.tensor([row + [row[-1] if row else 0] * (longest - len(row)) for row in rows])
    logits = logits_of(tokens[:, :-1]).float()
    logp = logits.log_softmax(-1).gather(-1, tokens[:, 1:, None].to(logits.device))[..., 0]
    return [float(logp[index, : max(0, len(row) - 1)].double().sum()) for index, row in enumerate(rows)]
