"""Jobs of the tests: the commands as a user calls them, and runs that go as slowly as a test needs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from helpers.commands import ROOT
from helpers.hooks import at_each_step
from helpers.training import QUICK, TINY
from slurm.cluster import Cluster

# PACE has seconds to wait after each step, one number per attempt of the job (the last one for all that follow); `kill`
# ends the process at its first step.
_PACER = """
paces = os.environ["PACE"].split()
pace = paces[min(int(os.environ.get("SLURM_RESTART_COUNT", 0)), len(paces) - 1)]
if pace == "kill":
    os.kill(os.getpid(), 9)
time.sleep(float(pace))
"""


def slurm(cluster: Cluster, *words: object, timeout: float = 300, **environment: str) -> subprocess.CompletedProcess:
    """launchers/slurm.py, as a user calls it on this cluster."""
    env = {**cluster.environment, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **environment}
    return subprocess.run(
        [sys.executable, "launchers/slurm.py", *map(str, words)],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def paced(folder: Path, pace: str) -> dict[str, str]:
    """Environment of a run that waits after each step."""
    hook = at_each_step(folder, _PACER)
    return hook | {"PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)]), "PACE": pace}


def pretrain_words(dataset: Path, out: Path, *words: object, steps: int = 6) -> list[object]:
    return [
        "pretrain",
        TINY,
        f"data={dataset}",
        f"run.out={out}",
        f"run.steps={steps}",
        *QUICK,
        "run.workers=1",
        *words,
    ]


def submit(cluster: Cluster, dataset: Path, out: Path, *words: object, steps: int = 6, **environment: str) -> str:
    """Submit a run; the number of its job."""
    done = slurm(cluster, *pretrain_words(dataset, out, *words, "--json", steps=steps), **environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])["job"]


def lines_of(out: Path) -> int:
    path = out / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def attempts(out: Path, event: str) -> list[dict]:
    path = out / "slurm" / "attempts.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [line for line in lines if line["event"] == event]


def wait_for_lines(cluster: Cluster, out: Path, count: int) -> None:
    cluster.wait(lambda: lines_of(out) >= count, 180, f"{count} steps of {out}")


def wait_for_end(cluster: Cluster, job: str, seconds: float = 300) -> str:
    """The state in which a job stays."""
    over = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT")
    cluster.wait(lambda: cluster.job(job) in over, seconds, f"end of job {job}")
    return cluster.job(job)


def log_of(out: Path, job: str) -> str:
    return (out / "slurm" / f"{job}.log").read_text()
