"""Machines that lack what others have: short paths of temporary files, shared memory, UTF-8, a reader of stdout.

Small file systems are mounted for the time of a test, in mounts of its own (`unshare`), where this user may.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch

from helpers.commands import GRID, ROOT, Command
from helpers.loads import Numbers, as_tensor, dies, fails, last_is_late, refuses, waits
from helpers.training import QUICK, TINY, losses, pretrain, ranks_of, start, wait_for_lines
from shards.core.errors import DatasetError, Stopped
from shards.format.stream import MicroBatches
from slim.data import loader
from slim.training.tracking import Tracking

pytestmark = pytest.mark.processes

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
    monkeypatch.setattr(loader, "free_shared_memory", lambda: free)
    found = [batch.tolist() for batch in loader.Loader(micro_batches(as_tensor), count)]
    assert found == [[0, 1], [2, 3], [4, 5], [6, 7]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.int32, torch.float32, torch.bool])
def test_bytes_give_back_tensors(dtype: torch.dtype) -> None:
    x = torch.arange(6).to(dtype).reshape(2, 3).T
    (back,) = loader.received(loader.Sent(lambda items: [x], "bytes")([]))
    assert back.dtype == dtype and torch.equal(back, x)
    back[0] = 0  # writable, without a warning


@pytest.mark.parametrize("count", [0, 1])
def test_what_a_loading_process_refuses_arrives_as_it_was(count: int) -> None:
    with pytest.raises(DatasetError, match=r"^data: field: got this, expected that. Do it$"):
        next(loader.Loader(micro_batches(refuses, consumed=2), count))
    with pytest.raises(Stopped, match=r"^the dataset is away$"):
        next(loader.Loader(micro_batches(refuses), count))


def test_a_fault_in_a_loading_process_is_raised_whatever_its_words() -> None:
    with pytest.raises(RuntimeError, match=r"^DataLoader timed out") as found:
        next(loader.Loader(micro_batches(fails, consumed=2), 1))
    assert "in fails" in "".join(found.value.__notes__)
    with pytest.raises(RuntimeError, match=r"^Odd: odd\n") as found:
        next(loader.Loader(micro_batches(fails), 1))
    assert "in fails" in "".join(found.value.__notes__)


def test_a_loading_process_that_has_no_more_to_load_has_not_died() -> None:
    """The other one loads the last batch for longer than the loader waits between two looks at its processes."""
    found = [batch.tolist() for batch in loader.Loader(micro_batches(last_is_late), 2)]
    assert found == [[0, 1], [2, 3], [4, 5], [6, 7]]


def test_a_loading_process_that_dies_before_its_first_batch_is_told_in_words() -> None:
    with pytest.raises(
        Stopped, match=r"^a loading process died \(process \d+, SIGBUS\).*out of memory.*lower run.workers"
    ):
        next(loader.Loader(micro_batches(dies), 1))


def test_a_signal_is_heard_while_waiting_for_data(monkeypatch) -> None:
    monkeypatch.setitem(loader._GRACE, "SIGTERM", 0.1)
    begun, said = time.monotonic(), None
    waiting = loader.Loader(micro_batches(waits), 1, lambda: said)
    monkeypatch.setattr(loader, "_PATIENCE", 4.0)
    with pytest.raises(Stopped, match="no batch arrived in"):
        next(waiting)
    said = "SIGTERM"
    with pytest.raises(Stopped, match="SIGTERM was received while waiting for data"):
        next(waiting)
    assert time.monotonic() - begun < 60


def test_without_semaphores_batches_are_loaded_all_the_same(monkeypatch) -> None:
    monkeypatch.setattr(loader, "why_no_workers", lambda: "no semaphores")
    told: list[str] = []
    found = [batch.tolist() for batch in loader.Loader(micro_batches(as_tensor), 2, warn=told.append)]
    assert found[3] == [6, 7]
    assert told == ["/dev/shm: no semaphores, so the training process loads batches itself, which is slower"]


@pytest.fixture(scope="module")
def plain(command: Command, dataset: Path, tmp_path_factory) -> list[float]:
    """Losses of a run of three steps where nothing is lacking."""
    out = tmp_path_factory.mktemp("plain") / "run"
    done = pretrain(command, dataset, out, processes=1, steps=3)
    assert done.returncode == 0, done.stdout + done.stderr
    return losses(out)


@mounts
@pytest.mark.parametrize("how", ["-o size=64k", "-o size=64k,ro"])
def test_shared_memory_that_is_small_or_cannot_be_written(how: str, dataset, plain, tmp_path) -> None:
    inside = f'mount -t tmpfs {how} none /dev/shm && exec "$@"'
    done = train(dataset, tmp_path / "run", before=f"exec unshare --mount bash -c '{inside}' bash \"$@\"")
    assert done.returncode == 0, done.stdout + done.stderr
    assert losses(tmp_path / "run") == plain
    assert ("the training process loads batches itself" in done.stderr) == ("ro" in how)


def test_a_long_path_of_temporary_files(dataset, plain, tmp_path) -> None:
    long = tmp_path / ("t" * (113 - len(str(tmp_path)))) if len(str(tmp_path)) < 100 else tmp_path / "t" * 40
    long.mkdir()
    done = train(dataset, tmp_path / "run", TMPDIR=str(long))
    assert done.returncode == 0, done.stdout + done.stderr
    assert losses(tmp_path / "run") == plain
    assert not list(long.glob("pymp-*"))


def test_a_shell_of_another_launcher_with_an_ascii_locale(dataset, plain, tmp_path) -> None:
    given = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii"}
    given |= {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "PMI_RANK": "1", "PMI_SIZE": "2"}
    given |= {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "192.0.2.1", "MASTER_PORT": "29500"}
    given |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RUN_ID": "none"}
    out = tmp_path / "Läufe" / "größer"
    done = train(dataset, out, **given)
    assert done.returncode == 0, done.stdout + done.stderr
    assert losses(out) == plain
    assert json.loads(done.stdout.splitlines()[-1])["run"] == str(out)


@pytest.mark.parametrize("how", ["closed", "reader gone"])
def test_output_that_nobody_reads(how: str, dataset, plain, tmp_path) -> None:
    before = "exec >&- 2>&- <&-" if how == "closed" else "exec > >(exec true) 2>&1; sleep 0.5"
    done = train(dataset, tmp_path / "run", before=before)
    assert done.returncode == 0
    assert losses(tmp_path / "run") == plain


@pytest.mark.parametrize("how", ["SIGTERM", "launcher killed"])
def test_a_run_whose_loading_processes_stand_still_ends(how: str, dataset, tmp_path) -> None:
    out = tmp_path / "run"
    child = start(dataset, out, "run.processes=1", steps=10**6)
    wait_for_lines(out, 2, child)
    (rank,) = ranks_of(out)
    loading_ones = [process for process in psutil.Process(rank).children(recursive=True) if process.ppid() != rank]
    assert loading_ones
    for process in loading_ones:
        process.suspend()
    time.sleep(1)
    child.send_signal(signal.SIGTERM if how == "SIGTERM" else signal.SIGKILL)
    child.wait(60)
    end = time.monotonic() + 60
    while (left := ranks_of(out)) and time.monotonic() < end:
        time.sleep(0.2)
    for process in loading_ones:  # stopped, they hear of nothing, and hold the launcher's output
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    _, said = child.communicate(timeout=60)
    assert not left
    if how == "SIGTERM":
        assert child.returncode == 3
        after = "the same command continues from the last complete checkpoint; as there is none yet, from step 0"
        assert f"SIGTERM was received while waiting for data; {after}" in said


def test_a_dataset_that_is_away_for_a_moment_stops_a_run(dataset, tmp_path) -> None:
    here, away, out = tmp_path / "data", tmp_path / "away", tmp_path / "run"
    shutil.copytree(dataset, here)
    child = start(here, out, "run.processes=1", "run.checkpoint_every=1", steps=10**6)
    wait_for_lines(out, 2, child)
    here.rename(away)
    _, said = child.communicate(timeout=60)
    assert child.returncode == 3, said
    assert f"the dataset {here} cannot be reached (No such file or directory)" in said
    assert not (out / "skipped.jsonl").exists()  # nothing was taken for damaged
    assert (out / "checkpoints" / "latest").exists()


def test_wandb_without_a_key_or_a_server_is_a_warning(tmp_path, monkeypatch, caplog) -> None:
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_INIT_TIMEOUT", "3")
    for name, key in (("keyless", None), ("unreachable", "a" * 40)):
        if key is not None:
            monkeypatch.setenv("WANDB_API_KEY", key)
        (tmp_path / name).mkdir()
        told = Tracking(tmp_path / name, "online", {"seed": 1})
        told.log({"step": 1, "loss": 0.5})
        told.close()
        (record,) = [one for one in caplog.records if one.name.startswith("slim.")]
        said = record.getMessage()
        assert (record.name, record.levelname) == ("slim.training.tracking", "WARNING")
        assert said.startswith("run.wandb=online, but ") and "\n" not in said
        caplog.clear()
        assert "`wandb login`" in said if key is None else "127.0.0.1" in said
        assert list((tmp_path / name / "wandb").glob("offline-run-*"))


@mounts
def test_a_conversion_without_shared_memory_is_refused_in_words(cohort: Path, tmp_path) -> None:
    words = [sys.executable, "tools/make_shards.py", cohort / "cohort.yaml", "--out", tmp_path / "data", *GRID]
    shell = 'mount -t tmpfs -o ro none /dev/shm && exec "$@"'
    command = ["unshare", "--mount", "bash", "-c", shell, "bash", *words, "extractor.steps=2"]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **ENVIRONMENT}, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: /dev/shm: got no semaphores (Read-only file system)")
