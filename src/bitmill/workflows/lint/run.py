"""Say before a long run whether an engine will load a folder, or what a recipe would make of a model."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bitmill.checkpoint.reader import is_checkpoint, open_checkpoint
from bitmill.config.arguments import checked_arguments
from bitmill.config.paths import user_path
from bitmill.errors import SourceError, UsageError
from bitmill.exports.base import Layer
from bitmill.models.streamed import StreamedModel
from bitmill.recipes.compose import find_recipe
from bitmill.recipes.resolve import resolve_recipe
from bitmill.report.text import format_rows
from bitmill.sources.open import open_source
from bitmill.workflows.imports.packed import open_packed
from bitmill.workflows.lint.base import BITMILL, ENGINES, Described, Engine, Finding


@dataclass(frozen=True)
class Lint:
    """The result of `lint`; `print` shows a summary.

    Attributes:
        engine: as of --engine.
        loads: nothing was found.
        judged: how the rules of the engine are known.
        kind: of the checkpoint, such as "gptq"; "bitmill" for a folder of bitmill, or a recipe.
        target: the export that a folder of bitmill was judged as; "" for a checkpoint as it is.
        findings: what the engine would not load.
    """

    engine: str
    loads: bool
    judged: str
    kind: str
    target: str
    findings: list[Finding] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain data."""
        return asdict(self)

    def rows(self) -> list[tuple[str, str]]:
        """Return (name, value) pairs to print."""
        as_target = f", exported to {self.target}" if self.target else ""
        rows = [("engine", f"{self.engine}, {self.judged}"), ("checkpoint", f"{self.kind}{as_target}")]
        found = [(f.layer or "checkpoint", f.reason) for f in self.findings]
        return [*rows, *(found or [("loads", "nothing was found that stands in the way")])]

    def __str__(self) -> str:
        return format_rows(self.rows())


@checked_arguments()
def lint(
    model: str | Path,
    engine: str,
    *,
    method: str | None = None,
    options: dict[str, Any] | None = None,
    trust_remote_code: bool = False,
) -> Lint:
    """Say whether an engine will load a quantized folder, or a model quantized by a recipe.

    Args:
        model: a folder of bitmill or of another program, a .gguf file, or with `method` a float model.
        engine: "vllm", "sglang", "llama.cpp", "transformers" or "mlx".
        method: a method or recipe file; the model is not quantized, and no weight is read.
        options: of the method, such as {"bits": 3}.
        trust_remote_code: allow Python code in the folder to run.

    Returns:
        What stands in the way, and how the engine's rules are known.

    Raises:
        UsageError: no such engine.
        SourceError: the model cannot be opened.
    """
    if engine not in ENGINES.names():
        raise UsageError(f"There is no engine {engine!r}; choose one of {', '.join(ENGINES.names())}.")
    judge: Engine = ENGINES.get(engine)()
    described = (
        _of_recipe(model, method, options or {}, trust_remote_code)
        if method
        else _of_files(model, trust_remote_code)
    )
    own = described.kind == BITMILL
    found = list((judge.findings_of_folder if own else judge.findings)(described))
    target = judge.target if own and engine != "transformers" else ""
    return Lint(engine, not found, judge.judged, described.kind, target, found)


def _of_recipe(model: str | Path, method: str, options: dict[str, Any], trusted: bool) -> Described:
    """Return the layers that a recipe would make of a float model."""
    streamed = StreamedModel(open_source(model, trust_remote_code=trusted))
    resolved = resolve_recipe(find_recipe(method, options), streamed)
    shapes = {site.layer: site.shape for site in streamed.all_sites()}
    if resolved.ends:
        shapes |= {site.layer: site.shape for site in resolved.ends.sites(streamed)}
    layers = {name: Layer(f, (shapes[name][0], shapes[name][1])) for name, f in resolved.formats.items()}
    return Described(BITMILL, layers, *_about(streamed.source.config))


def _of_files(model: str | Path, trusted: bool) -> Described:
    """Return the layers of a checkpoint."""
    path = user_path(model)
    if path.is_dir() and is_checkpoint(path):
        checkpoint = open_checkpoint(path)
        layers = {name: Layer(f, checkpoint.shape(name)) for name, f in checkpoint.formats.items()}
        config = checkpoint.config
        tied = bool(config.get("tie_word_embeddings"))
        return Described(BITMILL, layers, str(config.get("model_type")), tied)
    source = open_packed(path, trusted)
    made = {name.removesuffix(".weight"): source.quantized(name) for name in sorted(source.packed())}
    if not made:
        raise SourceError(f"{path} holds no quantized layer; name a method with --method.")
    layers = {name: Layer(each.format, each.shape) for name, each in made.items()}
    return Described(source.program, layers, *_about(source.config))


def _about(config: Any) -> tuple[str, bool]:
    """Return the model type, and whether embedding and head are one matrix."""
    return str(config.model_type), bool(getattr(config.get_text_config(), "tie_word_embeddings", False))
