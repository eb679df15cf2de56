"""Fixtures of the tests: a small cohort and dataset made by the commands themselves, and a runner for commands."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
Command = Callable[..., subprocess.CompletedProcess]


def run_command(*words: object, timeout: float = 300, **environment: str) -> subprocess.CompletedProcess:
    """Run a tool of this project as a user would, from the repository's root."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **environment}
    return subprocess.run(
        [sys.executable, *map(str, words)], cwd=ROOT, env=env, capture_output=True, text=True, timeout=timeout
    )


@pytest.fixture(scope="session")
def command() -> Command:
    return run_command


GRID = ("grid.mm=16", "grid.shape=[16,16,16]")


@pytest.fixture(scope="session")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six people, one session each, 60 frames at 16 mm."""
    out = tmp_path_factory.mktemp("cohort") / "bids"
    done = run_command(
        "tools/make_cohort.py", "--out", out, "--subjects", 6, "--sessions", 1, "--frames", 60, "--voxel-mm", 16
    )
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="session")
def dataset(cohort: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small cohort as shards, ranked without training."""
    out = tmp_path_factory.mktemp("dataset") / "shards"
    done = run_command(
        "tools/make_shards.py", cohort / "cohort.yaml", "--out", out, "--ranker", "ridge", "--workers", 1, *GRID
    )
    assert done.returncode == 0, done.stderr
    return out
