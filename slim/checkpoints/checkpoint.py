"""Checkpoints, written so that a killed process never leaves one that looks complete but is not.

    RUN/checkpoints/step-00000100/   ZeRO shards of every process (DeepSpeed's own files)
                                     weights.safetensors   online encoder, target encoder, running means: fp32, whole
                                     config.yaml, dataset.json, seen.json, provenance.json   as in RUN
                                     COMPLETE              written last: step, world size, versions, origin of the run,
                                                           size and SHA-256 of every file, and a hash of itself
    RUN/checkpoints/latest           name of the newest complete checkpoint

DeepSpeed's `latest` file is not used: it is written without a barrier and can name an incomplete folder. Here every
process writes, flushes and hashes its files; after a barrier, rank 0 writes COMPLETE and then `latest`. Loading ignores
a folder without COMPLETE, and refuses a folder whose files differ from what was written. When a checkpoint is removed,
COMPLETE is removed first.

The state of random generators is not saved: all random numbers are derived from seed, epoch, sample key and step.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import shutil
import stat
import time
from collections.abc import Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypedDict

import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from shards.core.errors import Stopped, UserError, is_full
from shards.core.files import dump, printable, share, sync_folder, write_atomically
from shards.core.room import has_room
from shards.core.settings import shown
from slim.checkpoints import exchange
from slim.checkpoints.run_folder import ABOUT_RUN, ALSO_ABOUT_RUN, COMPLETE, LATEST, WEIGHTS

BEST = "best."  # prefix of the tensors of the best epoch of a fine-tuning
# Saved with the ZeRO shards: optimizer steps done, samples consumed, what was skipped.
_SEAL = "seal"
_NAME = re.compile(r"step-[0-9]{8}")
_READERS = 4  # files hashed in parallel
_FILE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,250}")  # allowed names of files in a checkpoint
_MOST = {"step": 2**53, "world_size": 10**6, "global_batch": 10**7}
_MOST_BYTES = 1 << 26  # largest accepted size of COMPLETE
_FOREIGN = "Copy the checkpoint again from where it was written"


class SkippedState(TypedDict):
    """Damaged samples (keys) and how many steps in a row were skipped, up to a checkpoint."""

    keys: list[str]
    row: int


class TrainingState(TypedDict):
    """Where a training is: optimizer steps done, samples consumed, what was skipped."""

    step: int
    consumed: int
    skipped: SkippedState


class CheckpointError(UserError, ValueError):
    """A checkpoint that is missing, incomplete, damaged, or of another configuration."""


def tag(step: int) -> str:
    """Name of the folder of the checkpoint after `step` optimizer steps."""
    return f"step-{step:08d}"


def folders(checkpoints: Path) -> list[Path]:
    """All folders of checkpoints, complete or not, newest first. Folders with other names are ignored.

    They are sorted by the step that was saved, which differs from the name if a user copied a checkpoint.
    """
    found = [path for path in checkpoints.glob("step-*") if _NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=lambda folder: (step_of(folder), not _is_copy(folder), folder.name), reverse=True)


def step_of(folder: Path) -> int:
    """The step recorded in COMPLETE, or else in the name of the folder."""
    try:
        return int(facts(folder)["step"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return _named_step(folder)


def _named_step(folder: Path) -> int:
    return int(folder.name[len("step-") :])


def _is_copy(folder: Path) -> bool:
    """Whether a folder holds the checkpoint of another step than its name says, because a user copied it."""
    return folder.is_dir() and step_of(folder) != _named_step(folder)


def fault(folder: Path, files: Collection[str] | None = None) -> CheckpointError | None:
    """What is wrong with a checkpoint; None if it is intact.

    Parameters
    ----------
    folder : Path
    files : collection of str, optional
        Files to compare by SHA-256; by default all. The other files are compared by size.
    """
    path = folder / COMPLETE
    try:
        if path.stat().st_size > _MOST_BYTES:
            return CheckpointError(path, "", "a file that is too large", f"at most {_MOST_BYTES} bytes")
        about = json.loads(path.read_text(encoding="utf-8"))
        sealed = about.pop(_SEAL) == _seal(about)
        sizes, hashes = about["files"], about["sha256"]
        if sealed and (wrong := _wrong_facts(about)):
            return CheckpointError(path, wrong, "an invalid value", "a value written by a run", _FOREIGN)
    except FileNotFoundError:
        return CheckpointError(path, "", "no such file", "the file written last: the checkpoint is incomplete")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        sealed = False
    if not sealed:
        got = "content that does not match its hash (damaged, or written by an earlier version)"
        return CheckpointError(path, "", got, "an intact file", _FOREIGN)
    for name, size in sorted(sizes.items()):
        try:
            about_file = (folder / name).stat()
            found = about_file.st_size
            if not stat.S_ISREG(about_file.st_mode):
                return CheckpointError(folder / name, "", "not a regular file", f"a file of {size} bytes", _FOREIGN)
        except OSError as error:
            return CheckpointError(folder / name, "", error.strerror, f"a file of {size} bytes")
        if found != size:
            return CheckpointError(folder / name, "", f"{found} bytes", f"{size} bytes")
    compared = sorted(hashes if files is None else files)
    try:
        for name, (_, found_hash) in zip(compared, _measured(folder, compared), strict=True):
            if found_hash != hashes[name]:
                return CheckpointError(folder / name, "SHA-256", found_hash, hashes[name])
    except OSError as error:
        return CheckpointError(error.filename or folder, "", error.strerror, "a readable file")
    return None


def _wrong_facts(about: dict[str, Any]) -> str | None:
    """The first invalid field of COMPLETE. Its hash uses no key, so the file may come from anybody."""
    sizes, hashes = about["files"], about["sha256"]
    if not (isinstance(sizes, dict) and isinstance(hashes, dict) and sizes.keys() == hashes.keys()):
        return "files"
    for name, size in sizes.items():  # a name with a folder in it would be copied to another place
        if not _FILE.fullmatch(name) or type(size) is not int or size < 0 or not isinstance(hashes[name], str):
            return f"files: {shown(name)}"
    for field in ("step", "world_size", "global_batch"):
        least = 0 if field == "step" else 1
        if field in about and not (type(about[field]) is int and least <= about[field] <= _MOST[field]):
            return field
    versions = about.get("versions", {})
    if not (isinstance(versions, dict) and all(isinstance(number, str) for number in versions.values())):
        return "versions"
    return None


def is_complete(folder: Path) -> bool:
    """Whether COMPLETE exists, and every file that it lists exists with its size."""
    return fault(folder, ()) is None


def newest(checkpoints: Path) -> Path | None:
    """The newest complete checkpoint, or None. Its files are checked by size only."""
    return newest_intact(checkpoints, ())[0]


def facts(folder: Path) -> dict[str, Any]:
    """The content of COMPLETE."""
    return json.loads((folder / COMPLETE).read_text(encoding="utf-8"))


def fact(folder: Path, name: str) -> int:
    """A number in COMPLETE, such as its `step`.

    Raises
    ------
    CheckpointError
        If it is missing.
    """
    found = facts(folder).get(name)
    if type(found) is not int:
        raise CheckpointError(folder / COMPLETE, name, "no such number", "one, as training writes it", _FOREIGN)
    return found


def save(
    engine: Any,
    checkpoints: Path,
    step: int,
    state: TrainingState,
    weights: dict[str, Tensor],
    origin: Mapping[str, object],
) -> Path:
    """Write a checkpoint. All processes must call it.

    Parameters
    ----------
    engine : DeepSpeed engine
    checkpoints : Path
        Folder of the run's checkpoints.
    step : int
        Optimizer steps done.
    state : dict
        Where the training is; saved with the ZeRO shards and returned by `load`.
    weights : dict of str to Tensor
        Whole tensors for `weights.safetensors`; used on rank 0.
    origin : dict
        JSON-serialisable facts for COMPLETE: what the checkpoint depends on, and the plan of steps.

    Raises
    ------
    Stopped
        If the file system is full.
    """
    folder, rank = checkpoints / tag(step), dist.get_rank()
    if rank == 0:
        if _is_copy(folder):
            folder.rename(folder.with_name(f"{folder.name}-copy-{time.time_ns()}"))
        remove(folder)
        folder.mkdir(parents=True)
    dist.barrier()
    size = sum(value.numel() * value.element_size() for value in weights.values()) if rank == 0 else 0
    with _room_for(folder, size):
        engine.save_checkpoint(str(checkpoints), tag=folder.name, client_state=state, save_latest=False)
        if rank == 0:
            save_file({name: value.detach().cpu().contiguous() for name, value in weights.items()}, folder / WEIGHTS)
            share(folder / WEIGHTS)
            for name in ABOUT_RUN:
                shutil.copyfile(checkpoints.parent / name, folder / name)
            for name in ALSO_ABOUT_RUN:
                if (checkpoints.parent / name).is_file():  # version 0.1 wrote no provenance
                    shutil.copyfile(checkpoints.parent / name, folder / name)
        # Each process flushes its own files: on a network file system, fsync of another process does not.
        names = list(_written_by(rank, folder))
        mine = dict(zip(names, _measured(folder, names, flush=True), strict=True))
    everywhere = exchange.gather(mine)
    if rank == 0:
        measured = {name: (size, digest) for theirs in everywhere for name, (size, digest) in theirs.items()}
        with _room_for(folder):
            seal(folder, {"step": step, **origin}, measured)
            write_atomically(checkpoints / LATEST, folder.name + "\n")
    dist.barrier()
    return folder


@contextmanager
def _room_for(folder: Path, size: int = 0) -> Iterator[None]:
    """Raise Stopped and remove the folder if the file system has no room for `size` bytes, or becomes full.

    Any other exception passes, and the folder stays as it is.
    """
    try:
        yield
    except Exception as error:
        if not is_full(error) and not (_keeps_no_errno(error) and not has_room(folder, size)):
            raise
        remove(folder)
        raise Stopped(
            f"no space left for {folder}",
            "make room, or set run.keep lower. The same command continues from the last complete checkpoint",
        ) from error


def _keeps_no_errno(error: Exception) -> bool:
    """Whether torch or safetensors raised an error while writing; they report a full file system only in the text."""
    return type(error) is RuntimeError or isinstance(error, SafetensorError)


def _written_by(rank: int, folder: Path) -> Iterator[str]:
    """Files of a checkpoint that this process wrote: its ZeRO shards, and on rank 0 all files but ZeRO shards."""
    for path in sorted(folder.iterdir()):
        if path.name.startswith(f"zero_pp_rank_{rank}_") or (rank == 0 and not path.name.startswith("zero_pp_rank_")):
            yield path.name


def _measured(folder: Path, names: Iterable[str], flush: bool = False) -> Iterator[tuple[int, str]]:
    """Size and SHA-256 of files, computed in parallel."""

    def measure(name: str) -> tuple[int, str]:
        with open(folder / name, "rb") as file:
            if flush:
                os.fsync(file.fileno())
            return os.fstat(file.fileno()).st_size, hashlib.file_digest(file, "sha256").hexdigest()

    with ThreadPoolExecutor(_READERS) as pool:
        yield from pool.map(measure, names)


def seal(folder: Path, facts: Mapping[str, object], measured: dict[str, tuple[int, str]] | None = None) -> None:
    """Write COMPLETE, which makes a checkpoint valid.

    Parameters
    ----------
    folder : Path
    facts : dict
        JSON-serialisable facts; the world size and versions are added.
    measured : dict, optional
        Size and SHA-256 of every file, by name. By default the files are read to compute them.
    """
    if measured is None:
        names = sorted(path.name for path in folder.iterdir())
        measured = dict(zip(names, _measured(folder, names), strict=True))
    about = {
        "world_size": dist.get_world_size() if dist.is_initialized() else 1,
        "versions": {"python": platform.python_version(), **{name: version(name) for name in ("torch", "deepspeed")}},
        "files": {name: size for name, (size, _) in measured.items()},
        "sha256": {name: digest for name, (_, digest) in measured.items()},
        **facts,
    }
    sync_folder(folder)
    write_atomically(folder / COMPLETE, dump({**about, _SEAL: _seal(about)}))


def _seal(about: Mapping[str, object]) -> str:
    return hashlib.sha256(dump(about).encode()).hexdigest()


def remove(folder: Path) -> None:
    """Remove a checkpoint. COMPLETE is removed first: if the process is killed, the rest does not look complete."""
    (folder / COMPLETE).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def prune(checkpoints: Path, keep: int, every: int | None, spared: Collection[Path] = ()) -> None:
    """Remove all checkpoints except the newest `keep` complete ones and those of every `every`-th step.

    Incomplete and damaged checkpoints are removed. Those in `spared`, and copies and links made by users, are kept. The
    newest complete checkpoint is the one that `latest` names; newer ones were found damaged when the run was resumed.
    """
    latest = (checkpoints / LATEST).read_text(encoding="utf-8").strip()
    own = [folder for folder in folders(checkpoints) if not folder.is_symlink() and not _is_copy(folder)]
    complete = [folder for folder in own if folder.name <= latest and is_complete(folder)]
    kept = {*complete[:keep], *spared}
    if every:
        kept |= {folder for folder in complete if facts(folder)["step"] % every == 0}
    for folder in own:
        if folder not in kept:
            remove(folder)


def copy(folder: Path, checkpoints: Path) -> Path:
    """Copy a checkpoint into another folder of checkpoints. COMPLETE is copied last.

    Returns
    -------
    Path
        The copy. An intact copy that already exists is not written again.

    Raises
    ------
    CheckpointError
        If the files, or their copies, differ from what was written.
    OSError
        If there is no room or no access.
    """
    target = checkpoints / folder.name
    about = facts(folder)
    if fault(target) is None and facts(target)[_SEAL] == about[_SEAL]:
        return target
    remove(target)
    target.mkdir(parents=True)
    for name, size in about["files"].items():
        shutil.copyfile(folder / name, target / name)
        ((found, digest),) = _measured(target, [name], flush=True)
        if (found, digest) != (size, about["sha256"][name]):
            hint = "The file or its copy is damaged: check both disks"
            raise CheckpointError(folder / name, "SHA-256", digest, about["sha256"][name], hint)
    sync_folder(target)
    write_atomically(target / COMPLETE, (folder / COMPLETE).read_bytes())
    write_atomically(checkpoints / LATEST, target.name + "\n")
    return target


def newest_intact(checkpoints: Path, files: Collection[str] | None = None) -> tuple[Path | None, list[CheckpointError]]:
    """The newest intact checkpoint, and the errors of newer ones that are damaged.

    Folders without COMPLETE, left by a killed process, are ignored. `files` is as in `fault`.
    """
    refused: list[CheckpointError] = []
    for folder in folders(checkpoints):
        if (folder / COMPLETE).exists():
            found = fault(folder, files)
            if found is None:
                return folder, refused
            refused.append(found)
    return None, refused


def load(engine: Any, folder: Path) -> tuple[TrainingState, dict[str, Tensor]]:
    """Restore the engine with DeepSpeed's own load, from a checkpoint written by the same number of processes.

    At ZeRO stage 0 the number may differ. Returns the saved state and the whole weights.
    """
    from slim.checkpoints import zero_states

    with zero_states.read_by(engine):
        path, state = engine.load_checkpoint(str(folder.parent), tag=folder.name)
    if path is None:
        raise CheckpointError(folder, "", "no files that DeepSpeed can load", "its ZeRO shards", _FOREIGN)
    return checked_state(folder, state), read_weights(folder / WEIGHTS)


def checked_state(folder: Path, state: Mapping[str, Any]) -> TrainingState:
    """Check the state of a training, read from a checkpoint that may come from anybody.

    Raises
    ------
    CheckpointError
        If a field is missing or has the wrong type.
    """
    for name in ("step", "consumed"):
        value = state.get(name)
        if type(value) is not int or value < 0:
            raise CheckpointError(folder, name, printable(repr(value))[:60], "a whole number of 0 or more")
    skipped = state.get("skipped")
    if not isinstance(skipped, dict) or type(skipped.get("row")) is not int or "keys" not in skipped:
        raise CheckpointError(folder, "skipped", printable(repr(skipped))[:60], "`keys` and `row` of skipped samples")
    return TrainingState(
        step=state["step"], consumed=state["consumed"], skipped=SkippedState(keys=skipped["keys"], row=skipped["row"])
    )


def read_weights(path: Path, prefix: str = "") -> dict[str, Tensor]:
    """Tensors of a safetensors file with names that start with `prefix`; the prefix is removed."""
    try:
        with safe_open(path, "pt") as file:
            return {
                name.removeprefix(prefix): file.get_tensor(name)
                for name in file.keys()  # noqa: SIM118
                if name.startswith(prefix)
            }
    except Exception as error:
        raise CheckpointError(path, "", f"unreadable ({type(error).__name__})", "a safetensors file") from None
