"""Checks of the values in SLURM scripts: one line of text without control characters.

After a line break in a value, the rest of the value would run as a command of the script.
"""

from __future__ import annotations

import re
import unicodedata
from pathlib import Path
from typing import Any

from shards.core.errors import ConfigError
from shards.core.files import printable

_OPTION = re.compile(r"[A-Za-z][A-Za-z0-9_-]*")
# Characters that a script cannot hold: control characters, line and paragraph separators, and invalid bytes.
_REFUSED = {"Cc", "Zl", "Zp", "Cs"}


def is_plain(text: str, lines: bool = False) -> bool:
    """Whether text is one line without control characters. With `lines`, several lines and tabs are allowed."""
    return all(unicodedata.category(letter) not in _REFUSED or (lines and letter in "\n\t") for letter in text)


def checked(value: Any, lines: bool = False) -> Any:
    """Return a setting unchanged; raises ValueError if it, a part of it or the name of an option is not plain."""
    if isinstance(value, str) and not is_plain(value, lines):
        raise ValueError("text without line breaks and control characters")
    if isinstance(value, tuple):
        for part in value:
            checked(part, lines)
    if isinstance(value, dict):
        for name, part in value.items():
            if not _OPTION.fullmatch(name):
                raise ValueError("names of options, made of letters, digits and -")
            checked(part, lines)
    return value


def refuse_folder(folder: Path, what: str = "folder") -> None:
    """Raise ConfigError if the path of a folder cannot be written in a script."""
    if not is_plain(str(folder)):
        expected = "a path without line breaks and control characters"
        raise ConfigError(printable(folder), what, "a path with one of them", expected, "Rename the folder")
