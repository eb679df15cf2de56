"""Check before long work that its results can be written."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from shards.core.errors import ConfigError, Stopped, is_full

_LEAST = 1 << 20  # smallest number of free bytes


def has_room(folder: str | os.PathLike[str], size: int = 0) -> bool:
    """Whether the file system of a folder, and this user's quota, have room for `size` bytes (at least 1 MiB).

    It is needed for errors of libraries without an errno. Returns True if it cannot be determined.
    """
    size = max(size, _LEAST)
    try:
        found = os.statvfs(folder)
        if found.f_blocks and found.f_bavail * found.f_frsize < size:
            return False
        with tempfile.TemporaryFile(dir=folder) as probe:  # this checks the quota
            os.posix_fallocate(probe.fileno(), 0, size)
    except (OSError, AttributeError) as error:  # some systems do not have this call
        return not is_full(error)
    return True


def require_room(folder: Path, field: str, size: int = 0) -> None:
    """Check that files can be written to a folder, which need not exist yet.

    Parameters
    ----------
    folder : Path
    field : str
        Option or setting that names the folder, such as `--out`.
    size : int
        Number of bytes needed, if known; at least 1 MiB.

    Raises
    ------
    ConfigError
        If it cannot be written, for example without permission, on a read-only file system, or with a too long name.
    Stopped
        If the file system is full.
    """
    full = Stopped(f"no space left for {folder}", "make room, then give the same command again")
    try:
        there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        if is_full(error):
            raise full from None
        got = f"a folder that cannot be written ({error.strerror})"
        raise ConfigError(folder, field, got, "a folder that can be written", "Use another folder") from None
    if not has_room(there, size):
        raise full


@contextmanager
def stop_if_full(folder: Path, what: str) -> Iterator[None]:
    """Turn the error of a full disk or an exhausted quota into `Stopped`.

    Parameters
    ----------
    folder : Path
        Where files are written.
    what : str
        What they are of, for the message.
    """
    try:
        yield
    except OSError as error:
        if not is_full(error):
            raise
        raise Stopped(
            f"no space left in {folder} for {what}", "make room, then the same command continues from there"
        ) from None
