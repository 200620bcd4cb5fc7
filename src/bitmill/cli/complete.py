"""Words that the shell completes: names of methods, parts of recipes and models."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from bitmill.config.listing import listings

METHODS = "bitmill.recipes.methods"
KV_METHODS = "bitmill.kv.methods"
TEXTS = "bitmill.data.domains"
MIXTURES = (("mix", "all domains, to calibrate on"), ("suite", "five domains, to measure on"))
PYDOC = ("pydoc", "the language reference of Python, without a download")

Completion = Callable[[str], list[tuple[str, str]]]


def complete_members(*packages: str, also: Iterable[tuple[str, str]] = ()) -> Completion:
    """Return a completion of the names that packages register.

    Args:
        packages: dotted names of the packages.
        also: further (word, description).
    """

    def complete(incomplete: str) -> list[tuple[str, str]]:
        members = ((one.name, one.summary) for package in packages for one in listings(package).values())
        return _starting(incomplete, [*members, *also])

    return complete


def complete_list(completion: Completion) -> Completion:
    """Return a completion of the last item of a comma-separated list."""

    def complete(incomplete: str) -> list[tuple[str, str]]:
        before, comma, last = incomplete.rpartition(",")
        return [(before + comma + word, text) for word, text in completion(last)]

    return complete


def complete_demo_models(incomplete: str) -> list[tuple[str, str]]:
    """Return the demo models that begin with a word; without any, the shell completes files."""
    from bitmill.sources.zoo import ZOO

    return _starting(incomplete, ((name, model.description) for name, model in sorted(ZOO.items())))


def complete_plannable(incomplete: str) -> list[tuple[str, str]]:
    """Return the models and the bundled configs that begin with a word."""
    return complete_demo_models(incomplete) + _starting(incomplete, _configs())


def _configs() -> Iterator[tuple[str, str]]:
    from bitmill.sources.zoo import bundled_configs

    for name in bundled_configs():
        yield name, "config without weights"


def _starting(incomplete: str, words: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    return [(word, text) for word, text in words if word.startswith(incomplete)]


complete_method = complete_members(METHODS, also=[("none", "leave the weights as they are, for --kv")])
complete_methods = complete_list(complete_members(METHODS, also=[("all", "all methods")]))
complete_any_method = complete_members(METHODS, KV_METHODS)
complete_kv = complete_members(KV_METHODS)
complete_format = complete_members("bitmill.formats")
complete_solver = complete_members("bitmill.solvers")
complete_transform = complete_members("bitmill.transforms")
complete_tuner = complete_members("bitmill.tuners")
complete_text = complete_members(TEXTS, also=MIXTURES)
complete_calib = complete_members(TEXTS, also=(*MIXTURES, PYDOC, ("self", "text that the float model writes")))
