"""YAML files with `key=value` overrides, checked by pydantic, with errors of one line."""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from shards.errors import ConfigError


class Settings(BaseModel):
    """Base of every settings model: unknown keys are errors, values do not change after the check."""

    model_config = ConfigDict(extra="forbid", frozen=True)


S = TypeVar("S", bound=BaseModel)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises
    ------
    ConfigError
        If the file is missing, is no YAML, or holds something else than a mapping.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(path, "", "no such file", "a YAML file", "Check the path")
    try:
        tree = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(path, "", f"unreadable YAML ({error})", "a YAML file") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(path, "", f"a {type(tree).__name__} at the top level", "a mapping of keys to values")
    return tree


def override(tree: dict[str, Any], assignments: Sequence[str]) -> dict[str, Any]:
    """A copy of `tree` with `a.b=value` assignments applied; values are parsed as YAML."""
    result: dict[str, Any] = json.loads(json.dumps(tree, default=str))
    for assignment in assignments:
        key, sign, value = assignment.partition("=")
        if not sign or not key:
            raise ConfigError("command line", assignment, "no key=value", "an override such as run.steps=100")
        *parents, last = key.split(".")
        node = result
        for depth, parent in enumerate(parents):
            child = node.setdefault(parent, {})
            if not isinstance(child, dict):
                raise ConfigError("command line", key, f"{'.'.join(parents[: depth + 1])} is a value", "a section")
            node = child
        try:
            parsed = yaml.safe_load(value)
        except yaml.YAMLError:
            raise ConfigError("command line", key, value, "a YAML value") from None
        # YAML 1.1 reads 1e-3 as text; people mean the number.
        if isinstance(parsed, str):
            with suppress(ValueError):
                parsed = float(parsed)
        node[last] = parsed
    return result


def _known_keys(model: type[BaseModel], location: tuple[Any, ...]) -> list[str]:
    """Names a key at `location` could have had."""
    current: Any = model
    for part in location[:-1]:
        if isinstance(part, str):  # the number of an item leaves the model of the items
            field = getattr(current, "model_fields", {}).get(part)
            current = getattr(field, "annotation", None)
        while get_args(current):  # tuple[Item, ...], Item | None
            current = get_args(current)[0]
    return list(getattr(current, "model_fields", {}))


def check(model: type[S], tree: dict[str, Any], where: str | Path) -> S:
    """`tree` as a checked settings object.

    Raises
    ------
    ConfigError
        For the first unknown key, missing key or value out of range, with file, field, got and expected.
    """
    try:
        return model.model_validate(tree)
    except ValidationError as error:
        first = error.errors()[0]
        location = first["loc"]
        field = ".".join(str(part) for part in location)
        if first["type"] == "extra_forbidden":
            known = _known_keys(model, location)
            near = difflib.get_close_matches(str(location[-1]), known, n=1)
            hint = f"Did you mean {near[0]}?" if near else "Remove it or correct its name"
            expected = f"one of {', '.join(known)}" if known else "no such key"
            raise ConfigError(where, field, "an unknown key", expected, hint) from None
        if first["type"] == "missing":
            raise ConfigError(where, field, "nothing", "a value", "Add this key") from None
        expected = first["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
        raise ConfigError(where, field or "settings", repr(first["input"]), expected) from None


def load(model: type[S], path: str | Path, assignments: Sequence[str] = ()) -> S:
    """A settings object from a YAML file and `key=value` overrides."""
    return check(model, override(read_yaml(path), assignments), path)


def digest(tree: Any) -> str:
    """SHA-256 (hex) of a JSON-able tree, independent of the order of its keys."""
    return hashlib.sha256(json.dumps(tree, sort_keys=True, default=str).encode()).hexdigest()
