"""Whether results can be written, asked before the work that leads to them."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from shards.core.errors import ConfigError, Stopped, is_full

_LEAST = 1 << 20  # bytes that a file system with room takes


def has_room(folder: str | os.PathLike[str], size: int = 0) -> bool:
    """Whether a folder's file system, and this user's quota there, take so many bytes more (1 MiB at least).

    For errors of libraries that keep no errno. Where it cannot be known, the answer is yes.
    """
    size = max(size, _LEAST)
    try:
        found = os.statvfs(folder)
        if found.f_blocks and found.f_bavail * found.f_frsize < size:
            return False
        with tempfile.TemporaryFile(dir=folder) as probe:  # asks the quota
            os.posix_fallocate(probe.fileno(), 0, size)
    except (OSError, AttributeError) as error:  # some systems have no such call
        return not is_full(error)
    return True


def require_room(folder: Path, field: str, size: int = 0) -> None:
    """Look whether files can be written to a folder, which need not be there yet.

    Parameters
    ----------
    folder : Path
    field : str
        How the user named it, such as `--out`.
    size : int
        Bytes that are needed, as far as is known; 1 MiB at least.

    Raises
    ------
    ConfigError
        If it cannot be written: no permission, a read-only file system, a file in its place, a name that is too long.
    Stopped
        If the file system is full.
    """
    full = Stopped(f"no space left for {folder}", "make room, then call the same command again")
    try:
        there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        if is_full(error):
            raise full from None
        got = f"a folder that cannot be written ({error.strerror})"
        raise ConfigError(folder, field, got, "a folder that can be written", "Choose another one") from None
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
