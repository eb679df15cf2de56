"""The user's mistakes, each told in one line.

Everything that a user can correct is a subclass of `UserError`; the commands print it without a traceback and exit with
status 2. Any other exception is a defect of this software and keeps its traceback. Wrong values are also `ValueError`s,
and wrong types `TypeError`s, as callers of a Python library expect.
"""

from __future__ import annotations

import errno
from pathlib import Path

from shards.core.files import printable
from shards.core.passwords import hidden

_LONGEST = 1000  # characters of each part of a message: files can hold anything


class UserError(Exception):
    """A mistake of the call or its input: where, which field, what was got, what was expected, what to do.

    Parameters
    ----------
    where : str or Path
        The file, folder or command-line argument at fault.
    field : str
        The key, header field or option inside it; empty where the file as a whole is meant.
    got, expected : object
        What was found there and what would have been right.
    hint : str, optional
        What to do about it, as an imperative sentence.
    """

    def __init__(self, where: str | Path, field: str, got: object, expected: object, hint: str = ""):
        self.where, self.field, self.got, self.expected, self.hint = str(where), field, got, expected, hint
        super().__init__(self.line())

    def line(self) -> str:
        """The whole message on one line, without control characters; what is very long is cut."""
        field, got, expected, hint = (_cut(part) for part in (self.field, self.got, self.expected, self.hint))
        place = f"{self.where}: {field}" if field else self.where
        text = f"{place}: got {got}, expected {expected}"
        return hidden(printable(" ".join(f"{text}. {hint}".split() if hint else text.split())))

    def __reduce__(self) -> tuple[object, ...]:  # worker processes send these back by pickle
        return type(self), (self.where, self.field, self.got, self.expected, self.hint)


def _cut(part: object) -> str:
    text = str(part)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]} ..."


class ConfigError(UserError, ValueError):
    """A wrong value in a configuration, on the command line or in a call."""


class ArgumentError(ConfigError, TypeError):
    """An argument of the wrong type."""


class RunRefused(UserError, ValueError):
    """One run that cannot be converted; the rest of its cohort is converted without it."""


class DatasetError(UserError, ValueError):
    """A dataset folder that is missing, incomplete, damaged, or of another configuration."""


class SampleCorrupt(DatasetError):
    """One sample of a dataset whose bytes cannot be read."""


class Stopped(Exception):
    """Work that stopped before its end and that a second call goes on with; the commands exit with status 3.

    Parameters
    ----------
    why : str
    then : str
        What the user does to go on, and from where it goes on; the message is both.
    """

    def __init__(self, why: str, then: str = ""):
        super().__init__(f"{why}; {then}" if then else why)
        self.why, self.then = why, then


def is_full(error: Exception) -> bool:
    """Whether an error is that of a file system, or a quota, that is full."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
