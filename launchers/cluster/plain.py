"""Values that go into a script of SLURM: text of one line, without control characters.

A line break in a value would end its line of the script, and what follows it would run.
"""

from __future__ import annotations

import re
import unicodedata
from pathlib import Path
from typing import Any

from shards.core.errors import ConfigError
from shards.core.files import printable

_OPTION = re.compile(r"[A-Za-z][A-Za-z0-9_-]*")
# Control characters, separators of lines and paragraphs, and bytes that are no text: a script cannot hold them.
_REFUSED = {"Cc", "Zl", "Zp", "Cs"}


def is_plain(text: str, lines: bool = False) -> bool:
    """Whether text is of one line and without control characters; with `lines`, of any number, with tabs."""
    return all(unicodedata.category(letter) not in _REFUSED or (lines and letter in "\n\t") for letter in text)


def checked(value: Any, lines: bool = False) -> Any:
    """A setting as it is; ValueError if it, a part of it, or the name of an option in it is not plain."""
    if isinstance(value, str) and not is_plain(value, lines):
        raise ValueError("text without line breaks and control characters")
    if isinstance(value, tuple):
        for part in value:
            checked(part, lines)
    if isinstance(value, dict):
        for name, part in value.items():
            if not _OPTION.fullmatch(name):
                raise ValueError("names of options, of letters, digits and -")
            checked(part, lines)
    return value


def refuse_folder(folder: Path, what: str = "folder") -> None:
    """ConfigError if the path of a folder cannot stand in a script."""
    if not is_plain(str(folder)):
        expected = "a path without line breaks and control characters"
        raise ConfigError(printable(folder), what, "a path with one of them", expected, "Rename the folder")
