"""What a configuration class says of its keys: types, defaults and meanings, read from its fields and docstrings."""

from __future__ import annotations

import inspect
import re
import types
from collections.abc import Iterator
from dataclasses import dataclass, is_dataclass
from enum import Enum
from typing import Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic.fields import FieldInfo

_PLAIN = {type(None): "null", int: "integer", float: "number", str: "text", bool: "`true`, `false`"}
_BOUNDS = {Gt: (">", "gt"), Ge: (">=", "ge"), Lt: ("<", "lt"), Le: ("<=", "le")}


@dataclass(frozen=True)
class Key:
    """One setting.

    Attributes:
        name: within its class.
        type: what may be given, in words.
        default: in YAML; empty where a value must be given.
        meaning: of the docstring, or that of the class of the settings below it.
        parts: class of the settings below it, or None.
        path: how these are reached: the name itself, or with a placeholder for the name or place of one of several.
    """

    name: str
    type: str
    default: str
    meaning: str
    parts: type | None
    path: str


def keys_of(cls: type) -> list[Key]:
    """All settings of a class, in the order of its fields."""
    meanings = {name: text for base in reversed(cls.__mro__) for name, text in _meanings(base)}
    fields: dict[str, FieldInfo] = cls.__pydantic_fields__  # type: ignore[attr-defined]
    return [_key(name, field, meanings.get(name, "")) for name, field in fields.items()]


def summary_of(cls: type) -> str:
    """The docstring without its list of attributes, a paragraph a line."""
    text = re.split(r"^Attributes:$", inspect.cleandoc(cls.__doc__ or ""), flags=re.MULTILINE)[0]
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in text.strip().split("\n\n"))


def _meanings(cls: type) -> Iterator[tuple[str, str]]:
    _, marked, text = inspect.cleandoc(cls.__doc__ or "").partition("Attributes:\n")
    if not marked:
        return
    # an entry begins at four spaces, and goes on deeper
    for entry in re.split(r"\n(?=    \S)", text.rstrip()):
        found = re.match(r"\s*([a-z_, ]+): (.*)", entry, re.DOTALL)
        assert found, f"{cls.__name__}: {entry}"
        for name in found[1].split(", "):
            # YAML's word for Python's
            yield name, re.sub(r"\bNone\b", "null", " ".join(found[2].split()))


def _key(name: str, field: FieldInfo, meaning: str) -> Key:
    parts, path = _parts(field.annotation, name)
    if parts is not None and not meaning:
        meaning = summary_of(parts).partition("\n")[0]
    return Key(name, _type(field.annotation, field.metadata), _default(field, parts), meaning, parts, path)


def _parts(annotation: Any, path: str) -> tuple[type | None, str]:
    """Class of the settings below a key, and how to reach them."""
    if is_dataclass(annotation):
        assert isinstance(annotation, type)
        return annotation, path
    arguments = get_args(annotation)
    if get_origin(annotation) is dict:
        return _parts(arguments[1], f"{path}.NAME")
    if get_origin(annotation) is tuple:
        return _parts(arguments[0], f"{path}[]")
    found = [_parts(argument, path) for argument in arguments if is_dataclass(argument)]
    return found[0] if len(found) == 1 else (None, path)


def _type(annotation: Any, bounds: list[Any]) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if origin in (Union, types.UnionType):
        ordered = sorted(arguments, key=lambda one: one is type(None))
        return " or ".join(dict.fromkeys(_type(one, bounds) for one in ordered))
    if origin is tuple:
        inner = _type(arguments[0], [])
        return f"list of {inner}" if arguments[-1] is Ellipsis else f"{len(arguments)} x {inner}"
    if origin is dict:
        return f"{_type(arguments[0], [])} → {_type(arguments[1], [])}"
    if origin is not None:
        return _type(arguments[0], list(arguments[1].metadata))
    return _one_class(annotation) + ("" if annotation is type(None) else ",".join(_limits(bounds)))


def _one_class(annotation: type) -> str:
    if issubclass(annotation, Enum):
        return ", ".join(f"`{member.value}`" for member in annotation)
    if is_dataclass(annotation):
        return "settings"
    return _PLAIN.get(annotation, annotation.__name__)


def _limits(bounds: list[Any]) -> Iterator[str]:
    for bound in bounds:
        if type(bound) in _BOUNDS:
            sign, field = _BOUNDS[type(bound)]
            yield f" {sign} {_yaml(getattr(bound, field))}"


def _default(field: FieldInfo, parts: type | None) -> str:
    if field.is_required():
        return ""
    value = field.get_default(call_default_factory=True)
    if parts is not None and is_dataclass(value):
        return "below"
    return f"`{_yaml(value)}`"


def _yaml(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, Enum):
        return str(value.value)
    if isinstance(value, tuple):
        return f"[{', '.join(map(_yaml, value))}]"
    if isinstance(value, str):
        return value or '""'
    return f"{value:g}" if isinstance(value, float) else str(value)
