"""The weights that a run begins with: RUN/start.safetensors.

The file is written once, before the first step. Settings of the run hold its hash, so a run cannot begin with other
weights than those it was prepared with.
"""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from shards.core.files import atomically, sha256, share
from slim.checkpoints import checkpoint
from slim.checkpoints.checkpoint import CheckpointError
from slim.checkpoints.run_folder import START


def write(folder: Path, tensors: dict[str, Tensor]) -> str:
    """Write FOLDER/start.safetensors, and return its hash."""
    with atomically(folder / START) as file:
        save_file({name: value.detach().cpu().contiguous() for name, value in tensors.items()}, file.name)
        share(file.name)
    return sha256(folder / START)


def read(folder: Path, expected: str, command: str) -> dict[str, Tensor]:
    """Read FOLDER/start.safetensors.

    Parameters
    ----------
    folder : Path
    expected : str
        Its hash.
    command : str
        The command that writes it, for errors.

    Raises
    ------
    CheckpointError
        If the file is missing, or has another hash.
    """
    path = folder / START
    if not path.is_file() or sha256(path) != expected:
        hint = f"Start {command} again, with another folder"
        raise CheckpointError(path, "SHA-256", "another file" if path.is_file() else "no such file", expected, hint)
    return checkpoint.read_weights(path)
