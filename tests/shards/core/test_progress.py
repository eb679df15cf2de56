"""Progress on a terminal, in a log file, in a notebook, and switched off."""

from __future__ import annotations

import io
import sys
import types
from typing import Any

import pytest

from shards.core import progress as module
from shards.core.progress import progress

pytestmark = pytest.mark.fast


class Stream(io.StringIO):
    def __init__(self, terminal: bool):
        super().__init__()
        self.terminal = terminal

    def isatty(self) -> bool:
        return self.terminal


def work(monkeypatch: pytest.MonkeyPatch, terminal: bool, **more: Any) -> str:
    """What three of three sessions print."""
    stream = Stream(terminal)
    monkeypatch.setattr(sys, "stderr", stream)
    with progress("encode", 3, "sessions", **more) as advance:
        for name in "abc":
            advance(1, name)
    return stream.getvalue()


def test_a_log_file_gets_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    text = work(monkeypatch, terminal=False)
    assert text.startswith("encode: 3/3 sessions, ") and text.endswith(" left c\n") and text.count("\n") == 1
    assert "\r" not in text and "\x1b" not in text
    monkeypatch.setattr(module, "_EVERY", 0)
    assert [line.split(",")[0] for line in work(monkeypatch, terminal=False).splitlines()] == [
        f"encode: {done}/3 sessions" for done in (1, 2, 3)
    ]


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    text = work(monkeypatch, terminal=True)
    assert "3/3" in text and "\x1b" in text


@pytest.mark.parametrize("terminal", [False, True])
def test_it_can_be_silenced(terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    assert work(monkeypatch, terminal, shown=False) == ""
    for word in ("0", "off", "False"):
        monkeypatch.setenv("SLIM_PROGRESS", word)
        assert work(monkeypatch, terminal) == ""
    for word in ("1", ""):
        monkeypatch.setenv("SLIM_PROGRESS", word)
        assert "3/3" in work(monkeypatch, terminal)


def test_a_notebook_gets_an_output_that_changes_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[dict[str, str]] = []

    class Handle:
        def update(self, data: dict[str, str], raw: bool) -> None:
            assert raw
            shown.append(data)

    def display(data: dict[str, str], raw: bool, display_id: bool) -> Handle:
        assert raw and display_id
        shown.append(data)
        return Handle()

    ipython, of_display = types.ModuleType("IPython"), types.ModuleType("IPython.display")
    ipython.get_ipython = lambda: types.SimpleNamespace(kernel=object())  # type: ignore[attr-defined]
    of_display.display = display  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    monkeypatch.setitem(sys.modules, "IPython.display", of_display)
    assert work(monkeypatch, terminal=False) == ""
    assert shown[0]["text/plain"] == "encode: 0/3 sessions, 0.0 sessions/min, unknown left"
    assert shown[-1]["text/plain"].startswith("encode: 3/3 sessions, ")
    assert shown[-1]["text/html"].startswith('<progress value="3" max="3"></progress> encode: 3/3')
    ipython.get_ipython = lambda: types.SimpleNamespace()  # type: ignore[attr-defined]  # IPython on a terminal
    assert "3/3" in work(monkeypatch, terminal=False)
