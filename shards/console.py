"""What every command shares: exit statuses, one-line errors, progress with a rate and time left, a closing summary.

Exit statuses: 0 done; 1 finished, but some inputs were refused; 2 the call or configuration is wrong; 3 stopped, and a
second run goes on from there.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from shards.errors import Stopped, UserError

DONE, REFUSED, WRONG, RESUME = 0, 1, 2, 3
STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)  # long work saves and ends


class Parser(argparse.ArgumentParser):
    """argparse with an example at the end of `--help`, errors of one line, and the `--json` every command has."""

    def __init__(self, description: str, example: str):
        super().__init__(
            description=description,
            epilog=f"example:\n  {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        self.add_argument("--json", action="store_true", help="print the summary as one JSON object, as the last line")

    def parse_args(  # type: ignore[override]
        self, args: Any = None, namespace: Any = None
    ) -> argparse.Namespace:
        """Options and positional arguments may come in any order."""
        return self.parse_intermixed_args(args, namespace)

    def error(self, message: str):
        print(f"error: {message} (see {self.prog} --help)", file=sys.stderr)
        sys.exit(WRONG)


def run(main: Callable[[], int]) -> None:
    """Run a command and exit with its status: a `UserError` is one line and status 2, an interrupt status 3."""
    for stream in (sys.stdout, sys.stderr):  # a name that the terminal's encoding lacks is printed with escapes
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        status = main()
    except UserError as error:
        print(f"error: {error.line()}", file=sys.stderr)
        status = WRONG
    except Stopped as stop:
        print(f"stopped: {stop}", file=sys.stderr)
        status = RESUME
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        status = RESUME
    except BrokenPipeError:  # `command | head`: nobody reads on, which is not an error
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = DONE
    sys.stdout.flush()
    sys.exit(status)


def summary(facts: dict[str, Any], next_step: str, as_json: bool, titles: Mapping[str, str] | None = None) -> None:
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
        print(f"  {name:<{width}}  {value}")
    if next_step:
        print(f"next: {next_step}")
    if as_json:
        print(json.dumps(facts, default=str))


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
    readable. It writes to stderr: stdout belongs to the summary.
    """
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        with Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=Console(stderr=True),
        ) as bar:
            task = bar.add_task(what, total=total, rate="", note="")
            begun, done = time.monotonic(), 0

            def advance(count: int = 1, note: str = "") -> None:
                nonlocal done
                done += count
                rate = done / max(time.monotonic() - begun, 1e-9)
                bar.update(task, advance=count, rate=_speed(rate, unit), note=note)

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
                f"{what}: {done}/{total} {unit}, {_speed(rate, unit)}, {left} left {note}".rstrip(),
                file=sys.stderr,
                flush=True,
            )

    yield tell
