"""Using the cores this process was given, and no more CPU time than the work takes.

Threads inside an operation of torch (OpenMP) wait for one another at its end, spinning. Where a core is taken by
somebody else, or a quota is smaller than the number of cores, that waiting costs many times the work. Items that do not
need each other go to threads that do not wait, each with one thread inside its operations. Their numbers are then the
same for every number of cores, bit for bit.
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
    """Threads to use: those of torch (OMP_NUM_THREADS, torch.set_num_threads), at most the cores of this process.

    The cores are those that affinity and the quota of a container (cgroup) leave, or LOKY_MAX_CPU_COUNT.
    """
    return max(1, min(torch.get_num_threads(), joblib.cpu_count()))


@contextmanager
def threads_inside(count: int) -> Iterator[None]:
    """Meanwhile, torch uses this many threads inside an operation."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def spread(work: Callable[[Item], Result], items: Sequence[Item], most: int) -> list[Result]:
    """`work` of each item, in order, on as many cores as there are, at most `most` items at once."""
    workers = min(cores(), most, len(items))
    with threads_inside(1):
        if workers <= 1:
            return [work(item) for item in items]
        with ThreadPoolExecutor(workers) as pool:
            return list(pool.map(work, items))
