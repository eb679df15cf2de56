"""Conversions that are killed, run out of space, or meet each other: nothing finished is lost, nothing half there."""

from __future__ import annotations

import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from helpers.commands import GRID, ROOT
from helpers.conversions import contents, pack_into, same
from helpers.kills import Killed, kill_at
from shards.conversion import writer
from shards.core.cli import DONE, RESUME, WRONG
from shards.format import layout

pytestmark = pytest.mark.processes


def test_a_second_conversion_in_the_same_folder_is_refused(command, make_shards, cohort, tmp_path):
    """The first is stopped (SIGSTOP) while it holds the folder; killed, it lets go at once."""
    words = [sys.executable, "tools/make_shards.py", cohort / "cohort.yaml", "--out", tmp_path / "out"]
    words += ["--ranker", "ridge", "--workers", 1, *GRID]
    first = subprocess.Popen([str(word) for word in words], cwd=ROOT, stderr=subprocess.DEVNULL)
    try:
        lock = tmp_path / "out" / layout.WORK / "lock"
        deadline = time.monotonic() + 120
        while not (lock.exists() and lock.read_text()) and first.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        first.send_signal(signal.SIGSTOP)
        second = command(*words[1:])
        assert second.returncode == WRONG
        assert f"process {first.pid} on " in second.stderr and "one conversion at a time" in second.stderr
    finally:
        first.kill()
        first.wait()
    assert make_shards(*words[2 : -len(GRID)]) == DONE


_PAGE = 64 << 20  # bytes for the page and its views, which the fixture does not have


def test_a_full_disk_stops_with_the_run_named_and_loses_nothing(cohort, dataset, tmp_path):
    """A file system of half the size the conversion needs, in a mount namespace of its own."""
    needed = sum(path.stat().st_size for path in dataset.rglob("*") if path.is_file())
    disk = tmp_path / "disk"
    disk.mkdir()
    command = f"{sys.executable} tools/make_shards.py {cohort / 'cohort.yaml'} --out {disk}/out --ranker ridge"
    command += f" --workers 1 {' '.join(map(shlex.quote, GRID))}"
    script = f"""
mount -t tmpfs -o size={needed // 2} tmpfs {disk} || exit 77
{command} 2>{tmp_path}/stderr; echo $? >{tmp_path}/first
ls {disk}/out/work/members >{tmp_path}/kept
mount -o remount,size={needed * 4 + _PAGE} {disk}
{command}; echo $? >{tmp_path}/second
cp -r {disk}/out {tmp_path}/out
"""
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script], cwd=ROOT, env=env)
    if done.returncode == 77 or not (tmp_path / "first").exists():
        pytest.skip("this machine lets nobody mount a small file system")
    assert int((tmp_path / "first").read_text()) == RESUME
    error = (tmp_path / "stderr").read_text().splitlines()[-1]
    assert re.search(r"stopped: no space left in .* for (synthetic_sub-0\d_ses-1_task-rest|the shards)", error)
    assert (tmp_path / "kept").read_text()  # sessions that were finished
    assert int((tmp_path / "second").read_text()) == DONE
    same(tmp_path / "out", dataset)


def children(pid: int) -> list[int]:
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == pid and fields[0] != "Z":
            found.append(int(stat.parent.name))
    return found


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc to see the workers")
def test_killed_at_random_moments_it_goes_on_to_the_same_bytes(cohort, dataset, make_shards, tmp_path):
    out = tmp_path / "out"
    words = ["tools/make_shards.py", cohort / "cohort.yaml", "--out", out, "--ranker", "ridge", "--workers", 2, *GRID]
    rng, workers = random.Random(0), []
    for attempt in range(3):
        process = subprocess.Popen(
            [sys.executable, *map(str, words)],
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        members = out / layout.WORK / "members"
        patience = time.monotonic() + 60
        # wait until there is something to lose, then a random moment more
        while process.poll() is None and time.monotonic() < patience:
            if len(list(members.glob("[!.]*.json"))) > attempt or (out / layout.MANIFEST).exists():
                break
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.3))
        workers += children(process.pid)
        process.kill()
        process.wait()
    assert make_shards(*words[1 : -len(GRID)]) == DONE
    same(out, dataset)
    assert workers
    patience = time.monotonic() + 20
    while any(map(alive, workers)) and time.monotonic() < patience:
        time.sleep(0.05)
    assert not any(map(alive, workers)), "workers outlive the command that was killed"


LONG_WORK = """
import multiprocessing, time
from concurrent.futures import ProcessPoolExecutor
from shards.core.workers import end_with_parent
if __name__ == "__main__":
    pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), end_with_parent)
    print(pool.submit(abs, -1).result(), flush=True)
    pool.submit(time.sleep, 600)
    time.sleep(600)
"""


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc to see the workers")
def test_workers_end_in_the_midst_of_a_run_when_the_command_is_killed(tmp_path):
    (tmp_path / "long_work.py").write_text(LONG_WORK)
    process = subprocess.Popen(
        [sys.executable, tmp_path / "long_work.py"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert process.stdout.readline() == b"1\n"
    workers = children(process.pid)
    assert workers
    process.kill()
    process.wait()
    process.stdout.close()
    patience = time.monotonic() + 10
    while any(map(alive, workers)) and time.monotonic() < patience:
        time.sleep(0.05)
    left = [pid for pid in workers if alive(pid)]
    for pid in left:
        os.kill(pid, 9)
    assert not left


def test_killed_before_any_file_operation_the_old_or_the_new_dataset_is_whole(monkeypatch, tmp_path):
    """All moments of putting a set in place, one after the other, on top of an older set and on an empty folder."""
    for existing in (0, 3):
        start, new = tmp_path / f"start{existing}", tmp_path / f"new{existing}"
        start.mkdir()
        if existing:
            pack_into(start, existing)
        old = contents(start)
        shutil.copytree(start, new)
        with monkeypatch.context() as patch:
            count = kill_at(patch, None)
            pack_into(new, 4)
        expected, total = contents(new), count[0]
        assert total > 10 and expected != old
        whole = []
        for number in range(total):
            folder = tmp_path / f"{existing}-{number}"
            shutil.copytree(start, folder)
            with monkeypatch.context() as patch, pytest.raises(Killed):
                kill_at(patch, number)
                pack_into(folder, 4)
            writer.finish_commit(folder)
            assert contents(folder) in (old, expected), number
            whole.append(contents(folder) == expected)
            pack_into(folder, 4)
            assert contents(folder) == expected
        assert whole == sorted(whole) and True in whole and False in whole  # the new one from some moment on
