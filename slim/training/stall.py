"""Warn when a run makes no progress. Metrics are only logged after a step, so they cannot show it."""

from __future__ import annotations

import statistics
import threading
import time
from collections import deque
from collections.abc import Callable

from shards.core.progress import duration

DATA, COMPUTE, SAVE = "waiting for data", "computing", "saving a checkpoint"
_ADVICE = {
    DATA: "a loading process may be stuck, or the file system may be slow",
    COMPUTE: "another process of the run may be stuck or dead, or may use the same cores or GPU",
    SAVE: "the file system may be slow or full",
}
_RECENT = 50  # steps from which the usual duration is computed


class Watch:
    """Reports a step that takes far longer than usual, once per step. Used as a context manager.

    Parameters
    ----------
    tell : callable
        Called with the text of the report.
    times, least : float
        A step is late when it takes more than `times` the median duration and more than `least` seconds.
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
        """Set what the run is doing from now on: DATA, COMPUTE or SAVE."""
        self._what = what

    def step(self) -> None:
        """Record the end of a step."""
        now = time.monotonic()
        self._taken.append(now - self._begun)
        self._begun, self._late = now, False

    def _look(self) -> None:
        while not self._end.wait(self.least / 20):
            taken = time.monotonic() - self._begun
            # The first step reads, compiles and allocates, and no earlier step is there to compare it with.
            usual = statistics.median(list(self._taken)) if self._taken else self.least
            if not self._late and taken > max(self.least, self.times * usual):
                self._late = True
                compared = f" (usual: {usual:.2g} s)" if self._taken else " since the start"
                what = f"no step finished for {duration(taken)}{compared} while {self._what}"
                self.tell(f"{what}: {_ADVICE[self._what]}")
