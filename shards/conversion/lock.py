"""The lock on the folder of a dataset, DATASET/work/lock, so that only one conversion at a time writes to it."""

from __future__ import annotations

import logging
import os
import socket
import time
from pathlib import Path

from shards.core import flock
from shards.core.errors import DatasetError
from shards.format import layout

logger = logging.getLogger(__name__)


class FolderLock:
    """The lock on the folder of a dataset. It is held until `close`, or until this process ends for any reason."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._descriptor: int | None = None

    def acquire(self, who: str = "", shared: bool = False, patience: float = 0) -> None:
        """Acquire the lock, unless this object holds it already.

        Parameters
        ----------
        who : str
            Name of this process in the errors of others; by default its process ID.
        shared : bool
            Whether to share the lock with other tasks of the same conversion. A process that held the lock alone must
            have started this conversion.
        patience : float
            Seconds to wait for the lock.

        Raises
        ------
        DatasetError
            If another conversion holds the lock, or the folder cannot be written.
        """
        if self._descriptor is not None:
            return
        work = self._folder / layout.WORK
        try:
            work.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(work / "lock", os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            what = f"a folder that cannot be written ({error.strerror})"
            raise DatasetError(self._folder, "--out", what, "a folder that can be written") from None
        end = time.monotonic() + patience
        try:
            while not flock.try_lock(self._descriptor, shared):
                if time.monotonic() >= end:
                    holder = flock.holder(self._descriptor)
                    self.close()
                    got, hint = f"a folder that {holder} is writing to", "Wait for it, or give another --out"
                    raise DatasetError(self._folder, "--out", got, "one conversion at a time", hint)
                time.sleep(0.2)
        except OSError as error:
            logger.warning(
                "%s cannot be locked (%s): do not start a second conversion there", self._folder, error.strerror
            )
            return
        flock.sign(self._descriptor, who or f"process {os.getpid()} on {socket.gethostname()}")

    def close(self) -> None:
        """Release the lock."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
