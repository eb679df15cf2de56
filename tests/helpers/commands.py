"""Commands of this project as a user calls them, in processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[2]

Command = Callable[..., subprocess.CompletedProcess]


def run_command(*words: object, timeout: float = 300, **environment: str) -> subprocess.CompletedProcess:
    """Run a tool of this project as a user would, from the repository's root."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **environment}
    return subprocess.run(
        [sys.executable, *map(str, words)], cwd=ROOT, env=env, capture_output=True, text=True, timeout=timeout
    )


GRID = ("grid.mm=16", "grid.shape=[16,16,16]")
