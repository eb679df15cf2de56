"""Peak memory and FLOPs of one training step at full size, counted by `slim.planning.step_cost` without a GPU.

What is in a count and what is not is written there. Every case is a preset in bf16, with one sample and chunks of 4096
tokens unless its name says otherwise (x2: a batch of two; unstreamed: without chunks); the brain is nilearn's MNI152
mask on the default grid. *dense* is the same code with nothing dropped: every patch of the grid is brain, the context
is all of it, and the local stages are not streamed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from pydantic import Field
from rich import box
from rich.console import Console
from rich.table import Table

from launchers.benches.common import Figure, Ratio, Result
from shards.core.settings import Settings
from shards.format.grid import Grid
from slim.config import PRESETS, DataItem, DrawSettings, PretrainSettings, RunSettings
from slim.planning.step_cost import Cost, cost, mni_brain

GIB, TFLOP = 2**30, 10**12
SMALLEST_CHUNKS = 4096  # tokens: the setting with the least memory
ONE = "one, to compare a figure with a number"
# Peak GiB and TFLOP of a step at batch 1 in bf16, by the same kind of count.
ELSEWHERE = {
    "SwiFT, 4-D Swin, 4.3 M parameters": (2.93, 0.134),
    "SwiFT, with its checkpointing": (1.98, 0.176),
    "Omni-fMRI MAE, 157 M parameters, frames as channels": (4.07, 2.71),
    "dense 4-D Hiera of the published sizes, 23.3 M parameters": (4.76, 5.56),
    "dense 4-D Hiera, checkpointed": (2.33, 6.94),
}


class Bench(Settings):
    """Sizes of the bench."""

    grid: int = Field(96, ge=32, multiple_of=32, description="voxels along each edge of the grid, which is 192 mm long")
    k: int = Field(8, ge=2, description="windows of a sample")
    every: bool = Field(True, description="count all cases, not only those that something is required of")


SMALL: dict[str, object] = {"grid": 32, "every": False}


@dataclass(frozen=True)
class Case:
    """What a step is counted for."""

    model: str
    objective: str = "jepa"
    precision: str = "bf16"
    batch: int = 1
    chunk_tokens: int | None = SMALLEST_CHUNKS
    dense: bool = False

    @property
    def name(self) -> str:
        """What differs from one sample in bf16 in the smallest chunks."""
        words = ["dense" if self.dense else self.model, self.objective]
        words += [self.precision] * (self.precision != "bf16") + [f"x{self.batch}"] * (self.batch > 1)
        if self.chunk_tokens is None:
            words += ["unstreamed"] * (not self.dense)
        elif self.chunk_tokens != SMALLEST_CHUNKS:
            words += [f"in chunks of {self.chunk_tokens}"]
        return " ".join(words)

    def settings(self, k: int) -> PretrainSettings:
        """A configuration; its data are not there."""
        return PretrainSettings(
            data=(DataItem(path="none"),),
            model=PRESETS[self.model],
            windows=DrawSettings(k=k, best=max(k, 32)),
            objective=self.objective,
            precision=self.precision,
            run=RunSettings(out="none", batch=self.batch),
            chunk_tokens=self.chunk_tokens,
        )


PUBLISHED, LEAN = Case("published"), Case("lean")
DEFAULT, DENSE = replace(PUBLISHED, objective="default"), replace(PUBLISHED, chunk_tokens=None, dense=True)
TWO, FOUR = replace(PUBLISHED, batch=2), replace(PUBLISHED, batch=4)
CASES = (
    PUBLISHED,
    replace(PUBLISHED, chunk_tokens=None),
    replace(PUBLISHED, precision="fp32"),
    TWO,
    FOUR,
    DEFAULT,
    replace(DEFAULT, precision="fp32"),
    replace(DEFAULT, batch=2),
    replace(DEFAULT, batch=4),
    LEAN,
    replace(LEAN, objective="default"),
    DENSE,
)
REQUIRED = (PUBLISHED, TWO, FOUR, DEFAULT, LEAN)


def run(bench: Bench, _repeat: int, _folder: Path, begun: Callable[[str], None]) -> Result:
    """Count all cases; see the head of this file. A count has no spread, so nothing is repeated."""
    whole = Grid()
    grid = replace(whole, shape=(bench.grid,) * 3, mm=whole.mm * whole.shape[0] / bench.grid)
    brain_XYZ = mni_brain(grid)
    counted: dict[Case, Cost] = {}
    for case in CASES if bench.every else REQUIRED:
        begun(case.name)
        counted[case] = cost(case.settings(bench.k), grid, brain_XYZ=brain_XYZ, dense=case.dense)
    result = judge(counted)
    result.notes["settings"] = bench.model_dump(mode="json")
    result.notes["cases"] = {
        case.name: {"GiB": found.peak_memory_bytes / GIB, "TFLOP": found.step_flops / TFLOP} | asdict(found)
        for case, found in counted.items()
    }
    result.notes["measured elsewhere"] = {
        name: {"GiB": peak, "TFLOP": step} for name, (peak, step) in ELSEWHERE.items()
    }
    show_parts({case.name: found.memory_parts for case, found in counted.items()}, "MiB at the peak", 2**20)
    show_parts({case.name: found.flops_parts for case, found in counted.items()}, "GFLOP of a step", 10**9)
    table = Table("measured elsewhere, one sample in bf16", "GiB", "TFLOP", box=box.SIMPLE_HEAD)
    for name, numbers in ELSEWHERE.items():
        table.add_row(name, *map(str, numbers))
    Console(width=120, highlight=False).print(table)
    return result


def judge(counted: Mapping[Case, Cost]) -> Result:
    """Counts as figures, and what is required of them."""
    result = Result(figures={ONE: Figure("1", (1.0,))})
    for case, found in counted.items():
        result.figures[f"{case.name}, peak"] = Figure("GiB", (found.peak_memory_bytes / GIB,))
        result.figures[f"{case.name}, step"] = Figure("TFLOP", (found.step_flops / TFLOP,))
    limits = {f"{PUBLISHED.name}, peak": 0.58, f"{PUBLISHED.name}, step": 0.70, f"{LEAN.name}, step": 0.35}
    limits |= {f"{DEFAULT.name}, peak": 1.1 * 0.58, f"{DEFAULT.name}, step": 1.1 * 0.70}
    for case in (TWO, FOUR):
        added = counted[case].peak_memory_bytes - counted[PUBLISHED].peak_memory_bytes
        name = f"{case.name}, each further sample"
        result.figures[name] = Figure("GiB", (added / (case.batch - 1) / GIB,))
        limits[name] = 0.15
    result.ratios += [
        Ratio(f"{result.figures[name].unit}, {name}", name, ONE, at_most=limit) for name, limit in limits.items()
    ]
    for figure in ("peak", "step"):
        for case in (DEFAULT, DENSE):
            if case in counted:
                name = f"{case.name}, {figure}"
                over = f"{PUBLISHED.name}, {figure}"
                result.ratios.append(Ratio(f"{name} over {over}", name, over))
    return result


def show_parts(parts: Mapping[str, Mapping[str, int]], title: str, unit: int) -> None:
    """Print one row for each case, one column for each part that any of them has."""
    columns = list(dict.fromkeys(part for own in parts.values() for part in own))
    table = Table("case", title=title, box=box.SIMPLE_HEAD, padding=(0, 0, 0, 1))
    for heading in (*columns, "all"):
        table.add_column(heading, justify="right")
    for name, own in parts.items():
        values = [own.get(part, 0) for part in columns]
        table.add_row(name, *(f"{value / unit:,.1f}".replace(",", " ") for value in (*values, sum(values))))
    Console(width=120, highlight=False).print(table)
