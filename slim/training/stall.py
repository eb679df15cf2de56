"""A word in time when a run stands still: nothing is logged then, so nothing else would tell."""

from __future__ import annotations

import statistics
import threading
import time
from collections import deque
from collections.abc import Callable

from shards.core.cli import duration

DATA, COMPUTE, SAVE = "waiting for data", "computing", "saving a checkpoint"
_ADVICE = {
    DATA: "a loading process is stuck, or the file system is slow",
    COMPUTE: "another process is stuck or dead, or shares this one's cores or GPU",
    SAVE: "the file system is slow or full",
}
_RECENT = 50  # steps that tell what is usual


class Watch:
    """Tells, once for each time it happens, that a step takes far longer than usual. A context manager.

    Parameters
    ----------
    tell : callable
        Given the line.
    times, least : float
        A step is late after `times` its usual (median) seconds, and `least` seconds.
    """

    def __init__(self, tell: Callable[[str], None], times: float = 10, least: float = 60):
        self.tell, self.times, self.least = tell, times, least
        self._taken: deque[float] = deque(maxlen=_RECENT)
        self._begun = time.monotonic()
        self._what = COMPUTE
        self._late = False
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._look, name="watch", daemon=True)

    def __enter__(self) -> Watch:
        self._begun = time.monotonic()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()

    def now(self, what: str) -> None:
        """What the run is doing from now on: DATA, COMPUTE or SAVE."""
        self._what = what

    def step(self) -> None:
        """A step has ended."""
        now = time.monotonic()
        self._taken.append(now - self._begun)
        self._begun, self._late = now, False

    def _look(self) -> None:
        while not self._end.wait(self.least / 20):
            taken = time.monotonic() - self._begun
            # The first step reads, compiles and allocates, and there is nothing usual to compare it with.
            usual = statistics.median(list(self._taken)) if self._taken else self.least
            if not self._late and taken > max(self.least, self.times * usual):
                self._late = True
                compared = f", where one takes {usual:.2g} s" if self._taken else " since the start"
                self.tell(f"no step has ended for {duration(taken)}{compared}: {self._what}; {_ADVICE[self._what]}")
