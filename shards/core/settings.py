"""Settings from YAML files with `key=value` overrides, checked by pydantic, with one-line errors."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar, cast, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError

from shards.core import tree as yaml_tree
from shards.core.errors import ConfigError, UserError, did_you_mean
from shards.core.files import printable, trouble

_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)[eE][+-]?\d+", re.ASCII)
_ZEROS = re.compile(r"0[0-9_]+", re.ASCII)
_LONGEST_PATH = 2000
_SHOWN = 200  # largest number of characters of a value in an error
COMMAND_LINE = "command line"  # the source of a typed value in errors
Location = tuple[Any, ...]  # position in a tree: names of keys, and numbers of list items


class Contradiction(ValueError):
    """Raised by a check of several settings together. `check` reports the setting that is to be changed.

    Parameters
    ----------
    key : str
        Name of this setting in its section, such as `heads` or `run.batch`.
    got, expected : object
        Its value, and what is accepted.
    hint : str, optional
        What to do, as an imperative sentence.
    """

    def __init__(self, key: str, got: object, expected: str, hint: str = ""):
        super().__init__(f"{key}: {expected}")
        self.key, self.got, self.expected, self.hint = key, got, expected, hint


class Settings(BaseModel):
    """Base class of settings: unknown keys are errors, and values are read-only after the check."""

    model_config = ConfigDict(extra="forbid", frozen=True)


@dataclass(frozen=True)
class Unit:
    """What a setting is measured in or counts, as metadata of its type: `Annotated[float, Unit("mm")]`."""

    name: str


def whole_number(words: str, least: int, most: float = math.inf) -> Callable[[Any], Any]:
    """A check of a word or a whole number, whose error names all that is accepted.

    Parameters
    ----------
    words : str
        Such as `all`, or `auto, null`; null is None.
    least, most : number
    """

    def checked(value: Any) -> Any:
        if (value is None or isinstance(value, str)) and (value or "null") in words.split(", "):
            return value
        if isinstance(value, float) and value.is_integer():  # 1e4
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            numbers = f"of {least} or more" if math.isinf(most) else f"from {least} to {most:g}"
            raise ValueError(f"{words} or a whole number {numbers}")
        return value

    return checked


def _is_path(text: str) -> str:
    if "\0" in text or len(text) > _LONGEST_PATH or any(len(part.encode()) > 255 for part in text.split("/")):
        raise ValueError(f"a path of at most {_LONGEST_PATH} characters, with names of at most 255 bytes, without NUL")
    return text


PathText = Annotated[str, AfterValidator(_is_path)]  # a path, or a pattern of paths, that is valid on all systems

S = TypeVar("S", bound=BaseModel)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read the mapping in a YAML file.

    Raises
    ------
    ConfigError
        If the file is missing or not YAML, exceeds the limits of `shards.core.tree`, or does not hold a mapping.
    """
    path = Path(path)
    if "\0" in str(path) or not (os.path.lexists(path) and (path.is_symlink() or path.is_file())):
        raise ConfigError(printable(path), "", "no such file", "a YAML file", "Check the path")
    if path.is_file() and not path.stat().st_size:
        return {}
    if found := trouble(path):
        raise ConfigError(path, "", found.got, "a YAML file", found.hint)
    if (size := path.stat().st_size) > yaml_tree.MOST_BYTES:
        raise ConfigError(path, "", f"a file of {size} bytes", f"settings of at most {yaml_tree.MOST_BYTES}")
    content = path.read_bytes()
    encoding = "utf-16" if content.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8-sig"
    try:
        tree = yaml_tree.parse(content.decode(encoding))
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        got = f"unreadable YAML (bytes that are not UTF-8 in line {line})"
        raise ConfigError(path, "", got, "a YAML file", "Save it as UTF-8") from None
    except yaml_tree.TreeError as error:
        raise ConfigError(path, "", f"unreadable YAML ({error})", "a YAML file") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(path, "", f"a {type(tree).__name__} at the top level", "a mapping of keys to values")
    return tree


class Overridden(dict[str, Any]):
    """A tree of settings with assignments applied.

    Attributes
    ----------
    words : dict
        The typed text of each value, by its position in the tree. It is needed for names such as 2024.
    before : dict
        The tree without the assignments.
    """

    words: dict[tuple[str, ...], str]
    before: dict[str, object]


def override(tree: dict[str, Any], assignments: Sequence[str]) -> Overridden:
    """Return a copy of `tree` with `a.b=value` assignments applied. Values are parsed as YAML.

    If a setting is text, `check` uses the typed text instead of the YAML value. Assignments that were applied to `tree`
    before are kept.

    Raises
    ------
    ConfigError
        If an assignment is not `key=value`, its value is not YAML, or a part of its key is a value, not a section.
    """
    result = Overridden(json.loads(json.dumps(tree, default=str)))
    result.words = dict(tree.words) if isinstance(tree, Overridden) else {}
    result.before = tree.before if isinstance(tree, Overridden) else tree
    for assignment in assignments:
        key, sign, value = assignment.partition("=")
        if not sign or not key:
            raise ConfigError(COMMAND_LINE, shown(assignment), "no `=`", "an override such as run.steps=100")
        *parents, last = key.split(".")
        if len(parents) >= yaml_tree.MOST_DEPTH:
            expected = f"at most {yaml_tree.MOST_DEPTH} (run.steps=100 has two)"
            raise ConfigError(COMMAND_LINE, shown(key), f"{len(parents) + 1} parts", expected)
        node: dict[str, Any] = result
        for depth, parent in enumerate(parents):
            child = node.setdefault(parent, {})
            if not isinstance(child, dict):
                got = f"{'.'.join(parents[: depth + 1])} is a value"
                raise ConfigError(COMMAND_LINE, shown(key), got, "a section")
            node = child
        try:
            parsed = yaml_tree.parse(value)
        except yaml_tree.TreeError as error:
            raise ConfigError(COMMAND_LINE, shown(key), f"{shown(value)} ({error})", "a YAML value") from None
        # YAML 1.1 reads 001 as a number, but users mean a name. Fields of numbers accept the text, too.
        if isinstance(parsed, int | float) and _ZEROS.fullmatch(value.strip()):
            parsed = value.strip()
        # YAML 1.1 reads 1e-3 as text, but users mean the number.
        if isinstance(parsed, str) and _NUMBER.fullmatch(parsed):
            parsed = float(parsed)
        node[last] = parsed
        result.words[(*parents, last)] = value.strip()
    return result


def shown(text: str) -> str:
    """Text of the user for an error message: printable, and cut if it is long."""
    text = printable(text[: _SHOWN + 1])
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]} ..."


def _known_keys(model: type[BaseModel], location: Location) -> list[str]:
    """The keys that are accepted at `location`."""
    current: Any = model
    for part in location[:-1]:
        if isinstance(part, str):  # the number of a list item does not change the model
            field = getattr(current, "model_fields", {}).get(part)
            current = getattr(field, "annotation", None)
        while get_args(current):  # tuple[Item, ...], Item | None
            current = get_args(current)[0]
    return list(getattr(current, "model_fields", {}))


def check(model: type[S], tree: Any, where: str | Path, kind: type[UserError] = ConfigError) -> S:
    """Check `tree`, and return it as a settings object.

    Parameters
    ----------
    model : kind of BaseModel
    tree : mapping
    where : str or Path
        The file, named in errors. Errors of typed values name the command line.
    kind : kind of UserError
        Type of the errors.

    Raises
    ------
    UserError
        Of this kind, for the first unknown key, missing key or wrong value.
    """
    try:
        return model.model_validate(tree)
    except ValidationError as error:
        first = error.errors()[0]
        location = first["loc"]
        if first["type"] == "string_type" and isinstance(tree, Overridden) and location in tree.words:
            return check(model, _as_typed(tree, location), where, kind)
        if isinstance(tree, Overridden) and _is_typed(model, tree, location, first["type"]):
            where = COMMAND_LINE
        cause = first.get("ctx", {}).get("error")
        if isinstance(cause, Contradiction):
            field = shown(".".join(map(str, (*location, cause.key))))
            raise kind(where, field, shown(str(cause.got)), cause.expected, cause.hint) from None
        field = shown(".".join(str(part) for part in location))
        if first["type"] == "extra_forbidden":
            raise _unknown(model, location, where, kind) from None
        if first["type"] == "missing":
            raise kind(where, field, "nothing", "a value", "Add this key") from None
        if first["type"] == "string_type" and isinstance(first["input"], bool | int | float):
            hint = "YAML reads this as another type: put it in quotes"
            raise kind(where, field or "settings", shown(repr(first["input"])), "text", hint) from None
        if first["type"] == "too_short":
            got, least = f"{first['ctx']['actual_length']} values", first["ctx"]["min_length"]
            raise kind(where, field or "settings", got, f"at least {least}") from None
        expected = first["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
        raise kind(where, field or "settings", shown(repr(first["input"])), expected) from None


def _is_typed(model: type[BaseModel], tree: Overridden, location: Location, error: str) -> bool:
    """Whether an error of this type comes from an assignment: it is in a typed value, or absent without those.

    Without typed values a required one may be missing, so that checks of several values are not made: such are kept.
    """
    if any(location[: len(key)] == key for key in tree.words):
        return True
    alone: Any = copy.deepcopy(tree.before)
    while True:
        try:
            model.model_validate(alone)
        except ValidationError as found:
            if any((one["loc"], one["type"]) == (location, error) for one in found.errors()):
                return False
            absent = [one["loc"] for one in found.errors() if one["type"] == "missing" and one["loc"] in tree.words]
            for where in absent:
                node, typed_node = alone, cast(Any, tree)
                for part in where[:-1]:
                    node, typed_node = node[part], typed_node[part]
                node[where[-1]] = typed_node[where[-1]]
            if not absent:
                return True
        else:
            return True


def check_keys(model: type[BaseModel], tree: Overridden) -> None:
    """Check only that the keys of assignments are known, before the other settings are known.

    Raises
    ------
    ConfigError
        For the first unknown key.
    """
    try:
        model.model_validate(tree)
    except ValidationError as error:
        for found in error.errors():
            if found["type"] == "extra_forbidden":
                raise _unknown(model, found["loc"], COMMAND_LINE, ConfigError) from None


def _unknown(model: type[BaseModel], location: Location, where: str | Path, kind: type[UserError]) -> UserError:
    """The error for an unknown key."""
    known = _known_keys(model, location)
    hint = did_you_mean(str(location[-1])[:_SHOWN], known, "Remove it or correct its name")
    expected = f"one of {', '.join(known)}" if known else "no such key"
    return kind(where, shown(".".join(map(str, location))), "an unknown key", expected, hint)


def _as_typed(tree: Overridden, location: Location) -> Overridden:
    """Return a copy of a tree with one value replaced by its typed text."""
    result = copy.deepcopy(tree)
    node: dict[str, Any] = result
    for part in location[:-1]:
        node = node[part]
    node[location[-1]] = result.words.pop(location)
    return result


@contextmanager
def typed(assignments: Sequence[str], where: str | Path) -> Iterator[None]:
    """Context in which errors of a key that was typed name the command line, not the file `where`.

    It is for checks that `check` cannot make, such as whether a dataset has the label of a task.
    """
    keys = {assignment.partition("=")[0] for assignment in assignments}
    try:
        yield
    except ConfigError as error:
        field = f"{error.field}."
        near = any(field.startswith(f"{key}.") or key.startswith(field) for key in keys)
        if error.where == str(where) and near:
            raise type(error)(COMMAND_LINE, error.field, error.got, error.expected, error.hint) from None
        raise


def load(model: type[S], path: str | Path, assignments: Sequence[str] = ()) -> S:
    """Read and check settings from a YAML file and `key=value` overrides."""
    return check(model, override(read_yaml(path), assignments), path)


def digest(tree: Any) -> str:
    """SHA-256 (hex) of a JSON-serialisable tree, independent of the order of its keys."""
    return hashlib.sha256(json.dumps(tree, sort_keys=True, default=str).encode()).hexdigest()
