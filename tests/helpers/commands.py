"""Commands of this project as a user calls them: in this process, or in one of their own."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO
from unittest import mock

from launchers.commands.__main__ import main
from shards.core.cli import STOPPING, show_log, status_of

ROOT = Path(__file__).parents[2]

Command = Callable[..., subprocess.CompletedProcess]

GRID = ("grid.mm=16", "grid.shape=[16,16,16]")


def environment_of(given: dict[str, str]) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **given}


def run_command(*words: object, timeout: float = 300, **environment: str) -> subprocess.CompletedProcess:
    """Run Python on a file of this project as a user would, from the repository's root, in a process of its own."""
    return subprocess.run(
        [sys.executable, *map(str, words)],
        cwd=ROOT,
        env=environment_of(environment),
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def call_command(tool: str, *words: object, timeout: float = 300, **environment: str) -> subprocess.CompletedProcess:
    """Do what `run_command` does with a file of `tools/`, in this process, which has imported most of it already.

    For tests of what a command does. The processes that it starts are real ones.
    """
    argv = [str(ROOT / tool), *map(str, words)]
    with tempfile.TemporaryFile("w+") as stdout, tempfile.TemporaryFile("w+") as stderr:
        with (
            mock.patch.dict(os.environ, environment_of(environment)),
            mock.patch.object(sys, "argv", argv),
            contextlib.chdir(ROOT),
            _kept_logging(),
            _kept_signals(),
            _limited(timeout),
            _written_to(stdout, 1),
            _written_to(stderr, 2),
        ):
            show_log()
            try:
                status = status_of(lambda: main([Path(tool).stem.replace("_", "-"), *argv[1:]]))
            except SystemExit as ended:
                status = ended.code
        for file in (stdout, stderr):
            file.seek(0)
        return subprocess.CompletedProcess(argv, status, stdout.read(), stderr.read())


@contextlib.contextmanager
def _written_to(file: IO[str], number: int) -> Iterator[None]:
    """Write to a file what this process, and those that it starts, print to stdout (1) or stderr (2)."""
    name = {1: "stdout", 2: "stderr"}[number]
    getattr(sys, name).flush()
    kept = os.dup(number)
    os.dup2(file.fileno(), number)
    try:
        with open(number, "w", closefd=False) as stream, mock.patch.object(sys, name, stream):
            yield
    finally:
        os.dup2(kept, number)
        os.close(kept)


@contextlib.contextmanager
def _kept_logging() -> Iterator[None]:
    loggers = [logging.getLogger(name) for name in ("shards", "slim")]
    kept = [(logger.handlers[:], logger.level, logger.propagate) for logger in loggers]
    yield
    for logger, (handlers, level, propagate) in zip(loggers, kept, strict=True):
        logger.handlers[:], logger.propagate = handlers, propagate
        logger.setLevel(level)


@contextlib.contextmanager
def _kept_signals() -> Iterator[None]:
    kept = {number: signal.getsignal(number) for number in STOPPING}
    yield
    for number, handler in kept.items():
        signal.signal(number, handler)


@contextlib.contextmanager
def _limited(seconds: float) -> Iterator[None]:
    """Fail instead of waiting for ever."""

    def late(*_: object) -> None:
        raise AssertionError(f"the command has not ended after {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(int(seconds))
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
