"""Keys and values as units of a plan: one a layer, which choose among pairs of bits."""

from __future__ import annotations

from collections.abc import Sequence

from bitmill.errors import UsageError
from bitmill.kv.scheme import KV_METHODS, KVMethod, kv_method
from bitmill.kv.size import check_method, packed_layers
from bitmill.models.streamed import StreamedModel
from bitmill.sensitivities.candidate import KEYS_VALUES, Candidate, Unit
from bitmill.sensitivities.keys_values import Pair, pairs_of

KV_BASE = "kivi"
METHOD = "kvtuner"  # the KV method of pairs of bits


def keys_values(streamed: StreamedModel, base: str) -> tuple[list[Unit], dict[str, tuple[Candidate, ...]]]:
    """Return a unit for the keys and values of every layer, and its candidates.

    Args:
        streamed: the model.
        base: method that stores them.

    Raises:
        UsageError: a layer keeps something else, or the method needs a calibration.
        RecipeError: the method does not support the model's heads.
    """
    if base not in KV_METHODS.names() or base == METHOD or kv_method(base).scheme().is_calibrated:
        raise UsageError(
            f"A budget with a context stores keys and values by a method of one width without calibration, which "
            f"{base!r} is not; use --kv kivi, rotated or per_token."
        )
    one_pair = pair_method(base, pairs_of(base)[0], len(streamed.blocks))
    check_method(streamed.model, one_pair, streamed.source.name)
    numbers = packed_layers(streamed.source.config)
    if numbers != list(range(len(streamed.blocks))):
        raise UsageError(
            f"Some layers of {streamed.source.name} keep no keys and values of their own; give a budget without a "
            "context."
        )
    units = [Unit((f"keys and values.{number}",), KEYS_VALUES) for number in numbers]
    made = tuple(
        Candidate(f"keys {keys}, values {values} bits", None, (keys, values)) for keys, values in pairs_of(base)
    )
    return units, {unit.name: made for unit in units}


def pair_method(base: str, pair: Pair, layers: int) -> KVMethod:
    """Return the method that stores so many layers with one pair of bits."""
    return kv_method(METHOD, base=base, pairs=f"{layers}*{pair[0]}/{pair[1]}")


def written_kv(base: str, pairs: Sequence[Pair]) -> str:
    """Return keys and values of all layers as a recipe has them: a KV method with options."""
    words: list[tuple[int, str]] = []
    for keys, values in pairs:
        text = f"{keys}/{values}"
        if words and words[-1][1] == text:
            words[-1] = words[-1][0] + 1, text
        else:
            words.append((1, text))
    spelled = " ".join(text if count == 1 else f"{count}*{text}" for count, text in words)
    return f"{METHOD}:base={base},pairs={spelled}"
