"""bitmill methods, bitmill recipes and bitmill models."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bitmill.cli.complete import KV_METHODS, METHODS, complete_any_method, complete_method
from bitmill.cli.options import AsJson, parse_method_options
from bitmill.cli.output import command_output, data_table
from bitmill.config.listing import listings
from bitmill.errors import RecipeError
from bitmill.report.text import format_mb

if TYPE_CHECKING:
    from bitmill.formats import Format
    from bitmill.recipes.recipe import Recipe

MethodName = Annotated[
    str | None,
    typer.Argument(help="Show one method in full.", autocompletion=complete_any_method, show_default=False),
]
RecipeName = Annotated[
    str | None,
    typer.Argument(
        help="Print one recipe as YAML, a start for your own.", autocompletion=complete_method, show_default=False
    ),
]
ModelName = Annotated[
    str | None, typer.Argument(help="Download a demo model, unless it is in the cache.", show_default=False)
]
AcceptLicence = Annotated[
    bool, typer.Option("--accept-licence", help="Accept the terms of the named model, which `models` shows.")
]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Option of the method; repeatable.", show_default=False),
]


def methods(name: MethodName = None, as_json: AsJson = False) -> None:
    """List the methods for weights and for keys and values, or show the card and the options of one."""
    with command_output(as_json) as output:
        if name is None:
            weights, kv = (
                [{"name": one.name, "description": one.summary} for one in listings(package).values()]
                for package in (METHODS, KV_METHODS)
            )
            columns = ("name", "description")
            output.result(
                {"methods": weights, "kv_methods": kv},
                lambda: [_table(columns, weights), "", "For keys and values (--kv)", _table(columns, kv)],
            )
            return
        listed = listings(KV_METHODS).get(name) or listings(METHODS).get(name)
        if listed is None:
            known = ", ".join([*listings(METHODS), *listings(KV_METHODS)])
            raise RecipeError(f"There is no method {name!r}; choose one of: {known}.")
        options = listed.options if listed.options is not None else _imported_options(name)
        shown = [{**o, "default": str(o["default"])} for o in options]
        data = {"name": name, "card": listed.card, "options": options}
        output.result(
            data, lambda: [_verbatim(listed.card), "", _table(("name", "type", "default", "help"), shown)]
        )


def recipes(name: RecipeName = None, settings: Settings = None, as_json: AsJson = False) -> None:
    """List all recipes: named methods, your own files, and the parts from which recipes are composed."""
    with command_output(as_json) as output:
        from bitmill.formats import FORMATS, Wrapper
        from bitmill.recipes.compose import find_recipe, user_recipes
        from bitmill.recipes.method import METHODS
        from bitmill.solvers import SOLVERS
        from bitmill.transforms import TRANSFORMS
        from bitmill.tuners import TUNERS

        if name is not None:
            recipe = find_recipe(name, parse_method_options(None, None, settings))
            output.result(recipe.to_dict(), lambda: [_verbatim(recipe.to_yaml().rstrip())])
            return
        named = [_recipe_row(n, find_recipe(n), first_sentence(kind)) for n, kind in METHODS.items()]
        own = [_recipe_row(n, find_recipe(n), str(file)) for n, file in user_recipes().items()]
        parts = {r.noun: r.names() for r in (FORMATS, SOLVERS, TRANSFORMS, TUNERS)}
        # wrappers are selected by --sparse and by transforms
        parts["format"] = [n for n, kind in FORMATS.items() if not issubclass(kind, Wrapper)]
        output.result({"named": named, "user": own, "parts": parts}, lambda: _render_recipes(named, own, parts))


def models(name: ModelName = None, accept_licence: AcceptLicence = False, as_json: AsJson = False) -> None:
    """List the demo models and the supported architectures, or download one demo model."""
    with command_output(as_json) as output:
        from bitmill.architectures.adapter import ADAPTERS
        from bitmill.sources.zoo import ZOO, bundled_configs, fetch, terms_of

        if name is not None:
            path = fetch(name, accept_licence)
            data = {**ZOO[name].describe(), "path": str(path)}
            output.result(data, lambda: [f"{ZOO[name].description}.", f"{terms_of(ZOO[name])}.", str(path)])
            return
        demo = [model.describe() for _, model in sorted(ZOO.items())]
        architectures = [
            {"name": name, "model_types": list(adapter.model_types)} for name, adapter in ADAPTERS.items()
        ]
        shown = [
            {**m, "parameters": f"{m['parameters'] / 1e6:.0f} M", "download": format_mb(m["download_bytes"])}
            for m in demo
        ]
        types = [{**a, "model_types": ", ".join(a["model_types"])} for a in architectures]
        output.result(
            {"demo_models": demo, "configs": bundled_configs(), "architectures": architectures},
            lambda: [
                "Demo models",
                _table(("name", "parameters", "download", "licence", "description"), shown),
                "",
                f"Configs without weights, for bitmill plan: {', '.join(bundled_configs())}",
                "",
                "Architectures (other models are handled by a generic adapter)",
                _table(("name", "model_types"), types),
            ],
        )


def first_sentence(kind: type) -> str:
    """Return the first line of a method's card."""
    return (inspect.getdoc(kind) or "").partition("\n")[0]


def _imported_options(name: str) -> list[dict[str, Any]]:
    """Return the options of a method whose source alone does not tell them."""
    from bitmill.kv import KV_METHODS
    from bitmill.recipes.method import METHODS

    kind: type = KV_METHODS.get(name) if name in KV_METHODS.names() else METHODS.get(name)
    return [describe_option(f) for f in dataclasses.fields(kind)]


def describe_option(field: dataclasses.Field[Any]) -> dict[str, Any]:
    """Return name, type, default and help of one option of a method, from its dataclass field."""
    default = field.default
    if default is dataclasses.MISSING:
        default = field.default_factory() if callable(field.default_factory) else None
    kind = field.type if isinstance(field.type, str) else getattr(field.type, "__name__", str(field.type))
    return {"name": field.name, "type": kind, "default": default, "help": field.metadata.get("help", "")}


def _render_recipes(
    named: list[dict[str, Any]], own: list[dict[str, Any]], parts: dict[str, list[str]]
) -> list[Any]:
    columns = ("name", "format", "solver", "transforms", "tuners")
    part_rows = [{"part": noun, "names": ", ".join(names)} for noun, names in parts.items()]
    return [
        _table(columns, named),
        *(["", "Your own", _table((*columns, "description"), own)] if own else []),
        "",
        "Parts, for --format, --solver, --transform, --tuner",
        _table(("part", "names"), part_rows),
    ]


def _recipe_row(name: str, recipe: Recipe, description: str) -> dict[str, Any]:
    return {
        "name": name,
        "format": _format_chain(recipe.default.format),
        "solver": recipe.solver.name,
        "transforms": ", ".join(t.name for t in recipe.transforms) or "-",
        "tuners": ", ".join(t.name for t in recipe.tuners) or "-",
        "description": description,
    }


def _format_chain(format: Format) -> str:
    """Return a format with the formats inside it: `rotated of sum of codebook`."""
    inner = getattr(format, "inner", None)
    return format.name if inner is None else f"{format.name} of {_format_chain(inner)}"


def _table(columns: Sequence[str], rows: list[dict[str, Any]]) -> Any:
    return data_table(columns, [[str(row[column]) for column in columns] for row in rows], left=columns)


def _verbatim(text: str) -> Any:
    from rich.text import Text

    return Text(text, no_wrap=True, overflow="ignore")
