"""One training at a time in a run's folder: RUN/lock, held by rank 0 or by the launcher of a run on one machine.

The lock is `flock`'s, so it ends with the processes that hold it, however they end. The file stays and names its last
holder. A launcher hands its lock to rank 0, which holds it on if the launcher is killed.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from shards.core import flock
from shards.core.errors import ConfigError, Stopped, is_full

LOCK = "lock"
HANDED_ON = "SLIM_BRAIN_LOCK"  # environment of rank 0: descriptor of the lock; empty where nothing can be locked
_PATIENCE = 300.0  # seconds for the lock of a lost node to expire (NFSv4: 90), when its job was requeued


@dataclass
class _Held:
    descriptor: int | None  # None: this file system has no locks
    times: int
    made: list[Path]  # folders that were made for it, the innermost first


_held: dict[Path, _Held] = {}  # of this process


@contextmanager
def holding(folder: str | Path) -> Iterator[int | None]:
    """Keep other processes from training in a run's folder; in one process it may be entered more than once.

    The folder is made if need be, and removed again if nothing was written to it.

    Yields
    ------
    int or None
        The lock's descriptor; None where the file system has no locks, of which a warning is printed.

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
    """Hold the lock until this process ends: the launcher's, if it has handed on its own."""
    given = os.environ.pop(HANDED_ON, None)
    if given is None:
        held = _acquire(folder)
    else:
        held = _Held(int(given) if given else None, 0, [])
        if held.descriptor is not None:
            os.set_inheritable(held.descriptor, False)  # processes that load must not keep it
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
            print(f"{path} cannot be locked ({error.strerror}): start no second training there", file=sys.stderr)
            return _Held(None, 0, made)
        if not locked:
            holder = flock.holder(descriptor)
            os.close(descriptor)
            if _is_former_attempt(holder):
                if time.monotonic() < end:
                    time.sleep(1)
                    continue
                raise Stopped(f"{folder} is still held by {holder}", "the same command continues once it has ended")
            raise ConfigError(
                folder,
                "run.out",
                f"a run in which {holder} is training",
                "a run in which no other process trains",
                "Wait for it or stop it, or use another run.out",
            )
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), path.stat()):
                _sign(descriptor, os.getpid())
                return _Held(descriptor, 0, made)
        os.close(descriptor)  # its holder has removed it meanwhile


def _make(folder: Path) -> list[Path]:
    """Make a folder; those that were not there, the innermost first."""
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
    """Write down who holds the lock."""
    names = " and ".join(map(str, processes))
    who = f"process{'es' if len(processes) > 1 else ''} {names} on {socket.gethostname()}"
    text = f"{who} since {datetime.now().astimezone().isoformat(sep=' ', timespec='seconds')}"
    if "SLURM_JOB_ID" in os.environ:
        text += f" ({_attempt()})"
    flock.sign(descriptor, text)


def _attempt() -> str:
    return f"job {os.environ['SLURM_JOB_ID']}, attempt {os.environ.get('SLURM_RESTART_COUNT', '0')}"


def _is_former_attempt(holder: str) -> bool:
    """Whether a holder is this SLURM job before it was requeued: the server may not know yet that its node is gone."""
    found = re.search(r"\((job .*), attempt \d+\)$", holder)
    own = _attempt() if "SLURM_JOB_ID" in os.environ else ""
    return found is not None and own.startswith(f"{found[1]},") and not holder.endswith(f"({own})")


def _release(folder: Path, held: _Held) -> None:
    with contextlib.suppress(OSError):
        if held.made and os.listdir(folder) in ([], [LOCK]):  # refused before anything was written
            (folder / LOCK).unlink(missing_ok=True)
            for path in held.made:
                path.rmdir()
    if held.descriptor is not None:
        os.close(held.descriptor)
