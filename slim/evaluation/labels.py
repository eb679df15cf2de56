"""Values of a column of labels: what is missing, what is one value, what is a number.

    word(1.0) == word("1") == word(" 1 ") == "1"        # one class
    word("01") == "01"                                  # a name; beside "1" it is refused

Missing is what a conversion leaves out (`n/a` and an empty field), and what a task lists under `missing`. None, NA and
nan as text are values like any other.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable
from decimal import Decimal
from pathlib import Path
from typing import Any

from shards.core.errors import ConfigError

_NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d{1,3})?", re.ASCII)
_NAME = re.compile(r"[+-]?0\d", re.ASCII)  # how a number begins that is a name: 007


def is_missing(value: Any, marks: Iterable[str] = ()) -> bool:
    """Whether a value is none: None, NaN, "", "n/a", or one of `marks`."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return True
    found = word(value)
    return found in ("", "n/a") or found in {word(mark) for mark in marks}


def word(value: Any) -> str:
    """A value as text, the same for all ways to write it: without blanks around it, a number without idle zeros.

    Numbers that begin with a zero stay as they are: an id 007 is no 7.
    """
    text = repr(float(value)) if isinstance(value, float) else str(value).strip()
    if not _NUMBER.fullmatch(text) or _NAME.match(text):
        return text
    exact = Decimal(text)
    return str(int(exact)) if exact == exact.to_integral_value() else f"{exact.normalize():f}"


def number(value: Any) -> float | None:
    """A value as a number; None where it is none, or none that is finite."""
    if isinstance(value, bool):
        return None
    if isinstance(value, int | float):
        return float(value) if math.isfinite(value) else None
    text = str(value).strip()
    found = float(text) if _NUMBER.fullmatch(text) else math.nan
    return found if math.isfinite(found) else None


def refuse_lookalikes(words: Iterable[str], column: str, where: str | Path, field: str) -> None:
    """Refuse values of a column that are one value or two, which nobody can tell: 1 and 01, M and m.

    Parameters
    ----------
    words : iterable of str
        From `word`.
    column : str
    where, field
        Of the task's file, for the error.

    Raises
    ------
    ConfigError
        Naming both.
    """
    alike: dict[str, set[str]] = defaultdict(set)
    for found in words:
        bare = found.lstrip("+-")
        sign = "-" if found.startswith("-") else ""
        alike[word(sign + (bare.lstrip("0") or "0")) if _NUMBER.fullmatch(found) else found.casefold()].add(found)
    for same in alike.values():
        if len(same) > 1:
            first, second, *_ = sorted(same)
            got = f"both {first!r} and {second!r} in column {column}"
            hint = "Write them alike in the table, or list under `classes` which values make each class"
            if field != "label":
                hint = "Write them alike in the table"
            raise ConfigError(where, field, got, "one way to write a value", f"{hint}, and convert the cohort again")
