"""Runs on this machine: start one process per rank and wait until all have ended."""

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

from launchers import environment, job
from launchers.outcome import Outcome
from launchers.run_setup import prepare_run
from shards.core.cli import DONE, RESUME, STOPPING
from slim.checkpoints import lock
from slim.config import TrainSettings
from slim.training.result import TrainingResult

_GRACE = 10.0  # seconds that the other processes have to report their errors after one has failed


def train(settings: TrainSettings) -> TrainingResult:
    """Make the run folder and train in it, holding its lock.

    Returns what `run` returns, and raises what `prepare_run` and `run` raise.
    """
    with lock.holding(settings.run.out):
        return run(prepare_run(settings), settings.run.processes)


def run(config: Path, processes: int) -> TrainingResult:
    """Run all processes of a run on this machine and wait for them.

    A signal to this process is passed on to them, and each stops after its current step. If one fails, the others are
    ended after a short time.

    Returns and raises as `launchers.job.judge` does.
    """
    with lock.holding(config.parent) as held, tempfile.TemporaryDirectory() as outcome:
        cores = len(os.sched_getaffinity(0))
        common = {
            "WORLD_SIZE": str(processes),
            # The processes connect by a file in a private folder, so no port is opened, and communicate by loopback.
            job.STORE: str(Path(outcome) / "store"),
            "MASTER_ADDR": "127.0.0.1",  # without it, DeepSpeed looks for an MPI launcher
            "MASTER_PORT": "0",
            **_loopback(),
            "OUTCOME": outcome,
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, cores // processes))),
        }
        common |= {name: value for name, value in job.KEEP_FREED.items() if name not in os.environ}
        # Rank 0 holds the lock, too, because it may outlive this process.
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
    """Kill a process and those it started; loading processes may outlive a killed process."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def _wait(children: list[subprocess.Popen], outcome: Path) -> None:
    """Wait until all processes have ended, or until `_GRACE` seconds after one of them failed."""
    failed_at = None
    while any(child.poll() is None for child in children):
        ended = [rank for rank, child in enumerate(children) if child.poll() is not None]
        ends = [Outcome.read(outcome, rank) for rank in ended]
        if failed_at is None and any(end is None or end.status not in (DONE, RESUME) for end in ends):
            failed_at = time.monotonic()
        if failed_at is not None and time.monotonic() - failed_at > _GRACE:
            return
        time.sleep(0.1)


def _loopback() -> dict[str, str]:
    """Variables with which gloo and NCCL use the loopback interface; empty if it is not named `lo`."""
    if "lo" not in (name for _, name in socket.if_nameindex()):
        return {}
    return {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}
