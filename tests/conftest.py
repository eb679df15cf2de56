"""Fixtures of the tests: a small cohort and dataset made by the commands themselves, and a runner for commands."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from hypothesis import HealthCheck, settings

from helpers.commands import GRID, Command
from helpers.conversions import write_page
from helpers.in_process import call_command, join_alone, pool_here
from helpers.scans import FRAMES, brain, oblique, save, signal
from launchers.commands import make_shards
from shards.conversion import pool
from shards.core.cli import run
from shards.reporting import dataset_page

# How long an example takes says how busy the machine is.
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")


# The files that take longest are begun first: one begun last would keep one worker busy while the other has none left.
LONGEST = (
    "test_pretrain.py",
    "test_kills.py",
    "test_golden.py",
    "test_other_machines.py",
    "test_elastic.py",
    "test_bench.py",
    "test_probe.py",
    "test_resuming.py",
    "test_killed.py",
    "test_plan.py",
    "test_footprint.py",
    "test_zero.py",
    "test_bench_train.py",
    "test_saliency.py",
    "test_finetune.py",
    "test_skipping.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    """The CPU, and a GPU where there is one."""
    if request.param == "cuda":
        import torch

        if not torch.cuda.is_available():
            pytest.skip("no CUDA device")
    return request.param


@pytest.fixture(autouse=True)
def check_fast(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tests marked `fast` start no process, and a selection of them alone never imports DeepSpeed."""
    if request.node.get_closest_marker("fast") is None:
        yield
        return

    def refuse(*_: object, **__: object) -> None:
        pytest.fail("a test marked fast starts a process")

    monkeypatch.setattr(subprocess.Popen, "__init__", refuse)
    monkeypatch.setattr(BaseProcess, "start", refuse)
    yield
    if request.config.option.markexpr.startswith("fast"):
        assert "deepspeed" not in sys.modules, "a test marked fast imports DeepSpeed"


@pytest.fixture(scope="session")
def alone() -> None:
    """A process group of this process only."""
    join_alone()


@pytest.fixture(scope="session")
def command() -> Command:
    """A command in this process; a test of how a process is started uses `run_command`."""
    return call_command


@pytest.fixture(scope="session")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six people, one session each, 60 frames at 16 mm."""
    out = tmp_path_factory.mktemp("cohort") / "bids"
    done = call_command(
        "tools/make_cohort.py", "--out", out, "--subjects", 6, "--sessions", 1, "--frames", 60, "--voxel-mm", 16
    )
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="session")
def dataset(cohort: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small cohort as shards, ranked without training."""
    out = tmp_path_factory.mktemp("dataset") / "shards"
    words = ("tools/make_shards.py", cohort / "cohort.yaml", "--out", out, "--ranker", "ridge", "--workers", 1, *GRID)
    with mock.patch.object(dataset_page, "write", write_page):
        done = call_command(*words)
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture
def no_page(monkeypatch: pytest.MonkeyPatch) -> None:
    """Datasets get no real page, which has its own tests and takes longer than the rest."""
    monkeypatch.setattr(dataset_page, "write", write_page)


@pytest.fixture(name="make_shards")
def call_make_shards(monkeypatch, no_page):
    """The command in this process: its exit status."""
    monkeypatch.setattr(pool, "ProcessPoolExecutor", pool_here)

    def call(*words: object) -> int:
        workers = [] if "--workers" in words else ["--workers", 1]
        with pytest.raises(SystemExit) as ended:
            run(lambda: make_shards.main([*map(str, words), *map(str, workers), *GRID]))
        return ended.value.code

    return call


@pytest.fixture(scope="module")
def opened(cohort, dataset, tmp_path_factory) -> Iterator[tuple[Path, Path]]:
    out = tmp_path_factory.mktemp("opened") / "out"
    shutil.copytree(dataset, out)
    yield cohort / "cohort.yaml", out


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> tuple[Path, Path, np.ndarray]:
    """A run at 5 mm (RAS), its mask and its affine."""
    folder = tmp_path_factory.mktemp("plain")
    shape = (28, 32, 26)
    affine = oblique((5, 5, 5), 0, (-1, -17, 5), shape)
    mask, _ = brain(affine, shape)
    data = signal(affine, shape, np.arange(FRAMES) * 0.72)
    rng = np.random.default_rng(0)
    data += rng.standard_normal(data.shape)
    return (
        save(folder / "bold.nii.gz", data.astype(np.float32), affine),
        save(folder / "mask.nii.gz", mask.astype(np.uint8), affine),
        affine,
    )
