"""The cost of steps with any number of samples: two are counted, the others extrapolated.

`slim.planning.step_cost` counts a step with one sample and a step with two, with the buffers of
`slim.planning.zero_memory`. Each further sample adds as much as the second one. If the local stages are divided into
chunks only from the second sample on, steps with two and three samples are counted instead; with SIG, the unit is a SIG
group instead of a sample.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from shards.core.errors import ConfigError, SampleCorrupt
from shards.format.grid import Grid
from shards.format.patches import scatter
from shards.format.reader import Dataset
from shards.format.stream import Stream
from slim.config import PretrainSettings
from slim.data.samples import geometry_for
from slim.model.geometry import Geometry, geometry_of
from slim.planning.counting import Footprint
from slim.planning.step_cost import Cost, detailed, make_batch, mni_brain
from slim.planning.zero_memory import Zero

T = TypeVar("T")
Counted = tuple[Cost, Footprint]
_LOOKED_AT = 8  # number of sessions of a dataset in which the largest brain is searched


def largest_brain(datasets: list[Dataset]) -> tuple[np.ndarray, str]:
    """The brain mask (X, Y, Z) with the most patches in the first training sessions, and a description of its source.

    Raises
    ------
    ConfigError
        If there is no session to train on.
    """
    best: tuple[np.ndarray, str] | None = None
    most = 0
    for dataset in datasets:
        for session in dataset.of_split("train")[:_LOOKED_AT]:
            try:
                arrays = dataset.read(session, names=("patch", "brain"), windows=())
            except SampleCorrupt:
                continue  # a run leaves this session out and reports it
            if len(arrays["patch"]) > most:
                most = len(arrays["patch"])
                brain_XYZ = scatter(arrays["brain"], arrays["patch"], dataset.grid.shape, dataset.grid.patch)
                best = brain_XYZ.astype(bool), f"session {session.key} of {dataset.folder}"
    if best is None:
        raise ConfigError(datasets[0].folder, "train", "no session", "at least one session to train on")
    return best


@dataclass(frozen=True, kw_only=True)
class Brain:
    """The brain and the geometry for which steps are counted.

    Attributes
    ----------
    brain_XYZ : bool array
        Brain mask on `grid`.
    basis : str
        Source of the mask.
    grid, frames, geometry
        Of the data.
    per_epoch : int or None
        Samples per epoch; None without datasets.
    """

    brain_XYZ: np.ndarray
    basis: str
    grid: Grid
    frames: int
    geometry: Geometry
    per_epoch: int | None

    @classmethod
    def of(cls, settings: PretrainSettings, datasets: list[Dataset]) -> Brain:
        """The largest brain in the datasets or, without datasets, the MNI152 mask on the default grid."""
        if not datasets:
            grid, frames = Grid(), 5
            basis = f"MNI152 mask at {grid.mm:g} mm; no dataset at {settings.data[0].path}"
            geometry = geometry_of(settings.model, (settings.windows.k * frames, *grid.patch_shape))
            return cls(
                brain_XYZ=mni_brain(grid), basis=basis, grid=grid, frames=frames, geometry=geometry, per_epoch=None
            )
        geometry = geometry_for(settings, datasets)
        weights = [item.weight for item in settings.data]
        per_epoch = Stream(datasets, weights, "train", settings.run.seed, settings.windows.k).per_epoch
        brain_XYZ, basis = largest_brain(datasets)
        return cls(
            brain_XYZ=brain_XYZ,
            basis=basis,
            grid=datasets[0].grid,
            frames=datasets[0].frames,
            geometry=geometry,
            per_epoch=per_epoch,
        )


class Steps:
    """The cost of steps with any `run.batch`: two values are counted, the others extrapolated.

    Parameters
    ----------
    settings : PretrainSettings
    brain : Brain
    begun : callable
        Called with a text before each count.
    on_gpu, all_context : bool
        As in `slim.planning.step_cost.cost`.

    Attributes
    ----------
    counted : dict
        The counts by `run.batch`.
    """

    def __init__(
        self,
        settings: PretrainSettings,
        brain: Brain,
        begun: Callable[[str], None],
        on_gpu: bool = True,
        all_context: bool = False,
    ):
        self.settings, self.brain, self.begun = settings, brain, begun
        self._how = {"on_gpu": on_gpu, "all_context": all_context}
        self.counted: dict[int, Counted] = {}
        self._unit = unit = settings.loss.sig_samples or 1
        alike = settings.tokens_at_once is None or self._streams(unit) or not self._streams(2 * unit)
        self._first = unit if alike else 2 * unit
        self._second = self._first + unit

    def _of_batch(self, batch: int) -> PretrainSettings:
        return self.settings.model_copy(update={"run": self.settings.run.model_copy(update={"batch": batch})})

    def _streams(self, batch: int) -> bool:
        """Whether the local stages are computed in more than one chunk."""
        context = make_batch(self._of_batch(batch), self.brain.geometry, self.brain.brain_XYZ).context
        return context is not None and len(context.chunks) > 1

    def count(self, batch: int) -> Counted:
        """Count a step, once for each `run.batch`."""
        if batch not in self.counted:
            self.begun(f"counting a step with run.batch={batch}")
            brain = self.brain
            step = self._of_batch(batch)
            self.counted[batch] = detailed(step, brain.grid, brain.frames, brain.brain_XYZ, drive=Zero, **self._how)
        return self.counted[batch]

    def cost(self, batch: int) -> Cost:
        """The cost of a step, counted or extrapolated."""
        if batch <= self._second:
            return self.count(batch)[0]
        first, second = self.count(self._first), self.count(self._second)
        return extrapolate(first, second, (batch - self._first) // self._unit + 1)

    def largest_batch(self, memory: int) -> int:
        """The largest `run.batch` with a peak of at most `memory` bytes; 0 if there is none."""
        first, second = self.count(self._first), self.count(self._second)
        most = self._first + self._unit * (largest(first, second, memory) - 1)
        if 0 < most < self._first and self.count(most)[0].peak_memory_bytes > memory:
            return 0
        return most


def extrapolate(one: Counted, two: Counted, times: int) -> Cost:
    """The cost of a step with `times` portions of samples, from the counts of a step with `one` and with `two`.

    At each moment of the step, each further portion adds as much as the second one. The moment with the peak may change
    with the number of portions, from AdamW's update, which hardly depends on samples, to the backward pass.
    """

    def further(first: Mapping[T, int], second: Mapping[T, int]) -> dict[T, int]:
        line = {name: first.get(name, 0) + (times - 1) * (size - first.get(name, 0)) for name, size in second.items()}
        return {name: size for name, size in line.items() if size > 0}

    totals = further(_totals(one), _totals(two))
    moment = max(totals, key=totals.__getitem__)
    memory = further(one[1].peaks.get(moment, {}), two[1].peaks[moment])
    flops = further(one[0].flops_parts, two[0].flops_parts)
    calls = further(one[0].calls_parts, two[0].calls_parts)
    return Cost(
        one[0].parameters,
        two[0].tokens,
        sum(memory.values()),
        memory,
        sum(flops.values()),
        flops,
        sum(calls.values()),
        calls,
    )


def largest(one: Counted, two: Counted, memory: int) -> int:
    """The largest `times` of `extrapolate` with a peak of at most `memory` bytes; 0 if the peak of `one` is larger."""
    first, second = _totals(one), _totals(two)
    if max(first.values()) > memory:
        return 0
    grown = {moment: total - first.get(moment, 0) for moment, total in second.items()}
    return int(min(1 + (memory - first.get(moment, 0)) // more for moment, more in grown.items() if more > 0))


def _totals(counted: Counted) -> dict[tuple[str, int], int]:
    """Bytes at the peak of each moment."""
    return {moment: live.total() for moment, live in counted[1].peaks.items()}
