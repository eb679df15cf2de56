"""Machines that lack what others have: short paths of temporary files, shared memory, UTF-8, a reader of stdout.

Small file systems are mounted for the time of a test, in mounts of its own (`unshare`), where this user may.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from loads import Numbers, as_tensor, dies, refuses, waits
from test_pretrain import QUICK, TINY, losses

from shards.errors import DatasetError, Stopped
from shards.stream import MicroBatches
from slim import loading

ENVIRONMENT = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
mounts = pytest.mark.skipif(
    shutil.which("unshare") is None
    or subprocess.run(["unshare", "--mount", "mount", "-t", "tmpfs", "none", "/mnt"], capture_output=True).returncode
    != 0,
    reason="this user may mount nothing here",
)


def train(dataset: Path, out: Path, *words: str, steps: int = 3, before: str = "", **environment: str):
    """Pretrain in a shell of its own, after lines of it; 1 process with a loading process."""
    given = [f"data={dataset}", f"run.out={out}", f"run.steps={steps}", "run.processes=1", *QUICK, "run.workers=1"]
    command = [sys.executable, "tools/pretrain.py", TINY, *given, *words, "--json"]
    return subprocess.run(
        ["bash", "-c", f'{before}\nexec "$@"', "bash", *command],
        cwd=ROOT,
        env={**os.environ, **ENVIRONMENT, **environment},
        capture_output=True,
        text=True,
        timeout=180,
    )


def micro_batches(load: Callable, consumed: int = 0) -> MicroBatches:
    return MicroBatches(Numbers(), load, 2, count=4, consumed=consumed)  # type: ignore[arg-type]


@pytest.mark.parametrize("count", [0, 2])
@pytest.mark.parametrize("free", [0, 1 << 40])
def test_batches_are_the_same_whichever_way_they_come(count: int, free: int, monkeypatch) -> None:
    monkeypatch.setattr(loading, "free_shared_memory", lambda: free)
    found = [batch.tolist() for batch in loading.Loader(micro_batches(as_tensor), count)]
    assert found == [[0, 1], [2, 3], [4, 5], [6, 7]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.int32, torch.float32, torch.bool])
def test_bytes_give_back_tensors(dtype: torch.dtype) -> None:
    x = torch.arange(6).to(dtype).reshape(2, 3).T
    (back,) = loading.received(loading.Sent(lambda items: [x], "bytes")([]))
    assert back.dtype == dtype and torch.equal(back, x)
    back[0] = 0  # writable, without a warning


@pytest.mark.parametrize("count", [0, 1])
def test_what_a_loading_process_refuses_arrives_as_it_was(count: int) -> None:
    with pytest.raises(DatasetError, match=r"^data: field: got this, expected that. Do it$"):
        next(loading.Loader(micro_batches(refuses, consumed=2), count))
    with pytest.raises(Stopped, match=r"^the dataset is away$"):
        next(loading.Loader(micro_batches(refuses), count))


def test_a_loading_process_that_dies_before_its_first_batch_is_told_in_words() -> None:
    with pytest.raises(Stopped, match=r"^a loading process died .*out of memory.*lower run.workers"):
        next(loading.Loader(micro_batches(dies), 1))


def test_a_signal_is_heard_while_waiting_for_data(monkeypatch) -> None:
    monkeypatch.setitem(loading._GRACE, "SIGTERM", 0.1)
    begun, said = time.monotonic(), None
    loader = loading.Loader(micro_batches(waits), 1, lambda: said)
    monkeypatch.setattr(loading, "_PATIENCE", 4.0)
    with pytest.raises(Stopped, match="no batch came in"):
        next(loader)
    said = "SIGTERM"
    with pytest.raises(Stopped, match="SIGTERM came while waiting for data"):
        next(loader)
    assert time.monotonic() - begun < 60


def test_without_semaphores_batches_are_loaded_all_the_same(monkeypatch) -> None:
    monkeypatch.setattr(loading, "why_no_workers", lambda: "no semaphores")
    told: list[str] = []
    found = [batch.tolist() for batch in loading.Loader(micro_batches(as_tensor), 2, warn=told.append)]
    assert found[3] == [6, 7]
    assert told == ["no semaphores Batches are loaded by the training process itself, which takes longer"]


@pytest.fixture(scope="module")
def plain(dataset: Path, tmp_path_factory) -> list[float]:
    """Losses of a run of three steps where nothing is lacking."""
    out = tmp_path_factory.mktemp("plain") / "run"
    done = train(dataset, out)
    assert done.returncode == 0, done.stdout + done.stderr
    return losses(out)


@mounts
@pytest.mark.parametrize("how", ["-o size=64k", "-o size=64k,ro"])
def test_shared_memory_that_is_small_or_cannot_be_written(how: str, dataset, plain, tmp_path) -> None:
    inside = f'mount -t tmpfs {how} none /dev/shm && exec "$@"'
    done = train(dataset, tmp_path / "run", before=f"exec unshare --mount bash -c '{inside}' bash \"$@\"")
    assert done.returncode == 0, done.stdout + done.stderr
    assert losses(tmp_path / "run") == plain
    assert ("Batches are loaded by the training process itself" in done.stdout) == ("ro" in how)


def test_a_long_path_of_temporary_files(dataset, plain, tmp_path) -> None:
    long = tmp_path / ("t" * (113 - len(str(tmp_path)))) if len(str(tmp_path)) < 100 else tmp_path / "t" * 40
    long.mkdir()
    before = {path.name for path in Path("/tmp").glob("pymp-*")}
    done = train(dataset, tmp_path / "run", TMPDIR=str(long))
    assert done.returncode == 0, done.stdout + done.stderr
    assert losses(tmp_path / "run") == plain
    assert not list(long.iterdir()) and {path.name for path in Path("/tmp").glob("pymp-*")} <= before
