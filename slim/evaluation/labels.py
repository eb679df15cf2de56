"""Values of labels: which are missing, which are equal, which are numbers.

    word(1.0) == word("1") == word(" 1 ") == "1"        # one class
    word("01") == "01"                                  # a name; refused if "1" is in the same column

Missing values are those that a conversion leaves out (`n/a` and empty fields), and those listed under `missing` in a
task. The texts None, NA and nan are not missing values.
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
_NAME = re.compile(r"[+-]?0\d", re.ASCII)  # start of numbers that are names, such as 007


def is_missing(value: Any, marks: Iterable[str] = ()) -> bool:
    """Whether a value is missing: None, NaN, "", "n/a", or one of `marks`."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return True
    found = word(value)
    return found in ("", "n/a") or found in {word(mark) for mark in marks}


def word(value: Any) -> str:
    """Normalise a value to text: without surrounding blanks, and numbers without trailing zeros.

    Numbers with leading zeros are not changed: an ID 007 differs from 7.
    """
    text = repr(float(value)) if isinstance(value, float) else str(value).strip()
    if not _NUMBER.fullmatch(text) or _NAME.match(text):
        return text
    exact = Decimal(text)
    return str(int(exact)) if exact == exact.to_integral_value() else f"{exact.normalize():f}"


def number(value: Any) -> float | None:
    """Convert a value to a number; None if it is not a finite number."""
    if isinstance(value, bool):
        return None
    if isinstance(value, int | float):
        return float(value) if math.isfinite(value) else None
    text = str(value).strip()
    found = float(text) if _NUMBER.fullmatch(text) else math.nan
    return found if math.isfinite(found) else None


def refuse_lookalikes(words: Iterable[str], column: str, where: str | Path, field: str) -> None:
    """Refuse ambiguous values of a column, such as 1 and 01, or M and m.

    Parameters
    ----------
    words : iterable of str
        Values from `word`.
    column : str
    where, field
        File and field of the task, for the error.

    Raises
    ------
    ConfigError
        If there are such values. It names both.
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
            hint = "Write them in the same way in the table, or list the values of each class under `classes`"
            if field != "label":
                hint = "Write them in the same way in the table"
            raise ConfigError(where, field, got, "one way to write a value", f"{hint}, and convert the cohort again")
