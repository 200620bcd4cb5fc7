"""Registries of formats, solvers, transforms, tuners, methods and adapters.

A registry imports every module of its package on first use, so that adding a member is adding a file.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterator
from dataclasses import MISSING, Field, fields
from typing import Any, ClassVar, Generic, TypeVar

from bitmill.config.options import check_types
from bitmill.errors import RecipeError

T = TypeVar("T")


class Registry(Generic[T]):
    """A mapping from public names to members.

    Attributes:
        noun: the kind of member in messages, such as "format".
        package: dotted name of the package whose modules register members when they are imported.
    """

    def __init__(self, noun: str, package: str) -> None:
        self.noun = noun
        self.package = package
        self._members: dict[str, T] = {}
        self._discovered = False

    def register(self, name: str) -> Callable[[T], T]:
        """Return a decorator that registers a member under `name`, which must be unique."""

        def file(member: T) -> T:
            if name in self._members and self._members[name] is not member:
                raise RuntimeError(f"{self.noun} {name!r} is registered twice")
            self._members[name] = member
            return member

        return file

    def discover(self) -> None:
        """Import every module of the package, once."""
        if self._discovered:
            return
        self._discovered = True
        package = importlib.import_module(self.package)
        for module in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"{self.package}.{module.name}")

    def get(self, name: str) -> T:
        """Return the member called `name`.

        Raises:
            RecipeError: there is none; lists the registered names.
        """
        self.discover()
        if name not in self._members:
            raise RecipeError(f"There is no {self.noun} {name!r}; choose one of: {', '.join(self.names())}.")
        return self._members[name]

    def names(self) -> list[str]:
        """Return all names, sorted."""
        self.discover()
        return sorted(self._members)

    def items(self) -> Iterator[tuple[str, T]]:
        """Yield all (name, member) pairs, sorted by name."""
        for name in self.names():
            yield name, self._members[name]

    def name_of(self, member: object) -> str:
        """Return the name under which `member`, or the class of an instance, is registered."""
        self.discover()
        for name, known in self._members.items():
            if known is member or known is type(member):
                return name
        raise RecipeError(f"{member!r} is not a registered {self.noun}.")

    def options(self, name: str) -> dict[str, Field[Any]]:
        """Return the options of the member called `name`, in order.

        Raises:
            RecipeError: there is no such member.
        """
        kind: Any = self.get(name)
        return {f.name: f for f in fields(kind) if f.init}

    def unknown_option(self, name: str, option: str) -> RecipeError:
        """Return the error for an option that the member called `name` does not have."""
        known = ", ".join(self.options(name)) or "(none)"
        return RecipeError(f"The {self.noun} {name!r} has no option {option!r}; it has: {known}.")

    def from_dict(self, data: Any) -> Any:
        """Build a member from the plain data of `Member.to_dict`.

        Raises:
            RecipeError: an unknown name or option, a missing option, or a value of the wrong type.
        """
        values = dict(data) if isinstance(data, dict) else {}
        name = values.pop(self.noun, None)
        if not isinstance(name, str):
            article = "an" if self.noun[0] in "aeiou" else "a"
            raise RecipeError(
                f"{article.capitalize()} {self.noun} needs the field {self.noun!r} with its name; found {data!r}."
            )
        kind: Any = self.get(name)
        values = {k: self.from_dict(v) if isinstance(v, dict) else v for k, v in values.items()}
        known = self.options(name)
        if strange := next((key for key in values if key not in known), None):
            raise self.unknown_option(name, strange)
        wanted = (k for k, f in known.items() if f.default is MISSING and f.default_factory is MISSING)
        if absent := next((key for key in wanted if key not in values), None):
            raise RecipeError(f"The {self.noun} {name!r} needs the option {absent!r}; give it a value.")
        return kind(**values)


class Member:
    """Base of registered dataclasses: frozen, checked when they are built, converted to plain data and back."""

    registry: ClassVar[Registry[Any]]
    left_out: ClassVar[dict[str, Any]] = {}  # values of options that plain data of earlier versions does not name

    def __post_init__(self) -> None:
        check_types(self, self.name)

    @property
    def name(self) -> str:
        """The registered name."""
        return self.registry.name_of(self)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data; `Registry.from_dict` is its inverse."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}  # type: ignore[arg-type]
        values = {k: v for k, v in values.items() if k not in self.left_out or v != self.left_out[k]}
        plain = {k: v.to_dict() if isinstance(v, Member) else v for k, v in values.items()}
        return {self.registry.noun: self.name, **plain}
