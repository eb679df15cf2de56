"""Commands of this project in the process of the test, which has imported most of what they need already."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any
from unittest import mock

from threadpoolctl import threadpool_limits

from helpers.commands import ROOT, environment_of
from launchers.commands.__main__ import main
from shards.conversion import pool
from shards.core.cli import STOPPING, show_log, status_of

if TYPE_CHECKING:
    from slim.training.result import TrainingResult

_TRAINING = ("pretrain", "finetune")  # the other commands need no torch to be imported here


def call_command(tool: str, *words: object, timeout: float = 300, **environment: str) -> subprocess.CompletedProcess:
    """Do what `run_command` does with a file of `tools/`, in this process, which has imported most of it already.

    For tests of what a command does. Training and converting with one process are done in this process, too; other
    processes that the command starts are real ones.
    """
    name, argv = Path(tool).stem.replace("_", "-"), [str(ROOT / tool), *map(str, words)]
    with tempfile.TemporaryFile("w+") as stdout, tempfile.TemporaryFile("w+") as stderr:
        with (
            mock.patch.dict(os.environ, environment_of(environment)),
            mock.patch.object(sys, "argv", argv),
            _trained_here() if name in _TRAINING else contextlib.nullcontext(),
            mock.patch.object(pool, "ProcessPoolExecutor", pool_here),
            contextlib.chdir(ROOT),
            _kept_logging(),
            _kept_signals(),
            _limited(timeout),
            _written_to(stdout, 1),
            _written_to(stderr, 2),
        ):
            show_log()
            try:
                status = status_of(lambda: main([name, *argv[1:]]))
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
    try:
        yield
    finally:
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


@contextlib.contextmanager
def _trained_here() -> Iterator[None]:
    """Train in this process, in place of one that `launchers.local.run` starts; several are started.

    So is one at ZeRO stage 3, for which DeepSpeed replaces functions of torch, and one with wandb, which keeps the
    settings of its first run.
    """
    from launchers import local
    from slim.config import load_run

    start_processes = local.run

    def run(config: Path, processes: int) -> TrainingResult:
        settings = load_run(config)
        leaves_nothing = settings.zero_stage < 3 and settings.run.wandb == "disabled"
        return train_here(config) if processes == 1 and leaves_nothing else start_processes(config, processes)

    with mock.patch.object(local, "run", run):
        yield


def train_here(config: Path) -> TrainingResult:
    """Train a run that was prepared, as the only process."""
    import torch.distributed as dist

    from launchers import job
    from slim.checkpoints import lock

    with (
        only_rank(),
        mock.patch.object(lock, "take"),  # this process may have the lock already
        mock.patch.object(dist, "destroy_process_group"),  # DeepSpeed keeps what it knows of the first one
    ):
        return job.work(config)


@contextlib.contextmanager
def only_rank() -> Iterator[None]:
    """The environment of the only process of a run; its handlers of signals are removed afterwards."""
    join_alone()
    about = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    with mock.patch.dict(os.environ, about), _kept_signals():
        yield


class _Here(Executor):
    """Does its work at once, in this process, with one thread as a worker does."""

    def submit(self, work: Callable, /, *args: Any, **kwargs: Any) -> Future:
        future: Future = Future()
        try:
            with threadpool_limits(1):
                future.set_result(work(*args, **kwargs))
        except Exception as error:
            future.set_exception(error)
        return future


def pool_here(workers: int, *args: Any) -> Executor:
    """In place of `ProcessPoolExecutor`: a single worker works in this process."""
    return _Here() if workers == 1 else ProcessPoolExecutor(workers, *args)


def join_alone() -> None:
    """Make a process group of this process only, unless there is one. It stays until the process ends."""
    import torch.distributed as dist

    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
