"""Samples: the windows of one session in time order; in training, the draw of windows and mask.

Legend: T frames; P patches; V voxels of a patch; S slots; L places of cells; K windows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import numpy as np

from shards.core.errors import ConfigError, SampleCorrupt
from shards.format.manifest import DataRecord
from shards.format.reader import Dataset, Samples, ScanT
from shards.format.stream import Item, generator
from slim.config import PretrainSettings, TrainSettings
from slim.data.masking import Mask, draw
from slim.model.geometry import Geometry, geometry_of


@dataclass
class Sample:
    """The k windows of one session in time order, with the mask; fewer windows if the session has fewer.

    `value` (T, P, V) is the fluctuation; `baseline` and `spread` are (P, V); `place` (P,) holds the flat positions of
    the patches; `second` (T,) the times in s.
    """

    key: str
    epoch: int
    value: np.ndarray
    baseline: np.ndarray
    spread: np.ndarray
    brain: np.ndarray
    place: np.ndarray
    second: np.ndarray
    mask: Mask | None = None


# Fields that must be equal in all datasets of a model; otherwise equal numbers would have different meanings.
_SHARED = ("grid", "windows.frames", "tr", "tr_range", "normalisation")


def unlike(data: DataRecord, other: DataRecord) -> tuple[str, Any, Any] | None:
    """The first field that must be equal for one model and differs, with both values; None if two datasets fit."""
    one, two = data.tree(), other.tree()

    def value(of: dict[str, Any], field: str) -> Any:
        name, _, part = field.partition(".")
        return of[name][part] if part else of.get(name)

    pairs = ((field, value(one, field), value(two, field)) for field in _SHARED)
    return next((found for found in pairs if found[1] != found[2]), None)


def geometry_for(settings: TrainSettings, datasets: Sequence[Dataset]) -> Geometry:
    """The geometry of samples from these datasets, for the sizes of the model.

    Raises
    ------
    ConfigError
        If the datasets differ in a field that `unlike` compares, or the model's units or cells do not fit the grid.
    """
    first = datasets[0]
    for other in datasets[1:]:
        if (found := unlike(other.manifest, first.manifest)) is not None:
            field, got, expected = found
            hint = "Convert both with the same settings, or train on them in separate runs"
            raise ConfigError(other.folder, field, got, f"{expected}, as in {first.folder}", hint)
    tokens = (settings.windows.k * first.frames, *first.grid.patch_shape)
    geometry = geometry_of(settings.model, tokens)
    if prod(geometry.cells[1:]) < 2:
        raise ConfigError("model", "strides", f"{geometry.cells[1:]} cells in space", "2 cells or more")
    slots = geometry.slots(settings.windows.least * first.frames)
    if isinstance(settings, PretrainSettings) and slots < 2 and "cross_location" not in settings.mask.kinds:
        got = f"{', '.join(settings.mask.kinds)} for samples of one slot"
        hint = f"Add it, or raise windows.minimum: a slot has {geometry.cell[0]} frames"
        raise ConfigError("mask", "kinds", got, "cross_location, the only kind without other slots", hint)
    return geometry


def read_windows(dataset: Samples[ScanT], session: ScanT, rank_K: Sequence[int] | np.ndarray, epoch: int = 0) -> Sample:
    """Read the windows of these ranks, in time order.

    Raises
    ------
    SampleCorrupt
        If the bytes of the sample are damaged, or it has no windows.
    """
    if not len(rank_K):
        raise SampleCorrupt(session.key, "n_kept", 0, "1 or more windows", "Convert the session again")
    arrays = dataset.read(session, ("baseline", "spread", "patch", "brain", "start", "windows"), rank_K)
    start_K = arrays["start"][np.asarray(rank_K)]
    in_time = np.argsort(start_K, kind="stable")
    k, frames, patches, voxels = arrays["windows"].shape
    second = (start_K[in_time][:, None] + np.arange(frames)) * session.tr
    place = np.ravel_multi_index(tuple(arrays["patch"].T.astype(np.intp)), dataset.grid.patch_shape)
    return Sample(
        session.key,
        epoch,
        arrays["windows"][in_time].reshape(k * frames, patches, voxels),
        arrays["baseline"],
        arrays["spread"],
        arrays["brain"],
        place,
        second.reshape(-1).astype(np.float32),
    )


def with_background(sample: Sample, geometry: Geometry) -> Sample:
    """The sample with all patches of the grid: the values of those without brain are 0, and its mask is None."""
    places = prod(geometry.tokens[1:])

    def whole(array: np.ndarray, axis: int) -> np.ndarray:
        shape = (*array.shape[:axis], places, *array.shape[axis + 1 :])
        filled = np.zeros(shape, array.dtype)
        filled[(slice(None),) * axis + (sample.place,)] = array
        return filled

    return replace(
        sample,
        value=whole(sample.value, 1),
        baseline=whole(sample.baseline, 0),
        spread=whole(sample.spread, 0),
        brain=whole(sample.brain, 0),
        place=np.arange(places),
        mask=None,
    )


@dataclass(frozen=True)
class WindowGroup:
    """Windows of a session that the model processes together.

    Attributes
    ----------
    windows : slice
        Range of the session's windows in time order.
    repeated : int
        Number of windows at the start that are also in the group before.
    """

    windows: slice
    repeated: int


def window_groups(count: int, k: int) -> list[WindowGroup]:
    """Divide `count` windows into groups of k. If k does not divide `count`, the last group repeats some windows.

    Fewer than k windows are one group, without repetition.
    """
    if count < k:
        return [WindowGroup(slice(0, count), 0)]
    firsts = [*range(0, count - k, k), count - k]
    return [
        WindowGroup(slice(first, first + k), before + k - first)
        for before, first in zip([-k, *firsts], firsts, strict=False)
    ]


def empty_sample(geometry: Geometry, voxels: int, settings: TrainSettings) -> Sample:
    """A sample of zeros in two cells, with which a process without samples takes part in the backward pass."""
    frames, places = geometry.tokens[0], prod(geometry.tokens[1:])
    place = np.unique(geometry.cell_of[:places], return_index=True)[1][:2]
    still = np.zeros((len(place), voxels), np.float32)
    second = np.arange(frames, dtype=np.float32)
    sample = Sample("", 0, np.zeros((frames, *still.shape), np.float16), still, still, still, place, second)
    if isinstance(settings, PretrainSettings):
        sample.mask = draw(cell_sizes(geometry, place), settings.mask, 0, 0, "")
    return sample


def draw_sample(item: Item, dataset: Dataset, geometry: Geometry, settings: TrainSettings) -> Sample:
    """Draw the windows of one session and, in pretraining, its mask, from (seed, epoch, key).

    Raises
    ------
    SampleCorrupt
        If the bytes are damaged, or all brain tokens lie in one place, so that nothing can be masked.
    ConfigError
        If the session has fewer windows than are drawn. A `Stream` with `least_windows` leaves such sessions out.
    """
    windows, seed, key = settings.windows, settings.run.seed, item.session.key
    best = min(windows.best, item.session.n_kept)
    if best < windows.least:
        hint = "Lower windows.minimum or windows.k"
        raise ConfigError(f"{dataset.folder} ({key})", "windows", best, f"{windows.least} or more", hint)
    ranks = generator(seed, item.epoch, key, "windows").permutation(best)[: windows.k]
    sample = read_windows(dataset, item.session, np.sort(ranks), item.epoch)
    if not isinstance(settings, PretrainSettings):
        return sample
    size_SL = cell_sizes(geometry, sample.place, len(sample.second))
    places = np.count_nonzero(size_SL.any(axis=0))
    if places < 2:
        raise SampleCorrupt(
            f"{dataset.folder} ({key})",
            "patch",
            f"brain in {places} cell of the grid",
            "2 or more, for context and targets",
            "Use a model with smaller cells (unit, strides), or leave the session out",
        )
    sample.mask = draw(size_SL, settings.mask, seed, item.epoch, key)
    return sample


def cell_sizes(geometry: Geometry, place: np.ndarray, frames: int | None = None) -> np.ndarray:
    """Number of brain tokens in each cell, int64 (S, L).

    Parameters
    ----------
    geometry : Geometry
    place : int array
        Flat positions of the patches with brain.
    frames : int, optional
        Number of frames of the sample; by default all of the geometry.
    """
    frames, places = geometry.tokens[0] if frames is None else frames, prod(geometry.tokens[1:])
    tokens = (np.arange(frames)[:, None] * places + place).ravel()
    count = np.bincount(geometry.cell_of[tokens], minlength=prod(geometry.cells))
    return count.reshape(geometry.cells[0], -1)
