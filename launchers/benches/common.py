"""What the benches share: timing callables in turn, figures with their spread, and required ratios.

Only figures of one invocation are compared. The machine may be shared: because the callables take turns, lasting noise
affects all of them in the same way.
"""

from __future__ import annotations

import os
import platform
import resource
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

PER_SECOND = {"s": 1, "ms": 1000}


@dataclass(frozen=True)
class Figure:
    """A quantity that was measured once or more, in `unit`."""

    unit: str
    values: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    def facts(self) -> dict[str, object]:
        """Median, lowest and highest value, and how many there are."""
        return {
            "unit": self.unit,
            "median": self.median,
            "low": min(self.values),
            "high": max(self.values),
            "n": len(self.values),
        }


@dataclass(frozen=True)
class Ratio:
    """The median of one figure over that of another, and what is required of it, if anything."""

    name: str
    of: str
    over: str
    at_least: float | None = None
    at_most: float | None = None

    def facts(self, figures: Mapping[str, Figure]) -> dict[str, object]:
        """The ratio with the names of its figures; `met` is None where nothing is required."""
        value = figures[self.of].median / figures[self.over].median
        required, met = None, None
        if self.at_least is not None:
            required, met = f"at least {self.at_least:g}", value >= self.at_least
        elif self.at_most is not None:
            required, met = f"at most {self.at_most:g}", value <= self.at_most
        return {"name": self.name, "of": self.of, "over": self.over, "value": value, "required": required, "met": met}


@dataclass
class Result:
    """All that a bench found: figures by name, ratios of them, and notes on what was compared.

    With `strict`, the command fails if a requirement of a ratio is not met.
    """

    figures: dict[str, Figure] = field(default_factory=dict)
    ratios: list[Ratio] = field(default_factory=list)
    notes: dict[str, object] = field(default_factory=dict)
    strict: bool = False

    def facts(self) -> dict[str, object]:
        """The result as a JSON-able tree."""
        return {
            "figures": {name: figure.facts() for name, figure in self.figures.items()},
            "ratios": [ratio.facts(self.figures) for ratio in self.ratios],
            "notes": self.notes,
            "machine": machine(),
        }


def interleave(
    work: Mapping[str, Callable[[], Any]],
    rounds: int,
    begun: Callable[[str], None],
    times: Mapping[str, int] | None = None,
    unit: str = "s",
) -> dict[str, Figure]:
    """Time callables in turn, A B A B, by the clock and in CPU time.

    Parameters
    ----------
    work : mapping of name to callable
    rounds : int
    begun : callable
        Told `name, round i of n` before each round of each.
    times : mapping, optional
        How often a callable is called in a round (usually once). In a round all are called once, then again those
        that have turns left.
    unit : `s` or `ms`

    Returns
    -------
    dict
        `NAME, wall` and `NAME, CPU` for each callable. CPU time is that of this process and of the processes it
        started and waited for.
    """
    times = times or {}
    wall: dict[str, list[float]] = {name: [] for name in work}
    cpu: dict[str, list[float]] = {name: [] for name in work}
    for number in range(rounds):
        for turn in range(max(times.get(name, 1) for name in work)):
            for name, call in work.items():
                if turn >= times.get(name, 1):
                    continue
                if turn == 0:
                    begun(f"{name}, round {number + 1} of {rounds}")
                begun_wall, begun_cpu = time.perf_counter(), cpu_seconds()
                call()
                cpu[name].append((cpu_seconds() - begun_cpu) * PER_SECOND[unit])
                wall[name].append((time.perf_counter() - begun_wall) * PER_SECOND[unit])
    return {
        f"{name}, {clock}": Figure(unit, tuple(values[name]))
        for name in work
        for clock, values in (("wall", wall), ("CPU", cpu))
    }


def cpu_seconds() -> float:
    """CPU seconds of this process and of those that it started and waited for."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def machine() -> dict[str, object]:
    """What the figures depend on beside the code."""
    return {
        "cores": len(os.sched_getaffinity(0)),
        "load": [round(value, 2) for value in os.getloadavg()],
        "python": platform.python_version(),
        **{name: version(name) for name in ("numpy", "scipy", "nilearn", "zarr", "numcodecs", "torch")},
    }


def show(facts: Mapping[str, Any]) -> None:
    """Print a result's figures and ratios as two tables."""
    figures = Table("figure", box=box.SIMPLE_HEAD)
    for heading in ("median", "low", "high", "unit", "n"):
        figures.add_column(heading, justify="left" if heading == "unit" else "right")
    for name, figure in facts["figures"].items():
        low, high = (_number(figure[end]) if figure["n"] > 1 else "" for end in ("low", "high"))
        figures.add_row(name, _number(figure["median"]), low, high, figure["unit"], str(figure["n"]))
    ratios = Table("ratio of medians", box=box.SIMPLE_HEAD)
    for heading in ("value", "required", "met"):
        ratios.add_column(heading, justify="right" if heading == "value" else "left")
    for ratio in facts["ratios"]:
        met = {True: "yes", False: "NO", None: ""}[ratio["met"]]
        ratios.add_row(ratio["name"], _number(ratio["value"]), ratio["required"] or "", met)
    console = Console(width=120, highlight=False)
    console.print(figures, ratios)


def _number(value: float) -> str:
    """Four significant digits; whole numbers in full, with thousands apart."""
    return f"{value:,.0f}".replace(",", " ") if abs(value) >= 1000 else f"{value:.4g}"
