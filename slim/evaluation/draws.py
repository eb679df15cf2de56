"""The bootstrap draws of a report, with which two runs are compared on the same draws of subjects.

    FOLDER/draws.npz    TASK/METRIC: the score of the encoder and its draws, float64 (D,); TASK: what was tested

The file stands beside report.json. Draws are used only if they belong to the scores of the report, and two runs are
compared only if both were asked the same of the same subjects.

Legend: D the score and its bootstrap draws.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from shards.core.files import atomically
from shards.core.settings import digest
from slim.evaluation.results import OURS, Draws, Estimate, TaskResult
from slim.evaluation.splits import Split
from slim.evaluation.task import Cases, Task

FILE = "draws.npz"


def tested(task: Task, cases: Cases, splits: Sequence[Sequence[Split]]) -> str:
    """A hash of what was asked of whom: with the same hash, draw by draw, the same subjects were drawn."""
    rows = np.unique(np.concatenate([split.test for split in splits[0]]))
    units = [(cases.sessions[row].key, None if cases.window_N is None else float(cases.window_N[row])) for row in rows]
    asked = [task.type, task.label, task.bootstrap, task.split.seed, len(splits), task.gallery]
    return digest([asked, list(cases.classes), sorted(units, key=str)])[:16]


def write(folder: Path, results: Iterable[TaskResult]) -> None:
    """Add the draws of these tasks to FOLDER/draws.npz. A task without draws loses those of before."""
    arrays = _arrays(folder)
    for result in results:
        arrays = {name: array for name, array in arrays.items() if name.split("/")[0] != result.name}
        if result.draws and result.facts.tested:
            arrays[result.name] = np.array(result.facts.tested)
            arrays |= {f"{result.name}/{metric}": draw_D for metric, draw_D in result.draws.items()}
    with atomically(folder / FILE) as file:
        np.savez_compressed(file, allow_pickle=False, **arrays)


def read(folder: Path, result: TaskResult) -> Draws | None:
    """The draws of a task of the report in a folder; None if there are none that belong to its scores."""
    arrays = _arrays(folder)
    if not result.facts.tested or str(arrays.get(result.name)) != result.facts.tested:
        return None
    start = f"{result.name}/"
    found = {name.removeprefix(start): array for name, array in arrays.items() if name.startswith(start)}
    for metric, draw_D in found.items():
        score = result.estimate(OURS, metric)
        if draw_D.ndim != 1 or len(draw_D) < 2 or draw_D.dtype.kind != "f":
            return None
        if score is None or score.value is None:
            continue
        if not np.isclose(draw_D[0], score.value, rtol=1e-6, atol=1e-9):
            return None  # of an earlier report, or of a later one that was not finished
    return found or None


def difference(ours: Draws, theirs: Draws) -> dict[str, Estimate]:
    """The difference of each metric that both have, with its 95 % interval over subjects."""
    shared = [name for name in ours if name in theirs and ours[name].shape == theirs[name].shape]
    return {name: Estimate.of_draws(ours[name] - theirs[name]) for name in shared}


def _arrays(folder: Path) -> dict[str, np.ndarray]:
    """The arrays of a file of draws; none if it is missing or cannot be read, since a probe writes it again."""
    try:
        with np.load(folder / FILE, allow_pickle=False) as file:
            return dict(file)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return {}
