"""Loading processes: they load batches for a training process.

Batches are sent through shared memory. If /dev/shm is small or full, as in some containers, they are sent as bytes
through a pipe. If loading processes cannot be started, the training process loads the batches itself.
"""

from __future__ import annotations

import io
import multiprocessing
import os
import pickle
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing import forkserver, resource_tracker
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
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
_ENOUGH = 512 << 20  # free bytes in shared memory below which batches are sent as bytes
_PATIENCE = 1800.0  # seconds to wait for a batch before the run stops
_POLL = 1.0  # seconds between checks whether the run must stop
_GRACE = {signal.SIGTERM.name: 5.0, signal.SIGINT.name: 5.0}  # seconds to wait for a batch after these signals
_LONG_GRACE = 60.0  # seconds after other signals, which arrive well before the end of a job
_INTERRUPTED = "{} was received while waiting for data"
_waiting = False  # whether this process waits for a batch
_WORKERS_HINT = "lower run.workers or run.batch, or use a machine with more memory"


class Loader:
    """Iterator over the micro-batches of one training process, in order.

    Parameters
    ----------
    stream : MicroBatches
    workers : int
        Number of loading processes; with 0 this process loads.
    stopped : callable
        Returns the name of the signal that stops the run, or None.
    warn : callable
        Called with a warning if loading processes cannot be started.

    Raises
    ------
    Stopped
        If a loading process died, no batch arrives, the run must stop before the next batch is ready, or the dataset
        cannot be reached. The run can be resumed from the last complete checkpoint.
    UserError
        If a loading process raised one.
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
            warn(f"{_SHARED}: {why}, so the training process loads batches itself, which is slower")
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
        others = set(multiprocessing.active_children())
        try:
            self._batches = iter(self._loader)
        except (OSError, EOFError) as error:
            raise Stopped(f"loading processes could not be started ({error}): {_WORKERS_HINT}") from None
        self._workers = set(multiprocessing.active_children()) - others

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
            begun = time.monotonic()
            try:
                sent = next(self._batches)
            except RuntimeError:
                # From torch itself, as `Sent` sends what a loading process raises: one has died, or no batch has
                # arrived within `_POLL` seconds. Anything else comes sooner.
                ended = [process for process in self._workers if not process.is_alive()]
                failed = [process for process in ended if process.exitcode]  # those without more to load end, too
                if failed or (ended and len(ended) == len(self._workers)):
                    raise Stopped(_died((failed or ended)[0])) from None
                if not self._workers or time.monotonic() - begun < 0.9 * _POLL:
                    raise
            else:
                return received(sent)
            now = time.monotonic()
            if (name := self._stopped()) is not None:
                told = now if told is None else told
                if now - told >= _GRACE.get(name, _LONG_GRACE):
                    raise Stopped(_INTERRUPTED.format(name))
            if now - asked > _PATIENCE:
                why = "a loading process is stuck, or the file system of the dataset does not respond"
                raise Stopped(f"no batch arrived in {_PATIENCE / 60:.0f} minutes: {why}")


def limit_wait(name: str) -> None:
    """Limit the wait for data; called in the handler of a signal.

    If a loading process is stopped while it sends a batch, the training process would otherwise wait forever.
    """

    def ring(*_: object) -> None:
        if _waiting:
            raise Stopped(_INTERRUPTED.format(name))

    signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, _GRACE.get(name, _LONG_GRACE) + 2 * _POLL, _POLL)


def _died(process: BaseProcess) -> str:
    free = free_shared_memory()
    shared = "" if free >= _ENOUGH else f", or {_SHARED} is too small ({free >> 20} MiB free; docker run --shm-size=8g)"
    code = process.exitcode or 0
    detail = f"process {process.pid}, {signal.Signals(-code).name if code < 0 else f'status {code}'}"
    return f"a loading process died ({detail}), perhaps because the machine is out of memory{shared}: {_WORKERS_HINT}"


def free_shared_memory() -> int:
    """Free bytes in /dev/shm; 0 if it does not exist."""
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
    """A batch with tensors in shared memory. It is opened when it arrives, while the sender is alive."""

    content: bytes

    def __reduce__(self) -> tuple[object, ...]:
        return pickle.loads, (self.content,)


class Sent:
    """The function that a loading process calls: it loads a batch and prepares it, or an exception, for sending.

    torch would turn some exceptions into RuntimeErrors, which it raises itself, too. It would also move tensors to
    shared memory in a thread, where a failure loses the batch without an error.

    Parameters
    ----------
    load : callable
        Makes a micro-batch from a list of items.
    how : "as it is", "shared memory" or "bytes"
        How the batch is sent.
    """

    def __init__(
        self, load: Callable[[list[Item]], Any], how: Literal["as it is", "shared memory", "bytes"] = "as it is"
    ):
        self.load, self.how = load, how

    def __call__(self, items: list[Item]) -> Any:
        try:
            batch = self.load(items)
        except Exception as error:
            if self.how == "as it is":
                raise
            return _Failed(_as_sent(error))
        if self.how == "as it is":
            return batch
        if self.how == "shared memory":
            try:
                return _Shared(bytes(ForkingPickler.dumps(batch)))
            except (RuntimeError, OSError):  # shared memory is full
                self.how = "bytes"
        return _Bytes(to_bytes(batch))


def _as_sent(error: Exception) -> Exception:
    """An exception that another process can raise, with its traceback as a note."""
    if isinstance(error, UserError | Stopped):
        return error
    trace = traceback.format_exc()
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # whatever the class of the exception does
        error = RuntimeError(f"{type(error).__name__}: {error}")
    error.add_note(trace)
    return error


def received(sent: Any) -> Any:
    """Unpack a sent batch, or raise a sent exception."""
    if isinstance(sent, _Failed):
        raise sent.error
    return pickle.loads(sent.content) if isinstance(sent, _Bytes) else sent


class _Pickler(pickle.Pickler):
    def reducer_override(self, item: Any) -> Any:
        # By default, tensors are sent as files in shared memory, or saved one by one, which is slow.
        return (torch.from_numpy, (item.numpy(),)) if isinstance(item, Tensor) else NotImplemented


def to_bytes(batch: Any) -> bytes:
    """Serialise a batch to bytes, without shared memory."""
    file = io.BytesIO()
    _Pickler(file, protocol=5).dump(batch)
    return file.getvalue()


def context() -> BaseContext:
    """The start method of loading processes: fork from a small server process with one thread.

    The training process has threads, for example of gloo. A child forked from it can inherit a lock that is never
    released, and then waits forever.
    """
    shorten_sockets()
    chosen = multiprocessing.get_context("forkserver")
    chosen.set_forkserver_preload(["slim.data.collate"])
    # A scheduler sends signals to all processes of a job. Loading processes must ignore them, because the current step
    # still needs data. Signals blocked here stay blocked in the server and in the processes it forks.
    signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
    try:
        resource_tracker.ensure_running()
        signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)  # again, as starting the server unblocks SIGTERM and SIGINT
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)
    return chosen
