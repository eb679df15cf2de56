"""Progress of long work, with rate and time left: a bar on a terminal and in a notebook, lines elsewhere, or nothing.

`SLIM_PROGRESS=0` in the environment shows none. It is read at the start of each piece of work.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from html import escape
from typing import Any

from shards.core.files import printable

VARIABLE = "SLIM_PROGRESS"
_EVERY = 5.0  # s between two lines, so that log files stay readable
_REDRAW = 0.2  # s between two changes of a bar in a notebook

Advance = Callable[[int, str], None]


def duration(seconds: float) -> str:
    """Format seconds as `42 s`, `3 min 05 s` or `2 h 07 min`."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60:02d} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60:02d} min"


def progress(what: str, total: int, unit: str, shown: bool = True) -> AbstractContextManager[Advance]:
    """Show the progress of work in a `with` statement.

    The context is a function `advance(count, note)`. On a terminal and elsewhere, output goes to stderr, because stdout
    is for results; in a notebook it is the output of the cell. Brackets in texts are not markup, and control characters
    are escaped.

    Parameters
    ----------
    what : str
        The work, such as "encode".
    total : int
        Number of units of the whole work.
    unit : str
        Such as "sessions".
    shown : bool
        False shows nothing.
    """
    what = printable(what)
    if not shown or os.environ.get(VARIABLE, "").strip().lower() in ("0", "false", "no", "off"):
        return _nothing()
    if sys.stderr.isatty():
        return _bar(what, total, unit)
    if (display := _display()) is not None:
        return _in_notebook(display, what, total, unit)
    return _lines(what, total, unit)


def _speed(rate: float, unit: str) -> str:
    """Format a rate per second; slow rates are given per minute."""
    return f"{rate:.2f} {unit}/s" if rate >= 1 else f"{60 * rate:.1f} {unit}/min"


class _Count:
    """What was done since the start."""

    def __init__(self, what: str, total: int, unit: str):
        self.what, self.total, self.unit = what, total, unit
        self.begun, self.done = time.monotonic(), 0
        self._shown = self.begun

    @property
    def rate(self) -> float:
        return self.done / max(time.monotonic() - self.begun, 1e-9)

    def is_due(self, every: float) -> bool:
        """Whether it is to be shown: `every` seconds after it was shown last, and at the end."""
        now = time.monotonic()
        due = now - self._shown >= every or self.done >= self.total
        if due:
            self._shown = now
        return due

    def line(self, note: str) -> str:
        rate = self.rate
        left = duration((self.total - self.done) / rate) if rate else "unknown"
        text = f"{self.what}: {self.done}/{self.total} {self.unit}, {_speed(rate, self.unit)}, {left} left"
        return f"{text} {printable(note)}".rstrip()


@contextmanager
def _nothing() -> Iterator[Advance]:
    def advance(done: int = 1, note: str = "") -> None:
        pass

    yield advance


@contextmanager
def _bar(what: str, total: int, unit: str) -> Iterator[Advance]:
    """A bar on a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    with Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", markup=False),
        console=Console(stderr=True),
    ) as bar:
        task = bar.add_task(what, total=total, rate="", note="")
        count = _Count(what, total, unit)

        def advance(done: int = 1, note: str = "") -> None:
            count.done += done
            bar.update(task, advance=done, rate=_speed(count.rate, unit), note=printable(note))

        yield advance


@contextmanager
def _lines(what: str, total: int, unit: str) -> Iterator[Advance]:
    """Lines for a log file."""
    count = _Count(what, total, unit)

    def advance(done: int = 1, note: str = "") -> None:
        count.done += done
        if count.is_due(_EVERY):
            print(count.line(note), file=sys.stderr, flush=True)

    yield advance


def _display() -> Callable[..., Any] | None:
    """IPython's `display` in a cell of a notebook, else None."""
    ipython = sys.modules.get("IPython")  # a notebook has imported it
    if ipython is None or not hasattr(ipython.get_ipython(), "kernel"):  # a console of IPython has none
        return None
    from IPython.display import display

    return display


@contextmanager
def _in_notebook(display: Callable[..., Any], what: str, total: int, unit: str) -> Iterator[Advance]:
    """An output of the cell that is changed in place. It needs no widgets."""
    count = _Count(what, total, unit)

    def shown(note: str) -> dict[str, str]:
        line = count.line(note)
        bar = f'<progress value="{count.done}" max="{total}"></progress>'
        return {"text/plain": line, "text/html": f"{bar} {escape(line)}"}

    handle = display(shown(""), raw=True, display_id=True)

    def advance(done: int = 1, note: str = "") -> None:
        count.done += done
        if count.is_due(_REDRAW):
            handle.update(shown(note), raw=True)

    yield advance
