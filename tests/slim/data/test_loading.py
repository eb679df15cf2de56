"""Loading processes: a scheduler's signals do not end them, the death of the one they load for does."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import uuid

import psutil
import pytest

from helpers.commands import ROOT

# Trains on numbers: prints one, waits for a word, and so on.
_TRAINS = """
import signal, sys
from torch.utils.data import DataLoader
from slim.data import loader
from shards.core.cli import STOPPING
from shards.core.workers import end_with_parent

for number in STOPPING:
    signal.signal(number, lambda *_: None)
numbers = DataLoader(range(10**6), batch_size=None, num_workers=1, multiprocessing_context=loader.context(),
                     worker_init_fn=end_with_parent)
for number in numbers:
    print(int(number), flush=True)
    if not sys.stdin.readline():
        break
"""


def processes_of(mark: str) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("MARK") == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (psutil.Error, OSError):
            continue
    return found


@pytest.mark.parametrize("end", ["killed", "done"])
def test_they_outlive_signals_but_not_their_process(end: str) -> None:
    mark = uuid.uuid4().hex
    child = subprocess.Popen(
        [sys.executable, "-c", _TRAINS],
        cwd=ROOT,
        env={**os.environ, "MARK": mark, "OMP_NUM_THREADS": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdin is not None and child.stdout is not None
    assert child.stdout.readline() == "0\n"
    assert len(processes_of(mark)) >= 3  # itself, the server, a worker
    for number in (signal.SIGUSR2, signal.SIGTERM):
        for process in processes_of(mark):
            process.send_signal(number)
    for expected in range(1, 20):  # more than were loaded ahead
        child.stdin.write("\n")
        child.stdin.flush()
        assert child.stdout.readline() == f"{expected}\n"
    if end == "killed":
        child.kill()
    child.communicate(timeout=60)
    deadline = time.monotonic() + 60
    while left := processes_of(mark):
        assert time.monotonic() < deadline, [process.cmdline() for process in left]
        time.sleep(0.1)
