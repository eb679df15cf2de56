"""The project's own commands as benches call them, and the synthetic data they call them on."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import Field

from launchers import environment
from launchers.job import KEEP_FREED
from shards.core.errors import UserError
from shards.core.presets import find
from shards.core.settings import Settings
from shards.format.grid import Grid
from shards.synthetic.truth import SyntheticCohort
from shards.synthetic.write import write_cohort
from slim.checkpoints.run_folder import CHECKPOINTS, LATEST, METRICS
from slim.config import load_config
from slim.model.geometry import geometry_of

FRAMES = 5  # of a window
LOOK = 0.01  # seconds between two looks at a run


class CommandFailed(UserError):
    """A command of this project that a bench called and that did not end well."""


class Sizes(Settings):
    """Sizes of the data; the cohort is synthetic."""

    runs: int = Field(2, ge=1, description="runs, one of each person")
    frames: int = Field(200, ge=40, description="frames of a run")
    voxel_mm: float = Field(3.0, ge=1, le=20, description="voxel edge of the source, mm")
    mm: float = Field(2.0, gt=0, description="voxel edge of the grid, mm")
    shape: tuple[int, int, int] = Field((96, 96, 96), description="voxels of the grid")

    def write_cohort(self, folder: Path) -> None:
        """A cohort of so many subjects, one run each."""
        write_cohort(folder, SyntheticCohort(self.runs, 1, self.frames, self.voxel_mm))

    def convert(self, cohort: Path, out: Path) -> None:
        """`slim-brain make-shards` in one process, with a ranker that needs no training; all runs are for training."""
        grid = (f"grid.mm={self.mm}", f"grid.shape={list(self.shape)}", "split.shares=[1,0,0]")
        command("make-shards", cohort / "cohort.yaml", "--out", out, "--ranker", "ridge", "--workers", 1, *grid)


SMALL = {"runs": 1, "frames": 60, "voxel_mm": 20, "mm": 16, "shape": [16, 16, 16]}


class Trained(Sizes):
    """Sizes of the data and of what is trained on them."""

    model: Literal["published", "lean", "large", "tiny"] = Field("published", description="of configs/pretrain/")
    steps: int = Field(6, ge=2, description="optimizer steps of a run; the first is not counted")

    def make_dataset(self, folder: Path, begun: Callable[[str], None]) -> Path:
        """Cohort and dataset below `folder`; returns the dataset's.

        Raises
        ------
        ConfigError
            If the model's units do not fit the grid, before anything is made.
        """
        config, *overrides = self.words(folder, out="none")
        settings = load_config(config, overrides)
        geometry_of(settings.model, (settings.windows.k * FRAMES, *Grid(self.mm, self.shape).patch_shape))
        begun(f"make a synthetic dataset of {self.runs} run{'s' * (self.runs > 1)}")
        self.write_cohort(folder / "cohort")
        self.convert(folder / "cohort", folder / "shards")
        return folder / "shards"

    def words(self, dataset: Path, **run: object) -> list[str]:
        """Configuration and overrides of a pretraining run, as its command takes them; `run` are settings of `run:`."""
        given = {"steps": self.steps, "device": "cpu", **run}
        config = find("pretrain", self.model, "model")
        return [
            str(config),
            f"data={dataset}",
            *(f"run.{name}={value}" for name, value in given.items()),
        ]


@dataclass(frozen=True)
class Pretraining:
    """What a run of `slim-brain pretrain` left.

    Attributes
    ----------
    lines : of metrics.jsonl, one for each optimizer step, with `cpu`: CPU seconds of the first process, and of nothing
        it started, from the line before to this one
    save_s : seconds from the last line, written when its step was done, to the name of the complete checkpoint
    checkpoint_bytes : of all its files
    """

    lines: list[dict[str, float]]
    save_s: float
    checkpoint_bytes: int

    def values(self, name: str) -> list[float]:
        """A field of the lines. The first step is left out, because it allocates memory and fills caches."""
        return [line[name] for line in self.lines[1:]]


def command(*words: object, **variables: str) -> str:
    """Run a command of this project as a user would; returns its stdout.

    Raises
    ------
    CommandFailed
        With the last line of its stderr.
    """
    return _ended_well([*environment.SLIM_BRAIN, *map(str, words)], variables)


def _ended_well(call: list[str], variables: Mapping[str, str]) -> str:
    done = subprocess.run(
        call, env={**environment.with_packages(os.environ), **variables}, capture_output=True, encoding="utf-8"
    )
    if done.returncode:
        last = done.stderr.strip().rpartition("\n")[2]
        raise CommandFailed(" ".join(call[2:5]), "", last or f"exit status {done.returncode}", "exit status 0")
    return done.stdout


def pretrain(words: list[str], folder: Path) -> Pretraining:
    """Run `slim-brain pretrain` with these words in a new run folder, and remove the run once it is read."""
    shutil.rmtree(folder, ignore_errors=True)
    metrics, checkpoints = folder / METRICS, folder / CHECKPOINTS
    ended = threading.Event()
    with ThreadPoolExecutor(1) as beside:
        watching = beside.submit(_cpu_at_lines, metrics.resolve(), ended)
        try:
            command("pretrain", *words, f"run.out={folder}", **KEEP_FREED)
        finally:
            ended.set()
    lines = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    used = watching.result()
    if len(used) != len(lines):
        raise CommandFailed("pretrain", "steps", f"{len(used)} that were seen", f"{len(lines)}, or longer ones")
    for line, before, after in zip(lines[1:], used, used[1:], strict=False):
        line["cpu"] = after - before
    latest = checkpoints / LATEST
    files = (checkpoints / latest.read_text(encoding="utf-8").strip()).rglob("*")
    found = Pretraining(
        lines,
        (latest.stat().st_mtime_ns - metrics.stat().st_mtime_ns) / 1e9,
        sum(path.stat().st_size for path in files if path.is_file()),
    )
    shutil.rmtree(folder)
    return found


def _cpu_at_lines(metrics: Path, ended: threading.Event) -> list[float]:
    """CPU seconds that the process writing a file had used as each line came; looked at from outside, on Linux."""
    used: list[float] = []
    stat = None
    while not ended.wait(LOOK):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # not begun yet, or just ended
            new = metrics.read_bytes().count(b"\n") - len(used)
            if new:
                stat = stat or _writer(metrics) / "stat"
                user, system = stat.read_text(encoding="utf-8").rpartition(")")[2].split()[11:13]
                used += [(int(user) + int(system)) / os.sysconf("SC_CLK_TCK")] * new
    return used


def _writer(path: Path) -> Path:
    """Where /proc tells of the process that has a file open; FileNotFoundError if none has."""
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        with contextlib.suppress(OSError):  # a process that has ended, or somebody else's
            if link.readlink() == path:
                return link.parents[1]
    raise FileNotFoundError(path)


def bare(words: list[str]) -> dict[str, list[float]]:
    """Take the same steps in plain PyTorch, in a process of its own; see `launchers.benches.bare`."""
    told = _ended_well([sys.executable, "-m", "launchers.benches.bare", *words, "run.out=none"], KEEP_FREED)
    return json.loads(told.splitlines()[-1])
