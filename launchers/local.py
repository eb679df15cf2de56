"""A run on this machine: one process per rank, watched until all have ended."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import yaml

from launchers import environment, job
from shards.core.cli import RESUME, STOPPING
from shards.core.errors import ConfigError
from shards.core.files import dump, write_atomically
from shards.format.layout import EXTRACTOR
from shards.format.reader import Dataset
from slim.checkpoints import checkpoint, lock
from slim.checkpoints.mirror import at_a_glance
from slim.config import TrainSettings
from slim.ranking.extractor import CONFIG_FILE, WEIGHTS_FILE
from slim.training import compatibility

S = TypeVar("S", bound=TrainSettings)
_GRACE = 10.0  # seconds the other processes get to say why they cannot go on, once one has failed


def prepare_run(settings: TrainSettings) -> Path:
    """Make the run folder; write the merged configuration (with versions and the git commit), what the data are and who
    is seen in them.

    The temporal extractor of the data is copied: with it NIfTI runs are ranked as they were, wherever the data go.

    `slim.training.compatibility` decides what a run may be resumed with; each configuration it was trained with stays
    in RUN/configs.

    Returns
    -------
    Path
        RUN/config.yaml

    Raises
    ------
    UserError
        If the folder holds a run that these settings cannot go on with, or any run where `run.resume` is `never`, or
        another process trains in it. The run is then left as it is.
    """
    folder = Path(settings.run.out)
    for place, name in ((settings.run.out, "run.out"), (settings.run.mirror, "run.mirror")):
        if settings.run.resume == "never" and place is not None and (Path(place) / "config.yaml").exists():
            raise ConfigError(
                place,
                "run.resume",
                "never, but the folder holds a run",
                "an empty folder",
                f"Use run.resume=auto to go on, or another {name}",
            )
    with lock.holding(folder):
        return _prepare(folder, settings)


def _prepare(folder: Path, settings: TrainSettings) -> Path:
    begun = at_a_glance(folder, None if settings.run.mirror is None else Path(settings.run.mirror))
    settings = compatibility.begin(settings) if begun is None else _adopt(begun, settings)
    changes = [] if begun is None else [str(change) for change in compatibility.changes(begun, settings)]
    task = job.open_task(settings)
    if begun is not None:
        origin = task.origin(settings.run.processes)
        origin.check(begun)
        compatibility.extended(begun, settings, task.stream.per_epoch, settings.run.processes)
        for line in origin.unknown(begun):
            print(f"warning: {line}", flush=True)
        for change in changes:
            print(f"changed: {change}", flush=True)
    versions = {name: version(name) for name in ("torch", "deepspeed", "numpy", "zarr")}
    note = "".join(f"# {name} {number}\n" for name, number in sorted(versions.items()))
    manifest = task.datasets[0].manifest
    write_atomically(
        folder / "dataset.json", dump({name: value for name, value in manifest.items() if name != "shards"})
    )
    if (seen := task.seen()) is not None:
        seen.write(folder)
    for line in task.too_short():
        print(f"warning: {line}", flush=True)
    _keep_extractor(task.datasets[0], folder)
    text = yaml.safe_dump(json.loads(settings.model_dump_json()), sort_keys=False)
    text = f"# merged configuration\n# commit {git_commit()}\n{note}{text}"
    compatibility.keep(folder, text, begun, changes)
    write_atomically(folder / "config.yaml", text)
    return folder / "config.yaml"


def _keep_extractor(dataset: Dataset, folder: Path) -> None:
    """Copy a dataset's extractor, if it has one, into a run; its config.json, which seals it, is the last file."""
    for name in (WEIGHTS_FILE, CONFIG_FILE):
        source = dataset.folder / EXTRACTOR / name
        if not (folder / EXTRACTOR / CONFIG_FILE).exists() and source.is_file():
            write_atomically(folder / EXTRACTOR / name, source.read_bytes())


def _adopt(begun: Path, settings: S) -> S:
    """`compatibility.adopt`, saying so where the micro-batches of a step change."""
    adopted = compatibility.adopt(begun, settings)
    if adopted.run.accumulate != settings.run.accumulate:
        total = checkpoint.facts(begun)["global_batch"]
        print(
            f"run.accumulate={adopted.run.accumulate} instead of {settings.run.accumulate}: "
            f"the run goes on with {total} samples per step",
            flush=True,
        )
    return adopted


def git_commit(source: Path = Path(__file__)) -> str:
    """The commit of this software, with `+` if its files have changes; `unknown` where git does not track them.

    A package that is installed inside somebody's repository, say in an environment of a study, is no part of it: the
    commit of that repository would say nothing about this software.

    Parameters
    ----------
    source : Path
        A file of the software, one folder below its root.
    """
    source = source.resolve()
    # Git would otherwise look at the repository that these name, as they do while one of its hooks runs.
    without_git = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}

    def git(*words: str) -> str:
        command = ["git", "-C", str(source.parent), *words]
        return subprocess.run(
            command, capture_output=True, text=True, timeout=20, check=True, env=without_git
        ).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", "--", source.name)
        changes = git("status", "--porcelain", "--untracked-files=no", "--", str(source.parents[1]))
        return git("rev-parse", "HEAD") + ("+" if changes else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def train(settings: TrainSettings) -> dict[str, Any]:
    """Make the run folder and run all processes of the run; no other process trains in it meanwhile.

    Returns and raises as `prepare_run` and `run`.
    """
    with lock.holding(settings.run.out):
        return run(prepare_run(settings), settings.run.processes)


def run(config: Path, processes: int) -> dict[str, Any]:
    """Run all processes of a job on this machine and wait for them.

    A signal to this process is passed on once; each process then stops at its next step boundary. When one fails, the
    others cannot go on and are ended after a short while.

    Returns and raises as `launchers.job.judge`.
    """
    with lock.holding(config.parent) as held, tempfile.TemporaryDirectory() as outcome:
        cores = len(os.sched_getaffinity(0))
        common = {
            "WORLD_SIZE": str(processes),
            # They meet by a file in a folder of this user alone, so nothing listens for them, and speak by loopback.
            job.STORE: str(Path(outcome) / "store"),
            "MASTER_ADDR": "127.0.0.1",  # for DeepSpeed, which looks for an MPI launcher where it is not set
            "MASTER_PORT": "0",
            **_loopback(),
            "OUTCOME": outcome,
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, cores // processes))),
        }
        common |= {name: value for name, value in job.KEEP_FREED.items() if name not in os.environ}
        # Rank 0 holds the lock, too: it may outlive this process.
        handed_on = {lock.HANDED_ON: "" if held is None else str(held)}
        children = [
            subprocess.Popen(
                [sys.executable, "-m", "launchers.job", str(config)],
                start_new_session=True,
                env={
                    **environment.without_launchers(),
                    **common,
                    "RANK": str(rank),
                    "LOCAL_RANK": str(rank),
                    **({} if rank else handed_on),
                },
                pass_fds=() if rank or held is None else (held,),
            )
            for rank in range(processes)
        ]
        handlers = {
            number: signal.signal(number, lambda received, _: _pass_on(children, received)) for number in STOPPING
        }
        try:
            _wait(children, Path(outcome))
        finally:
            codes = {rank: child.poll() for rank, child in enumerate(children)}
            for number, handler in handlers.items():
                signal.signal(number, handler)
            for child in children:
                if child.poll() != 0:
                    _end_group(child)
        ended = {rank: code for rank, code in codes.items() if code is not None}
        return job.judge(Path(outcome), processes, ended, config.parent)


def _pass_on(children: list[subprocess.Popen], number: int) -> None:
    for child in children:
        if child.poll() is None:
            child.send_signal(number)


def _end_group(child: subprocess.Popen) -> None:
    """End a process and those it started: the loading processes of a killed one may outlive it."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def _wait(children: list[subprocess.Popen], outcome: Path) -> None:
    """Until all have ended; once one ended without finishing, the others get a while and are then killed."""
    failed_at = None
    while any(child.poll() is None for child in children):
        ended = [rank for rank, child in enumerate(children) if child.poll() is not None]
        if failed_at is None and any(job.outcome(outcome, rank).get("status") not in (0, RESUME) for rank in ended):
            failed_at = time.monotonic()
        if failed_at is not None and time.monotonic() - failed_at > _GRACE:
            return
        time.sleep(0.1)


def _loopback() -> dict[str, str]:
    """What has gloo and NCCL exchange by the loopback interface; nothing where it has another name."""
    if "lo" not in (name for _, name in socket.if_nameindex()):
        return {}
    return {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}
