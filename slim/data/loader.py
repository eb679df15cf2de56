"""The processes that load batches for one that trains: how they are started, waited for, and what ends a wait.

A batch comes through shared memory. Where /dev/shm is small or full, as in a container, it is sent as bytes through a
pipe; where there is none, batches are loaded by the process that trains.
"""

from __future__ import annotations

import io
import multiprocessing
import os
import pickle
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing import forkserver, resource_tracker
from multiprocessing.context import BaseContext
from multiprocessing.reduction import ForkingPickler
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from shards.core.cli import STOPPING
from shards.core.errors import Stopped, UserError
from shards.core.workers import end_with_parent, shorten_sockets, why_no_workers
from shards.format.stream import Item, MicroBatches

_SHARED = "/dev/shm"
_ENOUGH = 512 << 20  # bytes free in it: with less, batches are sent as bytes
_PATIENCE = 1800.0  # seconds a loading process may take for a batch before it counts as lost
_POLL = 1.0  # seconds between looks at whether the run is to stop
_GRACE = {signal.SIGTERM.name: 5.0, signal.SIGINT.name: 5.0}  # seconds for a batch after a signal that ends a process
_LONG_GRACE = 60.0  # after one that comes well before the end
_INTERRUPTED = "{} came while waiting for data"
_waiting = False  # for a batch, in this process
_WORKERS_HINT = "lower run.workers or run.batch, or give the machine more memory"


class Loader:
    """The micro-batches of one process of a run, in order. An iterator.

    Parameters
    ----------
    stream : MicroBatches
    workers : int
        Loading processes; 0: this process loads.
    stopped : callable
        Name of the signal that asks the run to stop, or None.
    warn : callable
        Given a line about what this machine lacks.

    Raises
    ------
    Stopped
        If a loading process died, no batch comes, the run is to stop and the next batch is not there in time, or the
        dataset is away. The last complete checkpoint is the state to resume from.
    UserError
        Of the loading process.
    """

    def __init__(
        self,
        stream: MicroBatches,
        workers: int,
        stopped: Callable[[], str | None] = lambda: None,
        warn: Callable[[str], None] = lambda line: None,
    ):
        self._stopped = stopped
        if workers and (why := why_no_workers()):
            warn(f"{_SHARED}: {why}: batches are loaded by the training process itself, which takes longer")
            workers = 0
        if not workers:
            stream.load = Sent(stream.load)
        else:
            stream.load = Sent(stream.load, "bytes" if free_shared_memory() < _ENOUGH else "shared memory")
        self._loader = DataLoader(
            stream,
            batch_size=None,
            num_workers=workers,
            multiprocessing_context=context() if workers else None,
            worker_init_fn=end_with_parent if workers else None,
            timeout=_POLL if workers else 0,
        )
        try:
            self._batches = iter(self._loader)
        except (OSError, EOFError) as error:
            raise Stopped(f"loading processes could not be started ({error}); {_WORKERS_HINT}") from None

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        global _waiting
        _waiting = True
        try:
            return self._next()
        finally:
            _waiting = False

    def _next(self) -> Any:
        asked, told = time.monotonic(), None
        while True:
            try:
                return received(next(self._batches))
            except RuntimeError as error:  # torch has no types of its own for these
                if str(error).startswith("DataLoader worker (pid"):
                    raise Stopped(_died(str(error))) from None
                if not str(error).startswith("DataLoader timed out"):
                    raise
            now = time.monotonic()
            if (name := self._stopped()) is not None:
                told = now if told is None else told
                if now - told >= _GRACE.get(name, _LONG_GRACE):
                    raise Stopped(_INTERRUPTED.format(name))
            if now - asked > _PATIENCE:
                why = "a loading process is stuck, or the file system of the dataset does not answer"
                raise Stopped(f"no batch came in {_PATIENCE / 60:.0f} minutes: {why}")


def limit_wait(name: str) -> None:
    """In the handler of a signal: end a wait for data that does not look for signals by itself.

    A loading process that was stopped in the midst of a batch leaves the one that trains in a read without a limit.
    """

    def ring(*_: object) -> None:
        if _waiting:
            raise Stopped(_INTERRUPTED.format(name))

    signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, _GRACE.get(name, _LONG_GRACE) + 2 * _POLL, _POLL)


def _died(error: str) -> str:
    free = free_shared_memory()
    shared = "" if free >= _ENOUGH else f", or {_SHARED} is too small ({free >> 20} MiB free; docker run --shm-size=8g)"
    detail = error.removeprefix("DataLoader worker ").partition(". ")[0]
    return f"a loading process died ({detail}): was the machine out of memory{shared}? Then {_WORKERS_HINT}"


def free_shared_memory() -> int:
    """Bytes free in /dev/shm; 0 where there is none."""
    try:
        found = os.statvfs(_SHARED)
    except OSError:
        return 0
    return found.f_bavail * found.f_frsize if os.access(_SHARED, os.W_OK) else 0


@dataclass
class _Failed:
    error: Exception


@dataclass
class _Bytes:
    content: bytes


@dataclass
class _Shared:
    """A batch whose tensors lie in shared memory; it is opened as soon as it arrives, while its sender is alive."""

    content: bytes

    def __reduce__(self) -> tuple[object, ...]:
        return pickle.loads, (self.content,)


class Sent:
    """What a loading process does: load a batch and make it ready to be sent, or the exception in its place.

    torch would turn an exception with arguments of its own into a RuntimeError. And it would put tensors into shared
    memory in a thread, where a failure loses the batch and nobody hears of it.

    Parameters
    ----------
    load : callable
        Makes the micro-batch of a list of items.
    how : "as it is", "shared memory" or "bytes"
    """

    def __init__(
        self, load: Callable[[list[Item]], Any], how: Literal["as it is", "shared memory", "bytes"] = "as it is"
    ):
        self.load, self.how = load, how

    def __call__(self, items: list[Item]) -> Any:
        try:
            batch = self.load(items)
        except (UserError, Stopped) as error:
            return _Failed(error)
        if self.how == "as it is":
            return batch
        if self.how == "shared memory":
            try:
                return _Shared(bytes(ForkingPickler.dumps(batch)))
            except (RuntimeError, OSError):  # it is full
                self.how = "bytes"
        return _Bytes(to_bytes(batch))


def received(sent: Any) -> Any:
    """The batch that was sent; raises what was raised."""
    if isinstance(sent, _Failed):
        raise sent.error
    return pickle.loads(sent.content) if isinstance(sent, _Bytes) else sent


class _Pickler(pickle.Pickler):
    def reducer_override(self, item: Any) -> Any:
        # By themselves tensors are sent as files in shared memory, or saved one by one, which is slow.
        return (torch.from_numpy, (item.numpy(),)) if isinstance(item, Tensor) else NotImplemented


def to_bytes(batch: Any) -> bytes:
    """A batch as bytes that need no shared memory."""
    file = io.BytesIO()
    _Pickler(file, protocol=5).dump(batch)
    return file.getvalue()


def context() -> BaseContext:
    """How loading processes are started: forked from a small server of one thread.

    Forked from the training process itself, which runs threads of gloo and others, a child can inherit a lock that
    nobody will ever release, and wait for it for ever.
    """
    shorten_sockets()
    chosen = multiprocessing.get_context("forkserver")
    chosen.set_forkserver_preload(["slim.data.collate"])
    # A scheduler signals all processes of a job. Those that load go on, for the step that is yet to end; what is
    # blocked here stays so in the server and in all it forks.
    signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
    try:
        resource_tracker.ensure_running()
        signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)  # again: that unblocks SIGTERM and SIGINT
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)
    return chosen
