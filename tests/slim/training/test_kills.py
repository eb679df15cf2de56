"""A run that is killed at random moments and started again: the numbers of one that was not, every sample once."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shlex
import signal
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path

import psutil
import pytest
import torch

from helpers.commands import ROOT, Command
from helpers.hooks import at_each_step
from helpers.training import QUICK, TINY, losses, metrics, pretrain, ranks_of, weights
from shards.format.reader import Dataset
from shards.format.stream import Stream

pytestmark = pytest.mark.processes

# Writes down which samples a process has trained on, and in which step.
RECORDER = """
with open(f"{os.environ['RECORD']}/{os.getpid()}.jsonl", "a") as file:
    file.write(json.dumps([number, int(os.environ["RANK"]), keys]) + "\\n")
"""


def start(dataset: Path, out: Path, record: Path, steps: int) -> subprocess.Popen:
    env = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "RECORD": str(record), **at_each_step(record, RECORDER)}
    words = [f"data={dataset}", f"run.out={out}", "run.processes=2", f"run.steps={steps}", *QUICK, "run.workers=1"]
    return subprocess.Popen(
        [sys.executable, "tools/pretrain.py", TINY, *words, "run.checkpoint_every=1", "run.keep=2", "--json"],
        cwd=ROOT,
        env={**os.environ, **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def logged(out: Path) -> int:
    path = out / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def victim(child: subprocess.Popen, out: Path, rng: random.Random) -> int | None:
    """The launcher, one of its processes, or one of those that load for them."""
    ranks, loading = ranks_of(out), []
    for rank in ranks:
        with contextlib.suppress(psutil.NoSuchProcess):  # they are forked by a server, which is a rank's child
            loading += [p.pid for p in psutil.Process(rank).children(recursive=True) if p.ppid() != rank]
    pools = [pool for pool in ([child.pid], ranks, ranks, loading) if pool]
    return rng.choice(rng.choice(pools)) if ranks else None


def consumed(record: Path) -> dict[int, list[str]]:
    """Keys that all processes have trained on, by step. A step that was done again was done on the same."""
    found: dict[tuple[int, int], list[str]] = {}
    for path in record.glob("*.jsonl"):
        for text in path.read_text().splitlines():
            try:
                step, rank, keys = json.loads(text)
            except ValueError:
                continue  # cut by the kill: the step was not finished
            assert found.setdefault((step, rank), keys) == keys
    steps: dict[int, list[str]] = defaultdict(list)
    for step, rank in sorted(found):
        steps[step] += found[step, rank]
    return steps


@pytest.mark.parametrize(("kills", "steps"), [(3, 16), pytest.param(20, 100, marks=pytest.mark.slow)])
def test_killed_at_random_moments_it_is_the_run_that_was_not(
    dataset: Path, tmp_path: Path, kills: int, steps: int
) -> None:
    """kill -9 of the launcher, a rank or a loading process, mostly while a checkpoint is written: one a step."""
    child = start(dataset, tmp_path / "whole", tmp_path / "record-whole", steps)
    _, stderr = child.communicate(timeout=600)
    assert child.returncode == 0, stderr
    took = sorted(line["seconds"] for line in metrics(tmp_path / "whole"))[steps // 2]

    out, record, rng, done = tmp_path / "run", tmp_path / "record", random.Random(0), 0
    for _ in range(4 * kills):
        child = start(dataset, out, record, steps)
        before, end = logged(out), time.monotonic() + 240
        # Once it has gone on (and now and then before), a random moment of the next steps.
        wanted = before + rng.choice([0, 1, 1, 2])
        while child.poll() is None and not (logged(out) >= wanted and ranks_of(out)) and time.monotonic() < end:
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 4 * took))
        pid = victim(child, out, rng) if child.poll() is None else None
        if pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
                done += 1
        _, stderr = child.communicate(timeout=240)
        gone = time.monotonic() + 90  # processes whose launcher was killed save and end
        while ranks_of(out):
            assert time.monotonic() < gone, "processes of the run are left"
            time.sleep(0.05)
        assert child.returncode in (0, 3, -signal.SIGKILL), stderr
        if done >= kills or child.returncode == 0:
            break
    assert done >= kills, "the run ended before it was killed as often as asked for"
    child = start(dataset, out, record, steps)
    stdout, stderr = child.communicate(timeout=600)
    assert child.returncode == 0, stderr
    assert json.loads(stdout.splitlines()[-1])["finished"]

    assert losses(out) == losses(tmp_path / "whole")
    assert [line["step"] for line in metrics(out)] == list(range(1, steps + 1))
    assert all(torch.equal(value, weights(tmp_path / "whole")[name]) for name, value in weights(out).items())
    steps_run, steps_whole = consumed(record), consumed(tmp_path / "record-whole")
    assert steps_run == steps_whole and sorted(steps_run) == list(range(1, steps + 1))
    # Every epoch is a stretch of the stream: each session in it once.
    trained = [key for step in sorted(steps_run) for key in steps_run[step]]
    sessions = sorted(session.key for session in Dataset(dataset).of_split("train"))
    size = Stream([Dataset(dataset)], [1.0], "train", 0).per_epoch
    assert size == len(sessions) and len(trained) == 4 * steps
    for first in range(0, len(trained) - size + 1, size):
        assert sorted(trained[first : first + size]) == sessions


def test_a_process_that_dies_at_the_start_does_not_leave_the_others_waiting(
    command: Command, dataset: Path, tmp_path: Path
) -> None:
    child = start(dataset, tmp_path / "run", tmp_path / "record", 1000)
    end = time.monotonic() + 120
    while len(ranks_of(tmp_path / "run")) < 2 and time.monotonic() < end:
        time.sleep(0.005)
    os.kill(ranks_of(tmp_path / "run")[1], signal.SIGKILL)
    _, stderr = child.communicate(timeout=120)
    assert child.returncode == 3 and "continues from the last complete checkpoint" in stderr
    assert not ranks_of(tmp_path / "run")


def test_a_full_disk_stops_with_a_word_and_loses_nothing(command: Command, dataset: Path, tmp_path: Path) -> None:
    """A file system with room for one checkpoint, in a mount namespace of its own; then one with room for more."""
    whole = tmp_path / "whole"
    done = pretrain(command, dataset, whole, steps=3)
    assert done.returncode == 0, done.stderr
    room = sum(path.stat().st_size for path in (whole / "checkpoints").rglob("*") if path.is_file()) * 5 // 4
    disk = tmp_path / "disk"
    disk.mkdir()
    words = [TINY, f"data={dataset}", f"run.out={disk}/run", "run.processes=2", "run.steps=3", *QUICK]
    train = f"{sys.executable} tools/pretrain.py {' '.join(map(shlex.quote, words))} run.checkpoint_every=1"
    script = f"""
mount -t tmpfs -o size={room} tmpfs {disk} || exit 77
{train} 2>{tmp_path}/stderr; echo $? >{tmp_path}/first
mount -o remount,size={5 * room} {disk}
{train}; echo $? >{tmp_path}/second
cp -r {disk}/run {tmp_path}/run
"""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script], cwd=ROOT, env=env)
    if done.returncode == 77 or not (tmp_path / "first").exists():
        pytest.skip("this machine lets nobody mount a small file system")
    assert int((tmp_path / "first").read_text()) == 3
    lines = (tmp_path / "stderr").read_text().splitlines()
    assert "stopped: process" in lines[-1] and "no space left for" in lines[-1] and "step-00000002" in lines[-1]
    assert not any("Traceback" in line for line in lines)
    assert int((tmp_path / "second").read_text()) == 0
    assert losses(tmp_path / "run") == losses(whole)
    assert all(torch.equal(value, weights(whole)[name]) for name, value in weights(tmp_path / "run").items())
