"""Whether results can be written, asked before the work that leads to them."""

from __future__ import annotations

import tempfile
from pathlib import Path

from shards.errors import ConfigError, Stopped, is_full
from shards.files import has_room


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
    full = Stopped(f"no space left for {folder}; make room, then call the same command again")
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
