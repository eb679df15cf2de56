"""Checkpoints that are complete or absent.

    RUN/checkpoints/step-00000100/   ZeRO shards of every process (DeepSpeed's own files)
                                     weights.safetensors   online encoder, target encoder, running means: fp32, whole
                                     COMPLETE              written last: step, world size, global batch, sizes of all
                                                           files
    RUN/checkpoints/latest           name of the newest complete one

DeepSpeed's own `latest` is written without a barrier and can name an incomplete folder, so it is not used. Here every
process writes, all meet, rank 0 flushes the files and writes COMPLETE, then `latest`; what has no valid COMPLETE does
not exist for a load.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from shards.errors import UserError
from shards.layout import dump, sync_folder, write_atomically

COMPLETE, LATEST, WEIGHTS = "COMPLETE", "latest", "weights.safetensors"
# What a run keeps beside the ZeRO shards: optimizer steps, samples of the stream, what was left out.
STATE = ("step", "consumed", "skipped")


class CheckpointError(UserError):
    """A checkpoint that is missing, incomplete, or of another configuration."""


def tag(step: int) -> str:
    """Folder name of the checkpoint after `step` optimizer steps."""
    return f"step-{step:08d}"


def is_complete(folder: Path) -> bool:
    """Whether COMPLETE is there and every file it names is there with its size."""
    try:
        facts = json.loads((folder / COMPLETE).read_text())
        return all((folder / name).stat().st_size == size for name, size in facts["files"].items())
    except (OSError, json.JSONDecodeError, KeyError, TypeError):
        return False


def newest(checkpoints: Path) -> Path | None:
    """The newest complete checkpoint, or None."""
    folders = sorted(checkpoints.glob("step-*"), reverse=True)
    return next((folder for folder in folders if is_complete(folder)), None)


def facts(folder: Path) -> dict[str, Any]:
    """What COMPLETE says."""
    return json.loads((folder / COMPLETE).read_text())


def save(
    engine: Any,
    checkpoints: Path,
    step: int,
    state: dict[str, Any],
    weights: dict[str, Tensor],
    about: dict[str, Any],
    keep: int,
) -> Path:
    """Write a checkpoint; every process calls it.

    Parameters
    ----------
    engine : DeepSpeed engine
    checkpoints : Path
    step : int
        Optimizer steps done.
    state : dict
        What `STATE` names: kept beside the ZeRO shards and returned by `load`.
    weights : dict of str to Tensor
        Whole tensors for `weights.safetensors`; used on rank 0.
    about : dict
        JSON-able facts for COMPLETE.
    keep : int
        Newest complete checkpoints that stay.
    """
    folder = checkpoints / tag(step)
    first = dist.get_rank() == 0
    if first:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    dist.barrier()
    engine.save_checkpoint(str(checkpoints), tag=folder.name, client_state=state, save_latest=False)
    if first:
        save_file({name: value.detach().cpu().contiguous() for name, value in weights.items()}, folder / WEIGHTS)
    dist.barrier()
    if first:
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        for path in files:
            with open(path, "rb") as file:
                os.fsync(file.fileno())
        sync_folder(folder)
        sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}
        write_atomically(
            folder / COMPLETE,
            dump(
                {"step": step, "world_size": dist.get_world_size(), "torch": torch.__version__, "files": sizes, **about}
            ),
        )
        write_atomically(checkpoints / LATEST, folder.name + "\n")
        _prune(checkpoints, keep)
    dist.barrier()
    return folder


def _prune(checkpoints: Path, keep: int) -> None:
    """Remove all but the newest `keep` complete checkpoints, and older incomplete ones."""
    complete = [folder for folder in sorted(checkpoints.glob("step-*")) if is_complete(folder)]
    kept = complete[-keep:]
    for folder in checkpoints.glob("step-*"):
        if folder not in kept and folder < kept[-1]:
            shutil.rmtree(folder, ignore_errors=True)


def find(checkpoints: Path) -> Path | None:
    """The newest complete checkpoint as rank 0 sees it, told to all processes."""
    found = [newest(checkpoints) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(found, src=0)
    return found[0]


def global_batch(folder: Path) -> int:
    """Samples that all processes of the run take per optimizer step; CheckpointError where nobody wrote it down."""
    about = facts(folder)
    if "global_batch" not in about:
        raise CheckpointError(
            folder / COMPLETE,
            "global_batch",
            "nothing",
            "samples per optimizer step",
            "An earlier version wrote this: start anew in another run.out",
        )
    return about["global_batch"]


def check(folder: Path, identity: str, zero_stage: int, samples: int) -> None:
    """Refuse to go on from a checkpoint of another model, ZeRO stage or global batch (`samples` per step).

    Raises
    ------
    CheckpointError
    """
    about = facts(folder)
    hint = "Use the settings in the run's config.yaml, or another run.out"
    if about["identity"] != identity:
        field = "model, view, windows.k, loss or the data's grid"
        raise CheckpointError(folder, field, "another setting than the run began with", "the same", hint)
    if about["zero_stage"] != zero_stage:
        raise CheckpointError(folder, "zero.stage", zero_stage, about["zero_stage"], hint)
    if global_batch(folder) != samples:
        field = "run.batch x run.accumulate x processes"
        raise CheckpointError(folder, field, f"{samples} samples per step", f"{global_batch(folder)}", hint)


def load(engine: Any, folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Restore the engine from a checkpoint of as many processes (at ZeRO stage 0 of any number), by DeepSpeed's load.

    Returns its state and whole weights.
    """
    path, state = engine.load_checkpoint(str(folder.parent), tag=folder.name)
    if path is None:
        raise CheckpointError(folder, "", "nothing DeepSpeed could load", "its ZeRO shards")
    return state, read_weights(folder / WEIGHTS)


def read_weights(path: Path, prefix: str = "") -> dict[str, Tensor]:
    """Tensors of a safetensors file whose names start with `prefix`, without it."""
    try:
        with safe_open(path, "pt") as file:
            return {
                name.removeprefix(prefix): file.get_tensor(name)
                for name in file.keys()  # noqa: SIM118
                if name.startswith(prefix)
            }
    except Exception as error:
        raise CheckpointError(path, "", f"unreadable ({type(error).__name__})", "a safetensors file") from None
