"""Commands of this project as a user calls them, in processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[2]

Command = Callable[..., subprocess.CompletedProcess]

GRID = ("grid.mm=16", "grid.shape=[16,16,16]")


def environment_of(given: dict[str, str]) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **given}


def run_command(*words: object, timeout: float = 300, **environment: str) -> subprocess.CompletedProcess:
    """Run Python on a file of this project as a user would, from the repository's root."""
    return subprocess.run(
        [sys.executable, *map(str, words)],
        cwd=ROOT,
        env=environment_of(environment),
        capture_output=True,
        text=True,
        timeout=timeout,
    )
