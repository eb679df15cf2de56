"""Exit statuses, one-line errors, and text of the user that is printed as it is."""

from __future__ import annotations

import errno
import io
import os
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers.pages import page_of
from shards.core import cli
from shards.core.errors import ConfigError, Stopped
from shards.core.progress import progress
from shards.reporting import html

pytestmark = pytest.mark.fast

NASTY = [
    "cost_$5_$x^{",
    "[/b]",
    "[bold]a[/bold]",
    "[red]",
    "\x1b[31mred\x1b[0m",
    "a\rb",
    "a\nb",
    ":smile:",
    "\x07",
    "{task}",
]


def status(main) -> int:
    with pytest.raises(SystemExit) as ended:
        cli.run(main)
    return ended.value.code


def raising(error: BaseException):
    def main() -> int:
        raise error

    return main


def test_an_exception_that_nobody_caught_is_70_and_one_line(capsys, monkeypatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert status(raising(ValueError("a \x1b[31m\nb"))) == 70
    line = capsys.readouterr().err
    (path,) = tmp_path.glob("error-*.txt")
    assert line == f"error: internal error: ValueError: a \\x1b[31m\\nb (the traceback is in {path})\n"
    text = path.read_text()
    assert text.startswith("Traceback") and "in main" in text
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask()


def umask() -> int:
    old = os.umask(0)
    os.umask(old)
    return old


def test_the_traceback_goes_to_temporary_files_where_the_folder_cannot_be_written(monkeypatch, tmp_path) -> None:
    (tmp_path / "temp").mkdir()
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path / "temp"))
    line = cli.crashed(KeyError("a"), tmp_path / "nowhere")
    (path,) = (tmp_path / "temp").iterdir()
    assert line.endswith(f"(the traceback is in {path})")
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path / "nowhere"))
    assert cli.crashed(KeyError("a"), tmp_path / "nowhere").endswith("(the traceback could not be written to a file)")
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert "internal error: KeyError: 'a'" in cli.crashed(KeyError("a"))


def test_a_link_that_waits_for_the_traceback_is_not_followed(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr("time.strftime", lambda _: "now")
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path / "nowhere"))
    (tmp_path / f"error-now-{os.getpid()}.txt").symlink_to(tmp_path / "victim")
    assert "could not be written to a file" in cli.crashed(KeyError("a"), tmp_path)
    assert not (tmp_path / "victim").exists()


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "/data/a"), 3, "stopped: no space left for /data/a; make"),
        (PermissionError(errno.EACCES, "Permission denied", "/data/a"), 2, "error: /data/a: got Permission denied, ex"),
        (OSError(errno.EROFS, "Read-only file system", "/data/a"), 2, "error: /data/a: got Read-only file system, e"),
        (OSError(errno.EIO, "Input/output error", "/data/a"), 70, "error: internal error: OSError: [Errno 5]"),
        (OSError("a quota that is mentioned"), 70, "error: internal error: OSError: a quota"),
        (ConfigError("f", "a", 1, 2), 2, "error: f: a: got 1, expected 2"),
        (Stopped("until \x1b[2J later"), 3, "stopped: until \\x1b[2J later"),
        (KeyboardInterrupt(), 3, "stopped; "),
        (SystemExit(5), 5, ""),
        (AssertionError(), 70, "error: internal error: AssertionError: (the"),
        (RecursionError("deep"), 70, "error: internal error: RecursionError: deep"),
    ],
)
def test_every_end_has_its_status_and_one_line(error, code, said, capsys, monkeypatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert status(raising(error)) == code
    err = capsys.readouterr().err.replace(":  (", ": (")
    assert err.startswith(said) and len(err.splitlines()) <= 1


@pytest.mark.parametrize("terminal", [False, True])
@pytest.mark.parametrize("name", NASTY)
def test_names_are_printed_as_they_are(name: str, terminal: bool, monkeypatch) -> None:
    class Stream(io.StringIO):
        def isatty(self) -> bool:
            return terminal

    stream = Stream()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.setenv("NO_COLOR", "1")
    with progress(name, 1, "runs") as advance:
        advance(1, name)
    shown = html_free(stream.getvalue())
    escaped = name.encode("unicode_escape").decode()
    assert shown.count(escaped) >= 2, shown
    for letter in "\x1b[31m", "\x07", "a\rb", "a\nb":
        assert letter not in shown


def html_free(text: str) -> str:
    """Without the sequences by which a progress bar moves the cursor."""
    for sequence in ("\x1b[?25l", "\x1b[?25h", "\r\x1b[2K"):
        text = text.replace(sequence, "")
    return text


@given(st.text(max_size=20))
def test_a_summary_has_a_line_for_each_fact(name: str) -> None:
    out = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", out)
        cli.summary({"name": name, "other": 1}, f"look at {name}", as_json=False)
    assert len(out.getvalue().splitlines()) == 3 and out.getvalue()[:-1].replace("\n", "").isprintable()


def test_an_argument_is_printed_without_its_control_characters(capsys) -> None:
    with pytest.raises(SystemExit):
        cli.Parser("x", "y", "z").parse_args(["\x1b[31m"])
    assert "\x1b" not in capsys.readouterr().err


@pytest.mark.parametrize("name", ["$", "a$b$", "$\\frac{$", "$x^{$"])
def test_names_with_dollars_are_drawn(name: str) -> None:
    with html.drawing():
        figure, axes = plt.subplots(figsize=(2, 1))
        axes.set_title(name)
        axes.text(0, 0, name)
        assert html.png(figure)
        plt.close(figure)


def test_a_page_sends_no_form_and_changes_no_base() -> None:
    assert "form-action 'none'; base-uri 'none'" in page_of([])
