"""The parts that all commands share: exit statuses, one-line errors, a summary.

Exit statuses: 0 done; 1 finished, but some inputs were refused; 2 the call or configuration is wrong; 3 stopped, and
the same command continues; 70 a fault of this software, reported in one line that names the file with the traceback.
"""

from __future__ import annotations

import argparse
import errno
import io
import json
import logging
import os
import re
import shlex
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

from shards.core.errors import ConfigError, Stopped, UserError, is_full
from shards.core.extras import EXTRAS, ExtraMissing
from shards.core.files import printable
from shards.core.passwords import hidden, keep_in_word

DONE, REFUSED, WRONG, RESUME = 0, 1, 2, 3
CRASHED = 70  # sysexits' EX_SOFTWARE: a fault of this software
_LONGEST = 500  # largest number of characters of an exception's message
_FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)
_AWAY = (errno.ESTALE, errno.ENOTCONN, errno.ETIMEDOUT, errno.EHOSTDOWN, errno.EHOSTUNREACH)  # network file systems
STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)  # long work saves and ends on these


_caller: str | None = None  # the program that a user called, where another one runs


def answer_as(command: Sequence[str]) -> None:
    """Make `call_of` write calls in the style of this command line, in a process that its command started."""
    global _caller
    _caller = next((word for word in command if word.endswith(".py")), "slim-brain")


def call_of(command: str, *words: object) -> str:
    """The command line of another command, in the style in which the running command was called.

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
    called = Path(_caller or sys.argv[0]).absolute()
    program = ["slim-brain", name]
    if called.suffix == ".py" and called.parent.name in ("tools", "launchers"):
        program = ["python", "launchers/slurm.py" if name == "slurm" else f"tools/{name.replace('-', '_')}.py"]
    return shlex.join([*program, *rest, *map(str, words)])


_SETTING = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]*=")


class Parser(argparse.ArgumentParser):
    """argparse with an example at the end of `--help`, one-line errors, and the option `--json` of all commands.

    Passwords in URLs are removed from the arguments; see `shards.core.passwords`. `key=value` words may stand anywhere.
    They are `args.settings` after `add_settings`, and refused without it.

    Parameters
    ----------
    command : str
        Such as "make-shards" or "slurm pretrain".
    description : str
    example : str
        Arguments of an example call.
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
        self._takes_settings = False
        self.add_argument("--json", action="store_true", help="print the summary as a JSON object on the last line")

    def add_settings(self, help: str) -> None:
        """Accept `key=value` words. Call it after the positional arguments are added."""
        self._takes_settings = True
        self.add_argument("settings", nargs="*", default=[], metavar="key=value", help=help)

    def parse_args(  # type: ignore[override]
        self, args: Any = None, namespace: Any = None
    ) -> argparse.Namespace:
        """Parse arguments; options, positional arguments and settings may be in any order.

        Raises
        ------
        ConfigError
            If there is a setting, and this command takes none.
        """
        words, settings = self._divided([keep_in_word(word) for word in (sys.argv[1:] if args is None else args)])
        if settings and not self._takes_settings and not {"-h", "--help"} & set(words):
            options = [name for action in self._actions for name in action.option_strings if name.startswith("--")]
            near = f"--{settings[0].partition('=')[0].rpartition('.')[2].replace('_', '-')}"
            hint = f"Write {near} VALUE" if near in options else ""
            expected = f"no key=value: {self.prog} has options only, {', '.join(options)}"
            raise ConfigError("command line", printable(settings[0]), "a setting", expected, hint)
        found = self.parse_intermixed_args(words, namespace)
        if self._takes_settings:
            found.settings = [*found.settings, *settings]
        return found

    def _divided(self, args: Sequence[str]) -> tuple[list[str], list[str]]:
        """The words that are no settings, and the settings. A word with `=` that is a file is no setting."""
        words, settings, rest = [], [], iter(args)
        for word in rest:
            if word == "--":
                words += [word, *rest]
            elif (option := self._option_string_actions.get(word)) is not None:
                words += [word, *([next(rest, "")] if option.nargs != 0 else [])]
            elif _SETTING.match(word) and not os.path.lexists(word):
                settings.append(word)
            else:
                words.append(word)
        return words, settings

    def error(self, message: str) -> NoReturn:
        print(f"error: {hidden(printable(message))} (see {self.prog} --help)", file=sys.stderr)
        sys.exit(WRONG)


def run(main: Callable[[], int]) -> None:
    """Run a command and exit with its status; see `status_of`."""
    _in_utf8()
    show_log()
    with lasting_output():
        status = status_of(main)
    sys.exit(status)


def _in_utf8() -> None:
    """Restart this command in Python's UTF-8 mode if the locale has another encoding, such as ASCII.

    The bytes of file names and arguments stay the same. Text files and the output of other programs are read as UTF-8.
    """
    if sys.flags.utf8_mode or sys.getfilesystemencoding().lower() in ("utf-8", "utf8"):
        return
    os.environ["PYTHONUTF8"] = "1"  # for child processes
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
    """A stream that discards output when its reader has gone (`| head`, a closed terminal), so the work continues."""

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
    """Context in which printing succeeds if stdout or stderr is closed, has no reader, or lacks a character."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:  # closed: the next opened file would get the number of this stream
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    former = sys.stdout, sys.stderr
    for name, stream in zip(("stdout", "stderr"), former, strict=True):
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 - until the process ends
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
            setattr(sys, name, _Lasting(stream))
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError):  # `status_of` reports it
                stream.flush()
        if None not in former:
            sys.stdout, sys.stderr = former


def status_of(main: Callable[[], int]) -> int:
    """Run a command, print an error in one line, and return the exit status.

    A `UserError`, a missing extra, and a file without permission give status 2; an interrupt and a full file system
    give status 3; any other exception gives `CRASHED`. The command itself returns status 0 or 1. SystemExit passes.
    """
    for stream in (sys.stdout, sys.stderr):  # characters that the encoding lacks are printed as escapes
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        status = main()
        if sys.stdout is not None:  # None if it was closed before the start
            sys.stdout.flush()
    except UserError as error:
        print(f"error: {error.line()}", file=sys.stderr)
        status = WRONG
    except Stopped as stop:
        print(f"stopped: {printable(str(stop))}", file=sys.stderr)
        status = RESUME
    except KeyboardInterrupt:
        print("stopped; give the same command again to continue", file=sys.stderr)
        status = RESUME
    except BrokenPipeError:  # the reader has gone, as in `command | head`, which is not an error
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
    """Print an exception that is not a `UserError`; returns the exit status."""
    named = getattr(error, "filename", None)
    place = printable(os.fsdecode(named)) if isinstance(named, str | bytes | os.PathLike) else "a file"
    if is_full(error):
        print(f"stopped: no space left for {place}; make room, then give the same command again", file=sys.stderr)
        return RESUME
    if isinstance(error, OSError) and error.errno in _AWAY:
        print(f"stopped: {place}: {error.strerror}; give the same command again when it is back", file=sys.stderr)
        return RESUME
    if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
        expected = "names of at most 255 bytes, and a path of at most 4095. Choose a shorter name"
        print(f"error: {place[:_LONGEST]}: got a name that is too long, expected {expected}", file=sys.stderr)
        return WRONG
    if isinstance(error, OSError) and error.errno in _FORBIDDEN and named is not None:
        expected = "a readable file or a writable folder. Check its permissions"
        print(f"error: {place}: got {error.strerror}, expected {expected}", file=sys.stderr)
        return WRONG
    print(f"error: {crashed(error)}", file=sys.stderr)
    return CRASHED


def crashed(error: BaseException, folder: Path | None = None) -> str:
    """Describe a fault of this software in one line, and write the traceback to a file that the line names.

    Parameters
    ----------
    error : exception
    folder : Path, optional
        Folder of the file; by default the working folder. If it cannot be written, the folder of temporary files is
        used.
    """
    message = hidden(" ".join(printable(str(error)).split()))
    message = message if len(message) <= _LONGEST else f"{message[:_LONGEST]} ..."
    text = hidden("".join(traceback.format_exception(error)))
    found = "the traceback could not be written to a file"
    for place in (folder or Path(), Path(tempfile.gettempdir())):
        try:
            path = place.absolute() / f"error-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.txt"
            with open(path, "x", encoding="utf-8", errors="backslashreplace") as file:  # "x" does not follow links
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

    A fact is printed with its name, or with its title in `titles`.
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
