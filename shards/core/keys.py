"""The keys of a settings model, as people look them up: type, unit, default, what it means."""

from __future__ import annotations

import types
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from shards.core.errors import ConfigError, did_you_mean
from shards.core.settings import Unit

_NAMES = {int: "integer", float: "number", str: "text", bool: "true or false", Path: "path", type(None): "null"}
_SIGNS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}


@dataclass(frozen=True, kw_only=True)
class Key:
    """One key of a configuration, or a section of keys.

    Attributes
    ----------
    name : str
        With the sections it lies in: `run.steps`.
    type : str
        In words, with its limits: `integer >= 1, or null`. "section" where keys lie below it.
    unit : str
        What it is measured in or counts; empty where it has none.
    required : bool
        It has no default.
    default : JSON value
    description : str
    """

    name: str
    type: str
    unit: str
    required: bool
    default: Any
    description: str

    def facts(self) -> dict[str, object]:
        """As a JSON object."""
        return asdict(self)


def keys(model: type[BaseModel], above: str = "") -> Iterator[Key]:
    """Every key of a settings model, sections before what lies in them."""
    for name, field in model.model_fields.items():
        place = f"{above}{name}"
        below = [*_models(field.annotation)]
        section = bool(below) and isinstance(field.annotation, type)
        required = field.is_required()
        units = [*_units(field.annotation), *(part.name for part in field.metadata if isinstance(part, Unit))]
        yield Key(
            name=place,
            type="section" if section else _type(field),
            unit=", ".join(dict.fromkeys(units)),
            required=required,
            default=None if required or section else _json(model, name, field),
            description=field.description or _first_line(field.annotation if section else None),
        )
        for inner in below:
            yield from keys(inner, f"{place}.")


def explain(model: type[BaseModel], asked: str | None) -> list[Key]:
    """All keys of a model, or one with what lies below it.

    Raises
    ------
    ConfigError
        If there is no such key.
    """
    found = [*keys(model)]
    if asked is None:
        return found
    chosen = [key for key in found if key.name == asked or key.name.startswith(f"{asked}.")]
    if not chosen:
        names = [key.name for key in found]
        same_end = [name for name in names if name.rpartition(".")[2] == asked.rpartition(".")[2]]
        hint = did_you_mean(asked, names, f"Did you mean {same_end[0]}?" if same_end else "")
        tops = ", ".join(name for name in names if "." not in name)
        raise ConfigError("command line", "KEY", asked, f"a key, such as {tops}", hint)
    return chosen


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    """The settings models that an annotation names."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from _models(part)


def _units(annotation: Any) -> Iterator[str]:
    if isinstance(annotation, Unit):
        yield annotation.name
    for part in getattr(annotation, "__metadata__", ()):
        yield from _units(part)
    if get_origin(annotation) is not Literal:
        for part in get_args(annotation):
            yield from _units(part)


def _type(field: FieldInfo) -> str:
    """In words, with the limits of a number."""
    limits = " and ".join(
        f"{sign} {getattr(limit, name)}"
        for limit in field.metadata
        for name, sign in _SIGNS.items()
        if hasattr(limit, name)
    )
    *first, last = _alternatives(field.annotation)
    first, last = ([*first, last], "") if last != "null" else (first, last)
    text = " or ".join(first) + (f" {limits}" if limits else "")
    return f"{text}, or null" if last else text


def _alternatives(annotation: Any) -> list[str]:
    """What may stand there, each in words."""
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _alternatives(parts[0])
    if origin in (Union, types.UnionType):
        named = [name for part in parts for name in _alternatives(part)]
        return sorted(dict.fromkeys(named), key=lambda name: name == "null")
    if origin is Literal:
        return [str(part) for part in parts]
    if origin is tuple:
        count = "list of" if parts[-1] is Ellipsis else len(parts)
        return [f"{count} {' or '.join(map(_plural, _alternatives(parts[0])))}"]
    if origin is dict:
        return [f"mapping to {' or '.join(_alternatives(parts[1]))}"]
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [f"{{{', '.join(annotation.model_fields)}}}"]
    return [_NAMES.get(annotation, "anything")]


def _plural(name: str) -> str:
    return f"{name}s" if name in ("integer", "number") else name


def _json(model: type[BaseModel], name: str, field: FieldInfo) -> Any:
    """The default of a field, as JSON."""
    value = field.get_default(call_default_factory=True)
    return model.model_construct(**{name: value}).model_dump(mode="json", include={name}, warnings=False)[name]


def _first_line(model: Any) -> str:
    return (getattr(model, "__doc__", None) or "").strip().partition("\n")[0]
