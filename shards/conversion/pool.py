"""Harmonise and rank scans in worker processes with one thread each."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path

from shards.cohorts.scan import RunSource
from shards.conversion.session import Parcels, SessionSettings, WindowRanker, convert
from shards.core.errors import ConfigError, Stopped
from shards.core.room import stop_if_full
from shards.core.workers import end_with_parent, why_no_workers
from shards.format.refusal import Refusal
from shards.format.session_record import ScanRecord

_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


def convert_all(
    runs: Sequence[RunSource],
    settings: SessionSettings,
    folder: Path,
    parcels: Parcels,
    ranker: WindowRanker | None,
    workers: int,
) -> Generator[tuple[RunSource, ScanRecord | Refusal], None, None]:
    """Call `convert` for each scan, and yield each scan with its result when it is done.

    At most two scans per worker are queued, so that an error stops the conversion soon.

    Raises
    ------
    ConfigError
        If worker processes cannot be started on this machine.
    Stopped
        If a worker process died, or the disk is full.
    """
    if (why := why_no_workers()) is not None:
        raise ConfigError("/dev/shm", "", why, "shared memory", "In a container: docker run --shm-size=1g")
    context = multiprocessing.get_context("spawn")
    try:
        with (
            _one_thread_each(),
            ProcessPoolExecutor(min(workers, len(runs)), context, end_with_parent) as pool,
        ):
            queue = list(reversed(runs))
            pending: dict[Future[ScanRecord | Refusal], RunSource] = {}
            while queue or pending:
                while queue and len(pending) < 2 * workers:
                    run = queue.pop()
                    pending[pool.submit(convert, run, settings, folder, parcels, ranker)] = run
                finished, _ = wait(pending, return_when=FIRST_COMPLETED)
                for future in finished:
                    run = pending.pop(future)
                    with stop_if_full(folder, run.key):
                        found = future.result()
                    yield run, found
    except BrokenProcessPool:
        raise Stopped(
            "a worker process died, perhaps because the machine is out of memory",
            "the same command continues; use fewer --workers if it happens again",
        ) from None


@contextmanager
def _one_thread_each() -> Iterator[None]:
    """Context in which new processes use one thread, so that sums do not depend on the number of workers."""
    before = {name: os.environ.get(name) for name in _THREADS}
    os.environ.update(dict.fromkeys(_THREADS, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
