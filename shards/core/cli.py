"""What every command shares: exit statuses, one-line errors, progress with a rate and time left, a closing summary.

Exit statuses: 0 done; 1 finished, but some inputs were refused; 2 the call or configuration is wrong; 3 stopped, and a
second run goes on from there; 70 a fault of this software, told in one line with the file that has the traceback.
"""

from __future__ import annotations

import argparse
import errno
import io
import json
import logging
import os
import shlex
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

from shards.core.errors import Stopped, UserError, is_full
from shards.core.extras import EXTRAS, ExtraMissing
from shards.core.files import printable
from shards.core.passwords import hidden

DONE, REFUSED, WRONG, RESUME = 0, 1, 2, 3
CRASHED = 70  # sysexits' EX_SOFTWARE: a fault of this software
_LONGEST = 500  # characters of the message of an exception
_FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)
_AWAY = (errno.ESTALE, errno.ENOTCONN, errno.ETIMEDOUT, errno.EHOSTDOWN, errno.EHOSTUNREACH)  # of network file systems
STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)  # long work saves and ends


def call_of(command: str, *words: object) -> str:
    """A call of a command, written as the user called the one that runs.

    Parameters
    ----------
    command : str
        Such as "make-shards" or "slurm pretrain".
    words : objects
        Its arguments.

    Returns
    -------
    str
        `python tools/make_shards.py ...` where this process is such a file, else `slim-brain make-shards ...`.
    """
    name, *rest = command.split()
    called = Path(sys.argv[0]).absolute()
    program = ["slim-brain", name]
    if called.suffix == ".py" and called.parent.name in ("tools", "launchers"):
        program = ["python", "launchers/slurm.py" if name == "slurm" else f"tools/{name.replace('-', '_')}.py"]
    return shlex.join([*program, *rest, *map(str, words)])


class Parser(argparse.ArgumentParser):
    """argparse with an example at the end of `--help`, errors of one line, and the `--json` every command has.

    Parameters
    ----------
    command : str
        Such as "make-shards" or "slurm pretrain".
    description : str
    example : str
        Arguments of a call, as they are typed.
    """

    def __init__(self, command: str, description: str, example: str):
        call = call_of(command)
        super().__init__(
            prog=call,
            description=description,
            epilog=f"example:\n  {call} {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        self.add_argument("--json", action="store_true", help="print the summary as one JSON object, as the last line")

    def parse_args(  # type: ignore[override]
        self, args: Any = None, namespace: Any = None
    ) -> argparse.Namespace:
        """Options and positional arguments may come in any order."""
        return self.parse_intermixed_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        print(f"error: {printable(message)} (see {self.prog} --help)", file=sys.stderr)
        sys.exit(WRONG)


def run(main: Callable[[], int]) -> None:
    """Run a command and exit with its status; see `status_of`."""
    _in_utf8()
    show_log()
    with lasting_output():
        status = status_of(main)
    sys.exit(status)


def _in_utf8() -> None:
    """Start this command again in Python's UTF-8 mode where the locale is another one, such as ASCII.

    Names of files and arguments keep their bytes; files of text, and what other programs print, are UTF-8.
    """
    if sys.flags.utf8_mode or sys.getfilesystemencoding().lower() in ("utf-8", "utf8"):
        return
    os.environ["PYTHONUTF8"] = "1"  # for the processes that this one starts
    os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])


class _Stderr(logging.Handler):
    """Prints log records on the present `sys.stderr`, which progress bars and `lasting_output` replace."""

    def emit(self, record: logging.LogRecord) -> None:
        level = "" if record.levelno < logging.WARNING else f"{record.levelname.lower()}: "
        print(f"{level}{hidden(printable(record.getMessage()))}", file=sys.stderr, flush=True)


def show_log() -> None:
    """Print what `shards` and `slim` log, from level INFO on, as lines of this command: `warning: ...`."""
    for name in ("shards", "slim"):
        logger = logging.getLogger(name)
        if not any(isinstance(handler, _Stderr) for handler in logger.handlers):
            logger.addHandler(_Stderr())
        logger.setLevel(logging.INFO)
        logger.propagate = False  # libraries may add handlers to the root logger


class _Lasting:
    """A stream that drops what nobody reads any more: the work goes on when `| head` or the terminal has gone."""

    def __init__(self, stream: io.TextIOWrapper):
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError as error:
            self._drop(error)
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            self._drop(error)

    def _drop(self, error: OSError) -> None:
        if error.errno not in (errno.EPIPE, errno.EIO, errno.EBADF):
            raise error
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, self._stream.fileno())
        os.close(null)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def lasting_output() -> Iterator[None]:
    """Have prints succeed where stdout or stderr is closed, its reader gone, or its encoding lacks a character."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:  # closed: the next file that is opened would be taken for this stream
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    former = sys.stdout, sys.stderr
    for name, stream in zip(("stdout", "stderr"), former, strict=True):
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 - as long as the process
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
            setattr(sys, name, _Lasting(stream))
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError):  # told by `status_of`
                stream.flush()
        if None not in former:
            sys.stdout, sys.stderr = former


def status_of(main: Callable[[], int]) -> int:
    """The exit status of a command. What stopped it is one line: only 1 is given by the command alone.

    A `UserError`, an extra that is not installed, and a file that may not be read or written are status 2; an interrupt
    and a full file system are status 3; any other exception is `CRASHED`. SystemExit passes.
    """
    for stream in (sys.stdout, sys.stderr):  # a name that the terminal's encoding lacks is printed with escapes
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        status = main()
        if sys.stdout is not None:  # it was closed by whoever started the command
            sys.stdout.flush()
    except UserError as error:
        print(f"error: {error.line()}", file=sys.stderr)
        status = WRONG
    except Stopped as stop:
        print(f"stopped: {printable(str(stop))}", file=sys.stderr)
        status = RESUME
    except KeyboardInterrupt:
        print("stopped; call the same command again", file=sys.stderr)
        status = RESUME
    except BrokenPipeError:  # `command | head`: nobody reads on, which is not an error
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = DONE
    except ModuleNotFoundError as error:
        module = (error.name or "").partition(".")[0]
        if module not in EXTRAS:
            return _failed(error)
        print(f"error: {ExtraMissing([module]).line()}", file=sys.stderr)
        status = WRONG
    except Exception as error:
        status = _failed(error)
    return status


def _failed(error: Exception) -> int:
    """Tell of an exception that nothing has put into words; the exit status."""
    named = getattr(error, "filename", None)
    place = printable(os.fsdecode(named)) if isinstance(named, str | bytes | os.PathLike) else "a file"
    if is_full(error):
        print(f"stopped: no space left for {place}; make room, then call the same command again", file=sys.stderr)
        return RESUME
    if isinstance(error, OSError) and error.errno in _AWAY:
        print(f"stopped: {place}: {error.strerror}; call the same command again when it is back", file=sys.stderr)
        return RESUME
    if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
        expected = "names of at most 255 bytes, and a path of at most 4095. Choose a shorter name"
        print(f"error: {place[:_LONGEST]}: got a name that is too long, expected {expected}", file=sys.stderr)
        return WRONG
    if isinstance(error, OSError) and error.errno in _FORBIDDEN and named is not None:
        expected = "a file that can be read, or a folder that can be written. Check its permissions"
        print(f"error: {place}: got {error.strerror}, expected {expected}", file=sys.stderr)
        return WRONG
    print(f"error: {crashed(error)}", file=sys.stderr)
    return CRASHED


def crashed(error: BaseException, folder: Path | None = None) -> str:
    """One line for an exception that is a fault of this software; its traceback goes into a file that the line names.

    Parameters
    ----------
    error : exception
    folder : Path, optional
        Where the file is written; by default the working folder. Where that is not possible, the folder of temporary
        files.
    """
    message = hidden(" ".join(printable(str(error)).split()))
    message = message if len(message) <= _LONGEST else f"{message[:_LONGEST]} ..."
    text = hidden("".join(traceback.format_exception(error)))
    found = "no file could be written for the traceback"
    for place in (folder or Path(), Path(tempfile.gettempdir())):
        try:
            path = place.absolute() / f"error-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.txt"
            with open(path, "x", encoding="utf-8", errors="backslashreplace") as file:  # "x" follows no link
                file.write(text)
        except OSError:
            continue
        found = f"the traceback is in {printable(path)}"
        break
    return f"internal error: {type(error).__name__}: {message} ({found})"


def summary(
    facts: Mapping[str, object], next_step: str, as_json: bool, titles: Mapping[str, str] | None = None
) -> None:
    """Print what was done and what to do next; with `as_json`, the facts as one JSON object on the last line.

    A fact is printed under its name, or under its title in `titles`.
    """
    shown = {
        (titles or {}).get(name, name.replace("_", " ")): value
        for name, value in facts.items()
        if not isinstance(value, dict | list)
    }
    width = max((len(name) for name in shown), default=0)
    for name, value in shown.items():
        print(f"  {name:<{width}}  {hidden(printable(str(value)))}")
    if next_step:
        print(f"next: {hidden(printable(next_step))}")
    if as_json:
        print(hidden(json.dumps(facts, default=str)))


def duration(seconds: float) -> str:
    """Seconds in words: `42 s`, `3 min 05 s`, `2 h 07 min`."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60:02d} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60:02d} min"


def _speed(rate: float, unit: str) -> str:
    """A rate (per second) in words: per minute where it is slow."""
    return f"{rate:.2f} {unit}/s" if rate >= 1 else f"{60 * rate:.1f} {unit}/min"


@contextmanager
def progress(what: str, total: int, unit: str) -> Iterator[Callable[[int, str], None]]:
    """A progress bar on a terminal, plain lines elsewhere, both with a rate and time left.

    Yields a function `advance(count, note)`. Plain lines come at most every five seconds, so a log file stays
    readable. It writes to stderr: stdout belongs to the summary. Text is shown as it is: brackets are no markup, and
    control characters are escaped.
    """
    what = printable(what)
    if sys.stderr.isatty():
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
            begun, done = time.monotonic(), 0

            def advance(count: int = 1, note: str = "") -> None:
                nonlocal done
                done += count
                rate = done / max(time.monotonic() - begun, 1e-9)
                bar.update(task, advance=count, rate=_speed(rate, unit), note=printable(note))

            yield advance
        return

    begun = last = time.monotonic()
    done = 0

    def tell(count: int = 1, note: str = "") -> None:
        nonlocal done, last
        done += count
        now = time.monotonic()
        if now - last >= 5 or done >= total:
            last = now
            rate = done / max(now - begun, 1e-9)
            left = duration((total - done) / rate) if rate else "unknown"
            print(
                f"{what}: {done}/{total} {unit}, {_speed(rate, unit)}, {left} left {printable(note)}".rstrip(),
                file=sys.stderr,
                flush=True,
            )

    yield tell
