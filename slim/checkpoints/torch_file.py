"""Read files written by `torch.save` without running code from them.

Reading a pickle can call any function. `torch.load(..., weights_only=True)` accepts only tensors, containers, numbers,
text, and the classes that a caller names.
"""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from shards.core.files import printable
from slim.checkpoints.checkpoint import CheckpointError

_WHAT = "tensors, numbers and text, as training writes them"
_HINT = "Do not use this file: copy the checkpoint again from where it was written"
_NAMED = 3  # number of objects listed in an error


def read(
    path: str | Path,
    map_location: Any = "cpu",
    mmap: bool = False,
    allowed: Callable[[], Sequence[Any]] = tuple,
) -> dict[str, Any]:
    """Read a file written by `torch.save`.

    Parameters
    ----------
    path : str or Path
    map_location
        As for `torch.load`.
    mmap : bool
        Whether to memory-map tensors, so that they are read only when used.
    allowed : callable
        Returns the classes that the file may hold besides tensors, containers, numbers and text.

    Raises
    ------
    CheckpointError
        If the file cannot be read, or holds other objects.
    """
    try:
        _require_zip(path)
        with torch.serialization.safe_globals([*allowed()]):
            found = torch.load(path, map_location=map_location, mmap=mmap, weights_only=True)
    except OSError as error:
        raise CheckpointError(path, "", error.strerror or error, "a readable file") from None
    except (CheckpointError, MemoryError):
        raise
    except Exception as error:
        raise CheckpointError(path, "", _got(path, error, [*allowed()]), _WHAT, _HINT) from None
    if not isinstance(found, dict):
        raise CheckpointError(path, "", f"an object of type {type(found).__name__}", _WHAT, _HINT)
    return found


def _require_zip(path: str | Path) -> None:
    """Raise CheckpointError if a file is not an uncompressed zip archive, the form in which `torch.save` writes.

    In torch's older form, a few bytes can request gigabytes of memory, and so can a compressed archive.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            is_stored = sum(info.file_size for info in archive.infolist()) <= Path(path).stat().st_size
    except (zipfile.BadZipFile, ValueError, NotImplementedError):
        raise CheckpointError(path, "", "a file that is not a zip archive", _WHAT, _HINT) from None
    if not is_stored:
        raise CheckpointError(path, "", "a compressed zip archive", _WHAT, _HINT)


def _got(path: str | Path, error: Exception, allowed: list[Any]) -> str:
    """Describe why a file was refused. Objects that are not allowed are listed without building them."""
    if isinstance(error, pickle.UnpicklingError):
        try:
            with torch.serialization.safe_globals(allowed):
                names = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
        except Exception:  # not a format that torch can list
            names = []
        shown = ", ".join(printable(name)[:60] for name in names[:_NAMED]) or "an object that is not allowed"
        return f"a pickle that contains {shown}"
    return f"a file that torch cannot read ({type(error).__name__})"
