"""Use the available cores efficiently.

The threads inside an operation of torch (OpenMP) wait for each other at its end in a busy loop. If other processes use
a core, or a quota is smaller than the number of cores, this waiting costs many times the work. Independent items are
therefore processed in separate threads, each with one thread inside its operations. The results are then bit-identical
for every number of cores.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import joblib
import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


def cores() -> int:
    """Number of threads to use: that of torch (OMP_NUM_THREADS, torch.set_num_threads), but at most the cores.

    The number of cores takes into account CPU affinity, the quota of a container (cgroup) and LOKY_MAX_CPU_COUNT.
    """
    return max(1, min(torch.get_num_threads(), joblib.cpu_count()))


@contextmanager
def threads_inside(count: int) -> Iterator[None]:
    """Context in which torch uses this number of threads inside an operation."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def spread(work: Callable[[Item], Result], items: Sequence[Item], most: int) -> list[Result]:
    """Call `work` for each item on the available cores, at most `most` at once; returns the results in order."""
    workers = min(cores(), most, len(items))
    with threads_inside(1):
        if workers <= 1:
            return [work(item) for item in items]
        with ThreadPoolExecutor(workers) as pool:
            return list(pool.map(work, items))
