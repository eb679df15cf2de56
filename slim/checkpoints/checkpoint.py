"""Checkpoints that are complete or absent, whatever is killed and whenever.

    RUN/checkpoints/step-00000100/   ZeRO shards of every process (DeepSpeed's own files)
                                     weights.safetensors   online encoder, target encoder, running means: fp32, whole
                                     config.yaml, dataset.json, seen.json, provenance.json   as in RUN
                                     COMPLETE              written last: step, world size, versions, what the run began
                                                           with, bytes and SHA-256 of all files, and its own
    RUN/checkpoints/latest           name of the newest complete one

DeepSpeed's own `latest` is written without a barrier and can name an incomplete folder, so it is not used. Here every
process writes, flushes and hashes its files, all meet, rank 0 writes COMPLETE, then `latest`. A folder without COMPLETE
does not exist for a load; one whose COMPLETE or files are not what was written is refused by name. When a folder is
removed, COMPLETE goes first.

There is no state of random generators: all that is random is drawn from names (seed, epoch, sample, step).
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
from collections.abc import Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

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

BEST = "best."  # of a fine-tuning, before the tensors of its best epoch
# What a run keeps beside the ZeRO shards: optimizer steps, samples of the stream, what was left out.
STATE = ("step", "consumed", "skipped")
_SEAL = "seal"
_NAME = re.compile(r"step-[0-9]{8}")
_READERS = 4  # files hashed at a time
_FILE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,250}")  # of a file in a checkpoint
_MOST = {"step": 2**53, "world_size": 10**6, "global_batch": 10**7}
_MOST_BYTES = 1 << 26  # of COMPLETE
_FOREIGN = "Copy the checkpoint again from where it was written"


class CheckpointError(UserError, ValueError):
    """A checkpoint that is missing, incomplete, damaged, or of another configuration."""


def tag(step: int) -> str:
    """Folder name of the checkpoint after `step` optimizer steps."""
    return f"step-{step:08d}"


def folders(checkpoints: Path) -> list[Path]:
    """All of them, finished or not, newest first. Other names, such as those of copies, are no checkpoints.

    Where somebody has given a copy the name of another step, the step that was saved counts.
    """
    found = [path for path in checkpoints.glob("step-*") if _NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=lambda folder: (step_of(folder), not _is_copy(folder), folder.name), reverse=True)


def step_of(folder: Path) -> int:
    """The step that COMPLETE says, or the name where there is none."""
    try:
        return int(facts(folder)["step"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return _named_step(folder)


def _named_step(folder: Path) -> int:
    return int(folder.name[len("step-") :])


def _is_copy(folder: Path) -> bool:
    """Whether a folder holds the checkpoint of another step than its name says: somebody has copied it."""
    return folder.is_dir() and step_of(folder) != _named_step(folder)


def fault(folder: Path, files: Collection[str] | None = None) -> CheckpointError | None:
    """What is wrong with a checkpoint; None if it is as it was written.

    Parameters
    ----------
    folder : Path
    files : collection of str, optional
        Files whose bytes are compared with what was written, too; by default all of them. Of all others the size is.
    """
    path = folder / COMPLETE
    try:
        if path.stat().st_size > _MOST_BYTES:
            return CheckpointError(path, "", "a file that is too large", f"at most {_MOST_BYTES} bytes")
        about = json.loads(path.read_text(encoding="utf-8"))
        sealed = about.pop(_SEAL) == _seal(about)
        sizes, hashes = about["files"], about["sha256"]
        if sealed and (wrong := _wrong_facts(about)):
            return CheckpointError(path, wrong, "a value that no run writes", "facts of a checkpoint", _FOREIGN)
    except FileNotFoundError:
        return CheckpointError(path, "", "no such file", "the file that is written last: the checkpoint is incomplete")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        sealed = False
    if not sealed:
        return CheckpointError(path, "", "other bytes than were written (or an earlier version's)", "an intact file")
    for name, size in sorted(sizes.items()):
        try:
            about_file = (folder / name).stat()
            found = about_file.st_size
            if not stat.S_ISREG(about_file.st_mode):
                return CheckpointError(folder / name, "", "no regular file", f"a file of {size} bytes", _FOREIGN)
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
    """The first field of COMPLETE that no run writes. Its seal needs no key, so anybody may have made it."""
    sizes, hashes = about["files"], about["sha256"]
    if not (isinstance(sizes, dict) and isinstance(hashes, dict) and sizes.keys() == hashes.keys()):
        return "files"
    for name, size in sizes.items():  # a name with a folder in it would lead a copy to another place
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
    """Whether COMPLETE is there and every file it names is there with its size."""
    return fault(folder, ()) is None


def newest(checkpoints: Path) -> Path | None:
    """The newest complete checkpoint, or None; the bytes of its files are not looked at."""
    return newest_intact(checkpoints, ())[0]


def facts(folder: Path) -> dict[str, Any]:
    """What COMPLETE says."""
    return json.loads((folder / COMPLETE).read_text(encoding="utf-8"))


def save(
    engine: Any,
    checkpoints: Path,
    step: int,
    state: dict[str, Any],
    weights: dict[str, Tensor],
    origin: dict[str, Any],
) -> Path:
    """Write a checkpoint; every process calls it.

    Parameters
    ----------
    engine : DeepSpeed engine
    checkpoints : Path
        Inside the run's folder.
    step : int
        Optimizer steps done.
    state : dict
        What `STATE` names: kept beside the ZeRO shards and returned by `load`.
    weights : dict of str to Tensor
        Whole tensors for `weights.safetensors`; used on rank 0.
    origin : dict
        JSON-able facts for COMPLETE: what the run began with.

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
        # Each process flushes what it wrote: on a network file system nobody else's fsync would.
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
    """Stop with a word, and without what was written, where a file system has no room for so many bytes.

    Any other exception passes, and leaves the folder as it is.
    """
    try:
        yield
    except Exception as error:
        if not is_full(error) and not (_keeps_no_errno(error) and not has_room(folder, size)):
            raise
        remove(folder)
        raise Stopped(
            f"no space left for {folder}",
            "make room, or set run.keep lower: the same command continues from the last complete checkpoint",
        ) from error


def _keeps_no_errno(error: Exception) -> bool:
    """Whether an error is of torch's or safetensors' writers, which tell of a full file system in words alone."""
    return type(error) is RuntimeError or isinstance(error, SafetensorError)


def _written_by(rank: int, folder: Path) -> Iterator[str]:
    """Files of a checkpoint that this process wrote: its ZeRO shards, and on rank 0 all that are nobody's shards."""
    for path in sorted(folder.iterdir()):
        if path.name.startswith(f"zero_pp_rank_{rank}_") or (rank == 0 and not path.name.startswith("zero_pp_rank_")):
            yield path.name


def _measured(folder: Path, names: Iterable[str], flush: bool = False) -> Iterator[tuple[int, str]]:
    """Bytes and SHA-256 of files, some at a time."""

    def measure(name: str) -> tuple[int, str]:
        with open(folder / name, "rb") as file:
            if flush:
                os.fsync(file.fileno())
            return os.fstat(file.fileno()).st_size, hashlib.file_digest(file, "sha256").hexdigest()

    with ThreadPoolExecutor(_READERS) as pool:
        yield from pool.map(measure, names)


def seal(folder: Path, facts: dict[str, Any], measured: dict[str, tuple[int, str]] | None = None) -> None:
    """Write COMPLETE: from now on the checkpoint is there.

    Parameters
    ----------
    folder : Path
    facts : dict
        JSON-able; the world size and the versions of what wrote the files are added.
    measured : dict, optional
        Bytes and SHA-256 of every file, by name; if it is not given the files are read.
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


def _seal(about: dict[str, Any]) -> str:
    return hashlib.sha256(dump(about).encode()).hexdigest()


def remove(folder: Path) -> None:
    """Remove a checkpoint, or what there is of one: COMPLETE first, so that a kill leaves none that looks finished."""
    (folder / COMPLETE).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def prune(checkpoints: Path, keep: int, every: int | None, spared: Collection[Path] = ()) -> None:
    """Remove all but the newest `keep` complete checkpoints and those of every `every`-th step.

    Incomplete and damaged ones go, too; `spared` ones stay, and so do copies and links that somebody made. The newest
    complete one is that which `latest` names: what is newer was refused when the run went on.
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
    """Copy a checkpoint into another folder of checkpoints, complete or absent there, too.

    Returns
    -------
    Path
        The copy. An intact one that is there already is left as it is.

    Raises
    ------
    CheckpointError
        If the files are not, or do not arrive as, what was written.
    OSError
        If there is no room, or no access.
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
            raise CheckpointError(folder / name, "SHA-256", digest, about["sha256"][name], "It is damaged, or its copy")
    sync_folder(target)
    write_atomically(target / COMPLETE, (folder / COMPLETE).read_bytes())
    write_atomically(checkpoints / LATEST, target.name + "\n")
    return target


def newest_intact(checkpoints: Path, files: Collection[str] | None = None) -> tuple[Path | None, list[CheckpointError]]:
    """The newest checkpoint that is as it was written; and what is wrong with those passed over.

    Folders without COMPLETE, which a kill left behind, do not count. `files` as in `fault`.
    """
    refused: list[CheckpointError] = []
    for folder in folders(checkpoints):
        if (folder / COMPLETE).exists():
            found = fault(folder, files)
            if found is None:
                return folder, refused
            refused.append(found)
    return None, refused


def load(engine: Any, folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Restore the engine from a checkpoint of as many processes (at ZeRO stage 0 of any number), by DeepSpeed's load.

    Returns its state and whole weights.
    """
    from slim.checkpoints import zero_states

    with zero_states.read_by(engine):
        path, state = engine.load_checkpoint(str(folder.parent), tag=folder.name)
    if path is None:
        raise CheckpointError(folder, "", "nothing DeepSpeed could load", "its ZeRO shards")
    return checked_state(folder, state), read_weights(folder / WEIGHTS)


def checked_state(folder: Path, state: dict[str, Any]) -> dict[str, Any]:
    """What `STATE` names, of a checkpoint that anybody may have written.

    Raises
    ------
    CheckpointError
        If a number is missing, or is none.
    """
    for name in ("step", "consumed"):
        value = state.get(name)
        if type(value) is not int or value < 0:
            raise CheckpointError(folder, name, printable(repr(value))[:60], "a whole number of 0 or more")
    skipped = state.get("skipped")
    if not isinstance(skipped, dict) or type(skipped.get("row")) is not int or "keys" not in skipped:
        raise CheckpointError(folder, "skipped", printable(repr(skipped))[:60], "keys and row of what was left out")
    return {name: state[name] for name in STATE}


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
