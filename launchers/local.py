"""A run on this machine: one process per rank, watched until all have ended."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from launchers import environment, job
from launchers.run_setup import prepare_run
from shards.core.cli import RESUME, STOPPING
from slim.checkpoints import lock
from slim.config import TrainSettings

_GRACE = 10.0  # seconds the other processes get to say why they cannot go on, once one has failed


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
                    **environment.with_packages(environment.without_launchers()),
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
