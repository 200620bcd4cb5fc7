"""bitmill methods, bitmill recipes and bitmill models."""

from __future__ import annotations

import dataclasses
import inspect
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bitmill.cli.options import AsJson
from bitmill.cli.output import working

if TYPE_CHECKING:
    from bitmill.formats import Format
    from bitmill.recipes.recipe import Recipe


def methods(
    name: Annotated[str | None, typer.Argument(help="Show one method in full.", show_default=False)] = None,
    as_json: AsJson = False,
) -> None:
    """List the methods, of weights and of keys and values, or show the card and the options of one."""
    with working(as_json) as output:
        from bitmill.kv import KV_METHODS
        from bitmill.recipes.method import METHODS

        if name is None:
            listed, cached = (
                [{"name": n, "description": describe(kind)} for n, kind in registry.items()]
                for registry in (METHODS, KV_METHODS)
            )
            columns = ("name", "description")
            output.result(
                {"methods": listed, "kv_methods": cached},
                lambda: [_table(columns, listed), "", "Of keys and values, for --kv", _table(columns, cached)],
            )
            return
        kind = KV_METHODS.get(name) if name in KV_METHODS.names() else METHODS.get(name)
        options = [option_entry(f) for f in dataclasses.fields(kind)]
        card = inspect.getdoc(kind) or ""
        shown = [{**o, "default": str(o["default"])} for o in options]
        data = {"name": name, "card": card, "options": options}
        output.result(data, lambda: [_verbatim(card), "", _table(("name", "type", "default", "help"), shown)])


def recipes(
    name: Annotated[
        str | None, typer.Argument(help="Print one recipe as YAML, to start your own from.", show_default=False)
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Option of it.", show_default=False),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List the recipes there are: named methods, your own files, and the parts they can be put together from."""
    with working(as_json) as output:
        from bitmill.cli.quantize import method_options
        from bitmill.formats import FORMATS, Wrapper
        from bitmill.recipes.compose import find_recipe, user_recipes
        from bitmill.recipes.method import METHODS
        from bitmill.solvers import SOLVERS
        from bitmill.transforms import TRANSFORMS
        from bitmill.tuners import TUNERS

        if name is not None:
            recipe = find_recipe(name, method_options(None, None, settings or []))
            output.result(recipe.to_dict(), lambda: [_verbatim(recipe.to_yaml().rstrip())])
            return
        named = [_recipe_row(n, find_recipe(n), describe(kind)) for n, kind in METHODS.items()]
        own = [_recipe_row(n, find_recipe(n), str(file)) for n, file in user_recipes().items()]
        parts = {r.noun: r.names() for r in (FORMATS, SOLVERS, TRANSFORMS, TUNERS)}
        # wrappers come from --sparse and from transforms
        parts["format"] = [n for n, kind in FORMATS.items() if not issubclass(kind, Wrapper)]
        columns = ("name", "format", "solver", "transforms", "tuners")
        output.result(
            {"named": named, "user": own, "parts": parts},
            lambda: [
                _table(columns, named),
                *(["", "Your own", _table((*columns, "description"), own)] if own else []),
                "",
                "Parts, for --format, --solver, --transform, --tuner",
                _table(("noun", "names"), [{"noun": k, "names": ", ".join(v)} for k, v in parts.items()]),
            ],
        )


def models(as_json: AsJson = False) -> None:
    """List the demo models and the architectures that are supported."""
    with working(as_json) as output:
        from bitmill.architectures.adapter import ADAPTERS
        from bitmill.sources.zoo import ZOO, bundled_configs

        demo = [dataclasses.asdict(model) for _, model in sorted(ZOO.items())]
        architectures = [
            {"name": name, "model_types": list(adapter.model_types)} for name, adapter in ADAPTERS.items()
        ]
        shown = [{**m, "parameters": f"{m['parameters'] / 1e6:.0f} M"} for m in demo]
        known = [{**a, "model_types": ", ".join(a["model_types"])} for a in architectures]
        output.result(
            {"demo_models": demo, "configs": bundled_configs(), "architectures": architectures},
            lambda: [
                "Demo models",
                _table(("name", "parameters", "licence", "description"), shown),
                "",
                f"Configs without weights, for bitmill plan: {', '.join(bundled_configs())}",
                "",
                "Architectures (others are walked over generically)",
                _table(("name", "model_types"), known),
            ],
        )


def describe(kind: type) -> str:
    """The first sentence of a method's card."""
    return (inspect.getdoc(kind) or "").partition("\n")[0]


def _recipe_row(name: str, recipe: Recipe, description: str) -> dict[str, Any]:
    return {
        "name": name,
        "format": _chain(recipe.stored),
        "solver": recipe.solver.name,
        "transforms": ", ".join(t.name for t in recipe.transforms) or "-",
        "tuners": ", ".join(t.name for t in recipe.tuners) or "-",
        "description": description,
    }


def _chain(format: Format) -> str:
    """A format and what it is wrapped in: `rotated of sum of codebook`."""
    inner = getattr(format, "inner", None)
    return format.name if inner is None else f"{format.name} of {_chain(inner)}"


def option_entry(field: dataclasses.Field[Any]) -> dict[str, Any]:
    """One option of a method, from its dataclass field."""
    default = field.default
    if default is dataclasses.MISSING:
        default = field.default_factory() if callable(field.default_factory) else None
    kind = field.type if isinstance(field.type, str) else getattr(field.type, "__name__", str(field.type))
    return {"name": field.name, "type": kind, "default": default, "help": field.metadata.get("help", "")}


def _table(columns: tuple[str, ...], rows: list[dict[str, Any]]) -> Any:
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold", no_wrap=column == columns[0])
    for row in rows:
        table.add_row(*(escape(str(row[column])) for column in columns))
    return table


def _verbatim(text: str) -> Any:
    from rich.text import Text

    return Text(text, no_wrap=True, overflow="ignore")
