"""A lock on the run folder, RUN/lock, so that only one training at a time writes to it.

Rank 0 holds the lock, and so does the launcher of a run on one machine. It is a `flock` lock, which the system releases
when the processes that hold it end. The file remains and names its last holder. The launcher passes its lock to rank 0,
which keeps it if the launcher is killed.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from shards.core import flock
from shards.core.errors import ConfigError, Stopped, is_full

logger = logging.getLogger(__name__)

LOCK = "lock"
HANDED_ON = "SLIM_BRAIN_LOCK"  # environment variable of rank 0: the lock's descriptor; empty without file locks
_PATIENCE = 300.0  # seconds that a requeued job waits for the lock of its lost node to expire (NFSv4: 90)


@dataclass
class _Held:
    descriptor: int | None  # None: this file system has no locks
    times: int
    made: list[Path]  # folders made for the lock, the innermost first


_held: dict[Path, _Held] = {}  # locks held by this process


@contextmanager
def holding(folder: str | Path) -> Iterator[int | None]:
    """Hold the lock on a run folder, so that no other process trains in it. A process may enter it more than once.

    The folder is made if needed, and removed again if nothing was written to it.

    Yields
    ------
    int or None
        The lock's descriptor; None where the file system has no locks, which is logged as a warning.

    Raises
    ------
    ConfigError
        If another process holds it, or the folder cannot be written.
    Stopped
        If an earlier attempt of this SLURM job still holds it.
    """
    key = Path(folder).resolve()
    held = _held.get(key)
    if held is None:
        held = _held[key] = _acquire(Path(folder))
    held.times += 1
    try:
        yield held.descriptor
    finally:
        held.times -= 1
        if not held.times:
            del _held[key]
            _release(Path(folder), held)


def take(folder: Path) -> None:
    """Hold the lock until this process ends. If the launcher passed its lock on, use that one."""
    given = os.environ.pop(HANDED_ON, None)
    if given is None:
        held = _acquire(folder)
    else:
        held = _Held(int(given) if given else None, 0, [])
        if held.descriptor is not None:
            os.set_inheritable(held.descriptor, False)  # loading processes must not keep the lock
            _sign(held.descriptor, os.getppid(), os.getpid())
    held.times += 1
    _held[folder.resolve()] = held


def _acquire(folder: Path) -> _Held:
    path, made, end = folder / LOCK, _make(folder), time.monotonic() + _PATIENCE
    while True:
        descriptor = _open(path)
        try:
            locked = flock.try_lock(descriptor)
        except OSError as error:  # some network file systems are mounted without locks
            os.close(descriptor)
            logger.warning("%s cannot be locked (%s): start no second training there", path, error.strerror)
            return _Held(None, 0, made)
        if not locked:
            holder = flock.holder(descriptor)
            os.close(descriptor)
            if _is_former_attempt(holder):
                if time.monotonic() < end:
                    time.sleep(1)
                    continue
                after = "give the same command again once that process has ended"
                raise Stopped(f"{folder} is still held by {holder}", after)
            raise ConfigError(
                folder,
                "run.out",
                f"a run folder in which {holder} is training",
                "a run folder that no other process uses",
                "Wait for it or stop it, or use another run.out",
            )
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), path.stat()):
                _sign(descriptor, os.getpid())
                return _Held(descriptor, 0, made)
        os.close(descriptor)  # the former holder has removed the file in the meantime


def _make(folder: Path) -> list[Path]:
    """Make a folder, and return the folders that were missing, the innermost first."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(folder, error) from None
    return missing


def _open(path: Path) -> int:
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise _unwritable(path.parent, error) from None


def _unwritable(folder: Path, error: OSError) -> Exception:
    if is_full(error):
        return Stopped(f"no space left for {folder}", "make room, then give the same command again")
    got = f"a folder that cannot be written ({error.strerror})"
    return ConfigError(folder, "run.out", got, "a folder that can be written", "Use another run.out")


def _sign(descriptor: int, *processes: int) -> None:
    """Write the holder of the lock into the file."""
    names = " and ".join(map(str, processes))
    who = f"process{'es' if len(processes) > 1 else ''} {names} on {socket.gethostname()}"
    text = f"{who} since {datetime.now().astimezone().isoformat(sep=' ', timespec='seconds')}"
    if "SLURM_JOB_ID" in os.environ:
        text += f" ({_attempt()})"
    flock.sign(descriptor, text)


def _attempt() -> str:
    return f"job {os.environ['SLURM_JOB_ID']}, attempt {os.environ.get('SLURM_RESTART_COUNT', '0')}"


def _is_former_attempt(holder: str) -> bool:
    """Whether the holder is an earlier attempt of this SLURM job; the file server may not know yet that it ended."""
    found = re.search(r"\((job .*), attempt \d+\)$", holder)
    own = _attempt() if "SLURM_JOB_ID" in os.environ else ""
    return found is not None and own.startswith(f"{found[1]},") and not holder.endswith(f"({own})")


def _release(folder: Path, held: _Held) -> None:
    with contextlib.suppress(OSError):
        if held.made and os.listdir(folder) in ([], [LOCK]):  # nothing was written
            (folder / LOCK).unlink(missing_ok=True)
            for path in held.made:
                path.rmdir()
    if held.descriptor is not None:
        os.close(held.descriptor)
