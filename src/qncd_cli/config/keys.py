"""The keys of the configuration as a list, for people: docs/config.md and `qncd init`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from .schema import Config


@dataclass(frozen=True)
class Key:
    """path: dotted; default: None where the key has to be set and where null is the default;
    values: the words that it takes, none where it takes others."""

    path: str
    default: Any
    required: bool
    values: tuple[str, ...]
    description: str


@dataclass(frozen=True)
class Section:
    path: str
    description: str
    keys: tuple[Key, ...]


def sections(kind: type[BaseModel] = Config, path: str = "") -> Iterator[Section]:
    """Each section that has keys of its own, parents first; that of one layer's overrides under
    the pattern in its place."""
    keys, below = [], []
    for name, field in kind.model_fields.items():
        inner = section_of(field)
        dotted = f"{path}.{name}".lstrip(".")
        if inner is None or get_origin(field.annotation) is dict:
            keys.append(_key(dotted, field))
        if inner is not None:
            pattern = ".<pattern>" if get_origin(field.annotation) is dict else ""
            below.append((inner, dotted + pattern))
    if keys:
        yield Section(path, _first_line(kind), tuple(keys))
    for inner, dotted in below:
        yield from sections(inner, dotted)


def section_of(field: FieldInfo) -> type[BaseModel] | None:
    """The section that a field is, or holds by pattern."""
    candidates = [field.annotation, *get_args(field.annotation)]
    found = [c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)]
    return found[0] if found else None


def values_of(annotation: Any) -> tuple[str, ...]:
    """The words that a key takes: of its Literal, one alternative of several too."""
    if get_origin(annotation) is Literal:
        return tuple(str(value) for value in get_args(annotation))
    return tuple(word for part in get_args(annotation) for word in values_of(part))


def _key(path: str, field: FieldInfo) -> Key:
    required = field.is_required()
    default = None if required else field.default
    return Key(path, default, required, values_of(field.annotation), field.description or "")


def _first_line(kind: type[BaseModel]) -> str:
    return (kind.__doc__ or "").strip().splitlines()[0] if kind.__doc__ else ""
