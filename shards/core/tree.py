"""Parse YAML text to mappings, lists and values, with limits far above any settings.

The text is parsed event by event, so exponential or circular aliases and deep nesting are refused before they use
memory. Keys are always text (`2020-01-01`, `1` and `yes` are names) and must be unique. Dates stay text, too.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import yaml

MOST_BYTES = 1 << 20
MOST_DEPTH = 40  # nesting of mappings and lists
MOST_VALUES = 50_000  # number of values, including those repeated by aliases
_MOST_DIGITS = 18  # digits of a whole number, which then fits 64 bits
_Loader: type = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_TAG = "tag:yaml.org,2002:"
_NAMES = {"map": dict, "seq": list}
_WORDS = {"int": f"whole number of at most {_MOST_DIGITS} digits", "float": "number", "bool": "yes or no"}


class TreeError(ValueError):
    """Text that is not YAML, or exceeds the limits."""


@dataclass
class _Open:
    """A mapping or list that is being parsed."""

    value: dict[str, object] | list[Any]
    anchor: str | None
    before: int  # number of values before it
    key: str | None = None
    merged: list[dict[str, object]] = field(default_factory=list)  # mappings merged by `<<`; own keys take precedence


def parse(text: str) -> Any:
    """Parse the document in a YAML text; None if the text is empty.

    Raises
    ------
    TreeError
        If the text is not YAML, has several documents, duplicate keys, keys that are not text, tags of other types or
        numbers of more than 18 digits, or exceeds the limits.
    """
    if len(text) > MOST_BYTES:
        raise TreeError(f"{len(text)} characters, more than the limit of {MOST_BYTES}")
    try:
        loader = _Loader(text)
        try:
            return _Builder(loader).document()
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        line = f" in line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise TreeError(f"{error.problem or error.context}{line}") from None
    except yaml.YAMLError as error:
        raise TreeError(str(error).replace("\n", " ")) from None
    except UnicodeError:
        raise TreeError("text that is not UTF-8") from None


class _Builder:
    """Builds values from the events of a YAML loader."""

    def __init__(self, loader: Any):
        self._loader = loader
        self._count = 0
        self._anchors: dict[str | None, tuple[Any, int] | None] = {}  # value and its size; None while it is parsed

    def document(self) -> Any:
        root: list[Any] = []
        stack = [_Open(root, None, 0)]
        documents = 0
        while self._loader.check_event():
            event = self._loader.get_event()
            line = event.start_mark.line + 1
            if isinstance(event, yaml.DocumentStartEvent):
                documents += 1
                if documents > 1:
                    raise TreeError(f"a second document in line {line}")
            elif isinstance(event, yaml.ScalarEvent):
                self._tally(1, line)
                value = self._scalar(event, line, is_key=_wants_key(stack[-1]))
                self._name(event.anchor, value, 1)
                _put(stack[-1], value, line)
            elif isinstance(event, yaml.AliasEvent):
                _put(stack[-1], self._alias(event.anchor, line), line)
            elif isinstance(event, yaml.CollectionStartEvent):
                self._tally(1, line)
                self._open(stack, event, line)
            elif isinstance(event, yaml.CollectionEndEvent):
                done = stack.pop()
                value = {**_joined(done.merged), **done.value} if isinstance(done.value, dict) else done.value
                self._name(done.anchor, value, self._count - done.before)
                _put(stack[-1], value, line)
        return root[0] if root else None

    def _open(self, stack: list[_Open], event: Any, line: int) -> None:
        kind = "map" if isinstance(event, yaml.MappingStartEvent) else "seq"
        if len(stack) > MOST_DEPTH:
            raise TreeError(f"more than {MOST_DEPTH} levels in line {line}")
        if event.tag not in (None, "!", _TAG + kind):
            raise TreeError(
                f"the tag {event.tag[:40]} in line {line}; only mappings, lists, text and numbers are accepted"
            )
        if event.anchor is not None:
            self._anchors[event.anchor] = None
        stack.append(_Open(_NAMES[kind](), event.anchor, self._count - 1))

    def _tally(self, values: int, line: int) -> None:
        self._count += values
        if self._count > MOST_VALUES:
            raise TreeError(f"more than {MOST_VALUES} values, including those repeated by aliases, in line {line}")

    def _name(self, anchor: str | None, value: Any, size: int) -> None:
        if anchor is not None:
            self._anchors[anchor] = value, size

    def _alias(self, anchor: str | None, line: int) -> Any:
        if anchor not in self._anchors:
            raise TreeError(f"an alias in line {line} before its anchor")
        found = self._anchors[anchor]
        if found is None:
            raise TreeError(f"an alias in line {line} inside its own anchor")
        value, size = found
        self._tally(size, line)
        return value

    def _scalar(self, event: Any, line: int, is_key: bool) -> Any:
        text = event.value
        tag = event.tag
        if tag in (None, "!"):
            tag = self._loader.resolve(yaml.ScalarNode, text, event.implicit) if tag is None else _TAG + "str"
        if is_key:
            return _MERGE if tag == _TAG + "merge" else text
        kind = tag.removeprefix(_TAG)
        try:
            return _value(kind, text)
        except (ValueError, KeyError):
            cut = f"{text[:40]!r}{' ...' if len(text) > 40 else ''} in line {line}"
            wanted = _WORDS.get(kind, f"accepted type of value ({kind[:40]})")
            raise TreeError(f"{cut}, which is no {wanted}") from None


class _Merge(str):
    """The key `<<` without quotes, which merges mappings."""


_MERGE = _Merge("<<")


def _wants_key(inner: _Open) -> bool:
    return isinstance(inner.value, dict) and inner.key is None


def _put(inner: _Open, value: Any, line: int) -> None:
    """Add a value to the mapping or list that contains it."""
    if isinstance(inner.value, list):
        inner.value.append(value)
    elif inner.key is None:
        if not isinstance(value, str):
            raise TreeError(f"a key in line {line} that is not text")
        inner.key = value
    else:
        key, inner.key = inner.key, None
        if isinstance(key, _Merge):
            parts = value if isinstance(value, list) else [value]
            if not all(isinstance(part, dict) for part in parts):
                raise TreeError(f"<< in line {line} with a value that is not a mapping")
            inner.merged += parts
        elif key in inner.value:
            raise TreeError(f"the key {key[:40]!r} a second time in line {line}")
        else:
            inner.value[key] = value


def _joined(parts: list[dict[str, object]]) -> dict[str, object]:
    """Merge mappings. For a key in several of them, the first value is used."""
    return {key: value for part in reversed(parts) for key, value in part.items()}


def _value(kind: str, text: str) -> Any:
    """Convert a scalar of YAML 1.1; raises ValueError or KeyError if the text is not of this type."""
    if kind in ("str", "timestamp", "value", "merge"):
        return text
    if kind == "null":
        return None
    if kind == "bool":
        return yaml.SafeLoader.bool_values[text.lower()]
    if kind == "float":
        return _float(text.replace("_", "").lower())
    if kind == "int":
        return _int(text.replace("_", ""))
    raise ValueError(kind)


def _int(text: str) -> int:
    sign = -1 if text.startswith("-") else 1
    digits = text.lstrip("+-")
    if len(digits) > 4 * _MOST_DIGITS:
        raise ValueError("too long")
    if ":" in digits:  # base 60: 1:30 is 90
        number = 0
        for part in digits.split(":"):
            number = number * 60 + int(part)
    elif digits[:2] in ("0b", "0x"):
        number = int(digits[2:], 2 if digits[1] == "b" else 16)
    else:
        number = int(digits, 8) if digits.startswith("0") and digits != "0" else int(digits)
    if number >= 10**_MOST_DIGITS:
        raise ValueError("too large")
    return sign * number


def _float(text: str) -> float:
    sign = -1.0 if text.startswith("-") else 1.0
    digits = text.lstrip("+-")
    if digits in (".inf", ".nan"):
        return sign * float(digits[1:])
    number = 0.0
    for part in digits.split(":"):
        if not re.fullmatch(r"(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", part):
            raise ValueError(part)
        number = number * 60 + float(part)
    return sign * number
