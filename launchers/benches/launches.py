"""Calls of one training step at full size, counted by `slim.planning.step_cost` without a GPU.

What a call is, is written in `slim.planning.counting`. A GPU has to be told of each one by one, which takes 5 to 10
microseconds of the process in eager PyTorch: a step cannot be faster than that, whatever the GPU. Attention is one
call, as on a GPU in half precision; AdamW updates all tensors of a group at once, as on a GPU. What DeepSpeed copies by
itself is not counted. The brain is nilearn's MNI152 mask on the default grid.

Forward: targets, encoder, predictor and losses. Means: running means and the moving average of the target. Waits are
values that the process reads from the device before it goes on.

`LIMITS` has the largest numbers that are allowed. The command ends with status 1 if one is exceeded, and names it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from pydantic import Field
from rich import box
from rich.console import Console
from rich.table import Table

from launchers.benches.common import Figure, Ratio, Result
from launchers.benches.memory import ONE, SMALLEST_CHUNKS, Case
from shards.core.settings import Settings
from shards.format.grid import Grid
from slim.planning.step_cost import detailed, mni_brain
from slim.planning.zero_memory import Zero

FORWARD, BACKWARD, OPTIMIZER, MEANS, STEP, SAMPLE, WAITS = (
    *("forward", "backward", "optimizer", "means", "step", "a sample", "waits"),
)
# The parts of a step, by the names that `slim.planning.step_cost` counts under.
PARTS = {
    FORWARD: ("targets", "encoder", "predictor"),
    BACKWARD: ("backward",),
    OPTIMIZER: ("optimizer",),
    MEANS: ("means",),
}

K = 8  # windows of a sample
COARSE = Grid(mm=8.0, shape=(24, 24, 24))  # of the small case
PUBLISHED = Case("published", "default", chunk_tokens=None)
SIXTEEN = replace(PUBLISHED, batch=16)
LEAN = replace(SIXTEEN, model="lean")
CHUNKED = replace(PUBLISHED, chunk_tokens=65536)
SMALLEST = replace(PUBLISHED, chunk_tokens=SMALLEST_CHUNKS)
TINY = Case("tiny", "default", chunk_tokens=None, batch=4)
CASES = (SIXTEEN, LEAN, PUBLISHED, CHUNKED, SMALLEST)

# The most calls of each part, of a step and for each of its samples, and the most waits.
LIMITS: dict[Case, dict[str, float]] = {
    SIXTEEN: {FORWARD: 1150, BACKWARD: 1150, OPTIMIZER: 16, MEANS: 70, SAMPLE: 150, WAITS: 0},
    LEAN: {SAMPLE: 150, WAITS: 0},
    PUBLISHED: {STEP: 2350},
    CHUNKED: {STEP: 2600},
    TINY: {FORWARD: 500, BACKWARD: 400, OPTIMIZER: 16, MEANS: 70, SAMPLE: 240, WAITS: 0},
}


class Bench(Settings):
    """Sizes of the bench."""

    full: bool = Field(True, description="count the cases of full size; else only the small one, on a coarse grid")
    smallest: bool = Field(False, description="count the smallest chunks, too, which takes minutes")


SMALL: dict[str, object] = {"full": False}


@dataclass(frozen=True)
class Calls:
    """Calls and waits of a step.

    Attributes
    ----------
    counts : dict
        Calls of each of `PARTS`, of the step, of a sample; and waits.
    parts, waits : dict
        Calls and waits under the names of `slim.planning.step_cost`.
    """

    counts: dict[str, float]
    parts: dict[str, int]
    waits: dict[str, int]


def run(bench: Bench, _repeat: int, _folder: Path, begun: Callable[[str], None]) -> Result:
    """Count all cases; see the head of this file. A count has no spread, so nothing is repeated."""
    cases = [case for case in CASES if case is not SMALLEST or bench.smallest] if bench.full else []
    brain_XYZ = mni_brain(Grid()) if cases else None
    counted: dict[Case, Calls] = {}
    for case in (*cases, TINY):
        begun(case.name)
        counted[case] = count(case, Grid(), brain_XYZ) if case is not TINY else count(case, COARSE, mni_brain(COARSE))
    result = judge(counted)
    result.notes["settings"] = bench.model_dump(mode="json")
    result.notes["cases"] = {case.name: asdict(found) for case, found in counted.items()}
    show(counted)
    return result


def count(case: Case, grid: Grid, brain_XYZ: np.ndarray | None) -> Calls:
    """Count a step of one process as a GPU would carry it out."""
    cost, found = detailed(case.settings(K), grid, brain_XYZ=brain_XYZ, drive=Zero, on_gpu=True)
    counts: dict[str, float] = {
        part: sum(cost.calls_parts.get(name, 0) for name in names) for part, names in PARTS.items()
    }
    counts |= {STEP: cost.step_calls, SAMPLE: cost.step_calls / case.batch, WAITS: found.waits.total()}
    return Calls(counts, cost.calls_parts, dict(+found.waits))


def judge(counted: Mapping[Case, Calls]) -> Result:
    """Counts as figures, and the limits that they must keep."""
    result = Result(figures={ONE: Figure("1", (1.0,))}, strict=True)
    for case, found in counted.items():
        for part, number in found.counts.items():
            result.figures[f"{case.name}, {part}"] = Figure("waits" if part == WAITS else "calls", (float(number),))
        for part, limit in LIMITS.get(case, {}).items():
            name = f"{case.name}, {part}"
            result.ratios.append(Ratio(name, name, ONE, at_most=limit))
    return result


def show(counted: Mapping[Case, Calls]) -> None:
    """Print one row for each case."""
    table = Table("calls of a step", box=box.SIMPLE_HEAD)
    for part in (*PARTS, STEP, SAMPLE, WAITS):
        table.add_column(part, justify="right")
    for case, found in counted.items():
        table.add_row(case.name, *(f"{number:,.0f}".replace(",", " ") for number in found.counts.values()))
    Console(width=120, highlight=False).print(table)
