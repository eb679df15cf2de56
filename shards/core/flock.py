"""Advisory locks on files (`flock`). A lock ends with the processes that hold it, however they end."""

from __future__ import annotations

import contextlib
import fcntl
import os


def try_lock(descriptor: int, shared: bool = False) -> bool:
    """Lock an open file without waiting.

    Returns
    -------
    bool
        False if another process holds the lock.

    Raises
    ------
    OSError
        If the file system has no locks, as some network file systems.
    """
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def sign(descriptor: int, holder: str) -> None:
    """Write into the locked file who holds it."""
    with contextlib.suppress(OSError):  # the lock counts, not its text
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{holder}\n".encode(), 0)


def holder(descriptor: int) -> str:
    """Who holds the lock, as it signed."""
    return os.pread(descriptor, 300, 0).decode(errors="replace").strip() or "another process"
