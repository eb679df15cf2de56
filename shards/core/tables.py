"""Read tables: participants, confounds, events.

A line is a row. Fields are separated by tabs, commas or semicolons: the first of these, in this order, that the header
contains. Without any of them, fields are separated by blanks. Only `n/a` (in any case) and empty fields are missing
values; `None`, `NA` and `null` are text. A row with more or fewer fields than the header is an error, because its
values could belong to other columns. Empty fields at the end of a row, beyond the header, are ignored.
"""

from __future__ import annotations

import csv
import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from shards.core.errors import ConfigError, UserError
from shards.core.files import printable, trouble

Value = int | float | str | None
_SEPARATORS = ("\t", ",", ";")
_MISSING = ("", "n/a")  # in any case
_INTEGER = re.compile(r"[+-]?(0|[1-9]\d{0,17})")
_NUMBER = re.compile(r"[+-]?((0|[1-9]\d*)(\.\d*)?|\.\d+)([eE][+-]?\d{1,3})?")
_NAN = re.compile(r"[+-]?nan", re.IGNORECASE)  # as Matlab and R write a missing number


@dataclass(frozen=True)
class TableFile:
    """The table in a file.

    Attributes
    ----------
    path : Path
    columns : tuple of str
    rows : tuple of tuple of str
        Fields of each row, one for each column.
    lines : tuple of int
        Line number of each row in the file, from 1.
    error : kind of UserError
        Type of the errors it raises.
    """

    path: Path
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    lines: tuple[int, ...]
    error: type[UserError]

    def __len__(self) -> int:
        return len(self.rows)

    def __contains__(self, column: object) -> bool:
        return column in self._places

    @cached_property
    def _places(self) -> dict[str, int]:
        """Position of each column; of unnamed columns only the first."""
        return {name: place for place, name in reversed([*enumerate(self.columns)])}

    def texts(self, column: str) -> list[str | None]:
        """A column as text, with None for missing values."""
        place = self._places[column]
        return [None if row[place].lower() in _MISSING else row[place] for row in self.rows]

    def numbers(self, column: str) -> np.ndarray:
        """A column as float64, with NaN for missing values.

        Raises
        ------
        UserError
            If a value is not a number; it names the line.
        """
        texts = self.texts(column)
        values = np.full(len(texts), np.nan)
        for row, text in enumerate(texts):
            if text is None or _NAN.fullmatch(text):
                continue
            try:
                values[row] = float(text)
            except ValueError:
                raise self.error(
                    self.path, column, f"{text!r} in line {self.lines[row]}", "a number or n/a", "Correct the table"
                ) from None
        return values

    def values(self, column: str) -> list[Value]:
        """A column as numbers if all its values are numbers, otherwise as text; None for missing values.

        Numbers with leading zeros, such as 007, are text.
        """
        texts = self.texts(column)
        known = [text for text in texts if text is not None]
        if all(_INTEGER.fullmatch(text) for text in known):
            return [None if text is None else int(text) for text in texts]
        if all(_NUMBER.fullmatch(text) or _NAN.fullmatch(text) for text in known):
            numbers = [math.nan if text is None else float(text) for text in texts]
            return [number if math.isfinite(number) else None for number in numbers]
        return list(texts)


def read(path: Path, what: str, error: type[UserError] = ConfigError) -> TableFile:
    """Read the table in a file.

    Parameters
    ----------
    path : Path
    what : str
        Description of the table for errors, such as "a participants table".
    error : kind of UserError
        Type of the errors.

    Raises
    ------
    UserError
        Of this kind, if the file is missing or not text in UTF-8 or UTF-16, or a row does not fit the header.
    """
    if found := trouble(path):
        raise error(path, "", f"an unreadable table ({found.got})", what, found.hint)
    lines = _lines(path, what, error)
    number, header = next(((n, line) for n, line in lines if line.strip()), (0, ""))
    if not number:
        raise error(path, "", "an unreadable table (no line with text)", what, "Restore it")
    separator = next((mark for mark in _SEPARATORS if mark in header), None)
    columns = [name.strip() for name in _fields(header, separator)]
    while len(columns) > 1 and not columns[-1]:  # lines may end with separators
        columns.pop()
    if twice := next((name for name, count in Counter(columns).items() if name and count > 1), None):
        raise error(path, "header", f"column {printable(twice)} twice", "columns with different names", "Rename one")
    rows, where = [], []
    for number, line in lines:
        fields = [field.strip() for field in _fields(line, separator)]
        if not any(fields):
            continue
        while len(fields) > len(columns) and not fields[-1]:
            fields.pop()
        if len(fields) != len(columns):
            got = f"{len(fields)} fields in line {number}"
            hint = "Correct that line; otherwise its values could belong to other columns"
            raise error(path, "rows", got, f"{len(columns)}, as in the header", hint)
        rows.append(tuple(fields))
        where.append(number)
    return TableFile(path, tuple(columns), tuple(rows), tuple(where), error)


def _lines(path: Path, what: str, error: type[UserError]) -> Iterator[tuple[int, str]]:
    """Lines with their numbers. Lines end with line feeds or, if there are none, with carriage returns."""
    content = path.read_bytes()
    encoding = "utf-16" if content.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8-sig"
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as fault:
        line = content[: fault.start].count(b"\n") + 1
        got = f"an unreadable table (bytes that are not {encoding.upper().removesuffix('-SIG')} in line {line})"
        raise error(path, "", got, what, "Save it as UTF-8") from None
    if "\x00" in text:
        raise error(path, "", "an unreadable table (binary content)", what, "Save it as text in UTF-8")
    if "\n" not in text:
        text = text.replace("\r", "\n")
    return iter([(number, line.removesuffix("\r")) for number, line in enumerate(text.split("\n"), 1)])


def _fields(line: str, separator: str | None) -> list[str]:
    """Fields of a line, without the quotes around a field.

    Separators inside quotes are allowed only in tables separated by commas, and quotes must end in the same line.
    """
    if separator is None:
        return line.split()
    if separator == "\t":
        fields = line.split("\t")
    else:
        try:
            fields = next(csv.reader([line], delimiter=separator), [])
        except csv.Error:  # a field exceeds the limit of the csv module
            fields = line.split(separator)
    return [_unquoted(field.strip()) for field in fields]


def _unquoted(field: str) -> str:
    if len(field) > 1 and field[0] == field[-1] == '"':
        return field[1:-1].replace('""', '"')
    return field
