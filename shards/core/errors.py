"""Errors that users can correct, each with a message of one line.

They are subclasses of `UserError`. Commands print them without a traceback and exit with status 2. Any other exception
is a fault of this software and keeps its traceback. Errors of wrong values also derive from `ValueError`, those of
wrong types from `TypeError`.
"""

from __future__ import annotations

import difflib
import errno
from collections.abc import Iterable
from pathlib import Path

from shards.core.files import printable
from shards.core.passwords import hidden

_LONGEST = 1000  # largest number of characters in each part of a message, which may quote the content of files


class UserError(Exception):
    """A mistake in a call or its input: where it is, in which field, what was found, what is accepted, what to do.

    Parameters
    ----------
    where : str or Path
        The file, folder or command-line argument.
    field : str
        The key, header field or option; empty if the error concerns the whole file.
    got, expected : object
        What was found, and what is accepted.
    hint : str, optional
        What to do, as an imperative sentence.
    """

    def __init__(self, where: str | Path, field: str, got: object, expected: object, hint: str = ""):
        self.where, self.field, self.got, self.expected, self.hint = str(where), field, got, expected, hint
        super().__init__(self.line())

    def line(self) -> str:
        """The message on one line, without control characters. Very long parts are cut."""
        field, got, expected, hint = (_cut(part) for part in (self.field, self.got, self.expected, self.hint))
        place = f"{self.where}: {field}" if field else self.where
        text = f"{place}: got {got}, expected {expected}"
        return hidden(printable(" ".join(f"{text}. {hint}".split() if hint else text.split())))

    def __reduce__(self) -> tuple[object, ...]:  # worker processes return errors as pickles
        return type(self), (self.where, self.field, self.got, self.expected, self.hint)


def _cut(part: object) -> str:
    text = str(part)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]} ..."


class ConfigError(UserError, ValueError):
    """A wrong value in a configuration, on the command line or in a call."""


class ArgumentError(ConfigError, TypeError):
    """An argument of the wrong type."""


class RunRefused(UserError, ValueError):
    """A scan that cannot be converted. The rest of its cohort is converted without it."""


class DatasetError(UserError, ValueError):
    """A dataset that is missing, incomplete, damaged, or was made with another configuration."""


class UnknownSession(DatasetError, KeyError):
    """A key that no session of a dataset has."""

    def __str__(self) -> str:  # that of KeyError quotes the message
        return self.line()


class SampleCorrupt(DatasetError):
    """A sample of a dataset that cannot be read."""


class Stopped(Exception):
    """Work that stopped before its end and can be continued with the same call. Commands exit with status 3.

    Parameters
    ----------
    why : str
        Why it stopped.
    then : str
        What to do to continue. The message has both parts.
    """

    def __init__(self, why: str, then: str = ""):
        super().__init__(f"{why}; {then}" if then else why)
        self.why, self.then = why, then


def did_you_mean(word: str, known: Iterable[str], otherwise: str = "") -> str:
    """A hint for a name that is not known: the most similar known one, or `otherwise` if none is similar."""
    near = difflib.get_close_matches(word, list(known), n=1)
    return f"Did you mean {near[0]}?" if near else otherwise


def is_full(error: Exception) -> bool:
    """Whether an error was raised because a file system or quota is full."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
