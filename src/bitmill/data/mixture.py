"""Mixtures of domains: `mix` to calibrate on, `suite` to measure on, and every domain by itself."""

from __future__ import annotations

from typing import Any

from bitmill.data.domain import DOMAINS, SUITE, domain_documents

MIX = {"prose": 6, "encyclopedia": 5, "dialogue": 4, "code": 4, "documentation": 4, "languages": 1}
_EQUAL = dict.fromkeys(SUITE, 1)
MIXTURES = {"mix": (MIX, _EQUAL), "suite": (_EQUAL, _EQUAL)}  # shares of windows: to calibrate, to measure


def is_domain(source: object) -> bool:
    """Return True for the name of a domain or of a mixture of domains."""
    return isinstance(source, str) and (source in MIXTURES or source in DOMAINS.names())


def is_mixture(source: object) -> bool:
    """Return True for the name of a mixture, of whose domains as many windows each are measured on."""
    return isinstance(source, str) and source in MIXTURES


def shares(name: str, part: str) -> dict[str, int]:
    """Return the shares of the windows by domain.

    Args:
        name: of a domain or of a mixture.
        part: "calib" to calibrate on, any other part to measure on.
    """
    if name not in MIXTURES:
        return {name: 1}
    calibrate, measure = MIXTURES[name]
    return calibrate if part == "calib" else measure


def mixture_documents(name: str, part: str, tokenizer: Any = None) -> list[str]:
    """Return the documents of one part, domain after domain; see `domain_documents`."""
    return [text for domain in shares(name, part) for text in domain_documents(domain, part, tokenizer)]


def apportion(windows: int, shares: dict[str, int]) -> dict[str, int]:
    """Return the number of windows by domain, in proportion to the shares.

    The windows that are left after rounding down go to the largest remainders, of equal ones to the first.
    """
    whole = sum(shares.values())
    counts = {name: windows * share // whole for name, share in shares.items()}
    remainders = sorted(shares, key=lambda name: -(windows * shares[name] % whole))
    for name in remainders[: windows - sum(counts.values())]:
        counts[name] += 1
    return counts
