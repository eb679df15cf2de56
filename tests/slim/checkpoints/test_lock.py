"""One training at a time in a run's folder, whoever started it."""

from __future__ import annotations

import os
import pickle
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from helpers.commands import ROOT, Command
from helpers.training import losses, metrics, pretrain, ranks_of, settings_of, start, wait_for_lines
from launchers.cluster import attempt
from launchers.job import Told
from launchers.run_setup import prepare_run
from shards.core import flock
from shards.core.errors import ConfigError, Stopped
from slim.checkpoints import lock

pytestmark = pytest.mark.processes

HOLD = """
import sys, time
from slim.checkpoints import lock
with lock.holding(sys.argv[1]):
    print("held", flush=True)
    time.sleep(600)
"""


@contextmanager
def held(folder: Path, **environment: str) -> Iterator[subprocess.Popen]:
    """Another process that holds a run's folder."""
    words = [sys.executable, "-c", HOLD, str(folder)]
    child = subprocess.Popen(words, cwd=ROOT, env={**os.environ, **environment}, stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout is not None and child.stdout.readline() == "held\n"
        yield child
    finally:
        child.kill()
        child.communicate()


def test_whoever_comes_second_is_told_who_holds_the_folder(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with held(run) as first:
        with pytest.raises(ConfigError) as told, lock.holding(run):
            pass
        line = told.value.line()
        assert f"process {first.pid} on {socket.gethostname()} since 20" in line and "\n" not in line
        assert "run.out" in line and "Wait for it or stop it" in line
        first.kill()
        first.wait()
        with lock.holding(run), lock.holding(run / "." / ".." / "run"):
            assert f"process {os.getpid()} on" in (run / lock.LOCK).read_text()
        with lock.holding(run):  # let go of, and held anew
            pass


def test_a_folder_in_which_nothing_was_written_goes_again(tmp_path: Path) -> None:
    with lock.holding(tmp_path / "a" / "run"):
        assert (tmp_path / "a" / "run" / lock.LOCK).exists()
    assert list(tmp_path.iterdir()) == []
    with lock.holding(tmp_path / "a" / "run"):
        (tmp_path / "a" / "run" / "config.yaml").write_text("{}")
    assert {path.name for path in (tmp_path / "a" / "run").iterdir()} == {"config.yaml", lock.LOCK}


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "run"):
        told = pytest.raises(ConfigError, match=r"run\.out: got a folder that cannot be written")
        with told as error, lock.holding(folder):
            pass
        assert "\n" not in error.value.line()


def test_where_nothing_can_be_locked_a_warning_is_logged(tmp_path: Path, monkeypatch, caplog) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(flock.fcntl, "flock", no_locks)
    with lock.holding(tmp_path / "run") as descriptor:
        assert descriptor is None
    assert "lock cannot be locked (No locks available): start no second training there" in caplog.text


def test_a_requeued_job_waits_for_its_former_attempt_and_for_nobody_else(tmp_path: Path, monkeypatch) -> None:
    run, wait = tmp_path / "run", 2.0
    monkeypatch.setattr(lock, "_PATIENCE", wait)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    with held(run, SLURM_JOB_ID="7", SLURM_RESTART_COUNT="0") as former:
        begun = time.monotonic()
        with pytest.raises(Stopped, match=r"still held by process .* \(job 7, attempt 0\)"), lock.holding(run):
            pass
        assert time.monotonic() - begun >= wait
        monkeypatch.setattr(lock, "_PATIENCE", 60.0)
        subprocess.Popen(["sh", "-c", f"sleep 1; kill -9 {former.pid}"])
        with lock.holding(run):
            pass
    for job, restart in (("7", "1"), ("77", "0"), ("8", "0")):
        begun = time.monotonic()
        with held(run, SLURM_JOB_ID=job, SLURM_RESTART_COUNT=restart):
            with pytest.raises(ConfigError, match=f"job {job}, attempt {restart}"), lock.holding(run):
                pass
            assert time.monotonic() - begun < 30


def test_nothing_is_written_to_a_run_that_another_process_trains_in(dataset: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with held(run):
        before = sorted(run.rglob("*"))
        with pytest.raises(ConfigError, match="is training"):
            prepare_run(settings_of(dataset, run))
        assert sorted(run.rglob("*")) == before


def test_a_second_training_is_refused_while_processes_of_the_first_are_left(
    command: Command, dataset: Path, tmp_path: Path
) -> None:
    """Also after its launcher was killed: they save and end, and hold the folder until then."""
    out = tmp_path / "run"
    first = start(dataset, out, steps=100000)
    try:
        wait_for_lines(out, 2, first)
        ranks = ranks_of(out)
        done = pretrain(command, dataset, out, steps=100000)
        assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1
        assert re.search(rf"processes {first.pid} and \d+ on .* since", done.stderr), done.stderr
        for rank in ranks:
            os.kill(rank, signal.SIGSTOP)
        first.kill()
        first.wait()
        done = pretrain(command, dataset, out, steps=100000)
        assert done.returncode == 2 and "is training" in done.stderr
        for rank in ranks:
            os.kill(rank, signal.SIGCONT)
        end = time.monotonic() + 90
        while ranks_of(out) and time.monotonic() < end:
            time.sleep(0.1)
    finally:
        first.kill()
        for rank in ranks_of(out):
            os.kill(rank, signal.SIGKILL)
        first.communicate()
    done = pretrain(command, dataset, out, "run.max_seconds=0.01", steps=100000)
    assert done.returncode == 3, done.stderr
    assert [line["step"] for line in metrics(out)] == list(range(1, len(losses(out)) + 1))


def test_tasks_of_a_cluster_hold_it_and_are_refused(dataset: Path, tmp_path: Path) -> None:
    """As a job's script calls them: `begin`, then `task` in each process, with SLURM's variables."""
    run = tmp_path / "run"
    prepare_run(settings_of(dataset, run, "run.steps=2"))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    slurm = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
    slurm |= {"SLURM_NTASKS": "1", "WORLD_SIZE": "1", "OUTCOME": str(run / "slurm/outcome")}
    slurm |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    (run / "slurm").mkdir()

    def call(*words: str) -> subprocess.CompletedProcess:
        words = (sys.executable, "-m", "launchers.cluster.attempt", *words)
        return subprocess.run(words, cwd=ROOT, env={**os.environ, **slurm}, capture_output=True, text=True, timeout=120)

    assert call("begin", str(run)).returncode == 0
    with held(run):
        assert call("begin", str(run)).returncode == 2
        done = call("task", str(run))
        assert done.returncode == 2, done.stderr
        end = call("end", str(run), "3")
        assert end.stdout == "2\n" and "is training" in end.stderr
    assert call("begin", str(run)).returncode == 0
    assert call("task", str(run)).returncode == 0
    assert "(job 7, attempt 0)" in (run / lock.LOCK).read_text() and len(losses(run)) == 2
    assert attempt.newest_checkpoint(run) == "step-00000002"


def test_a_mistake_that_was_put_into_words_can_be_sent_between_processes() -> None:
    assert pickle.loads(pickle.dumps(Told("a line"))).line() == "a line"
