"""One session of a dataset as a sample: its windows, read in time order, and the draw of windows and mask in training.

Legend: T frames; P patches; V voxels of a patch; S slots; L places of cells; K windows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
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
    """One session's k windows in time order, with its mask.

    `value` (T, P, V) fluctuation, `baseline` and `spread` (P, V), `place` (P,) flat patch places, `second` (T,) s.
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


# What all data of a model share: with another one, equal numbers in a sample would mean something else.
_SHARED = ("grid", "windows.frames", "tr", "tr_range", "normalisation")


def unlike(data: DataRecord, other: DataRecord) -> tuple[str, Any, Any] | None:
    """The first in which two datasets differ that one model is to read: field, and both values; None if they fit."""
    one, two = data.tree(), other.tree()

    def value(of: dict[str, Any], field: str) -> Any:
        name, _, part = field.partition(".")
        return of[name][part] if part else of.get(name)

    pairs = ((field, value(one, field), value(two, field)) for field in _SHARED)
    return next((found for found in pairs if found[1] != found[2]), None)


def geometry_for(settings: TrainSettings, datasets: Sequence[Dataset]) -> Geometry:
    """The token grid of samples from these datasets, divided as the model says.

    Raises
    ------
    ConfigError
        If the datasets differ in what `unlike` compares, the model's units do not fit, or its cells are too large.
    """
    first = datasets[0]
    for other in datasets[1:]:
        if (found := unlike(other.manifest, first.manifest)) is not None:
            field, got, expected = found
            hint = "Convert both alike, or train on them in runs of their own"
            raise ConfigError(other.folder, field, got, f"{expected}, as in {first.folder}", hint)
    tokens = (settings.windows.k * first.frames, *first.grid.patch_shape)
    geometry = geometry_of(settings.model, tokens)
    if prod(geometry.cells[1:]) < 2:
        raise ConfigError("model", "strides", f"{geometry.cells[1:]} cells in space", "2 cells or more")
    return geometry


def read_windows(dataset: Samples[ScanT], session: ScanT, rank_K: Sequence[int] | np.ndarray, epoch: int = 0) -> Sample:
    """The windows of these ranks, put into time order.

    Raises
    ------
    SampleCorrupt
        If the sample's bytes are damaged.
    """
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


@dataclass(frozen=True)
class WindowGroup:
    """The windows of a session that pass through the model together.

    Attributes
    ----------
    windows : slice
        Of the session's windows in time order.
    repeated : int
        The first so many are in the group before, too.
    """

    windows: slice
    repeated: int


def window_groups(count: int, k: int) -> list[WindowGroup]:
    """`count` windows in groups of k; the last group starts earlier, and repeats windows, where k leaves a rest."""
    firsts = [*range(0, count - k, k), count - k]
    return [
        WindowGroup(slice(first, first + k), before + k - first)
        for before, first in zip([-k, *firsts], firsts, strict=False)
    ]


def empty_sample(geometry: Geometry, voxels: int, settings: TrainSettings) -> Sample:
    """A sample of zeros in two cells: every process takes part in every backward pass, whatever it has read."""
    frames, places = geometry.tokens[0], prod(geometry.tokens[1:])
    place = np.unique(geometry.cell_of[:places], return_index=True)[1][:2]
    still = np.zeros((len(place), voxels), np.float32)
    second = np.arange(frames, dtype=np.float32)
    sample = Sample("", 0, np.zeros((frames, *still.shape), np.float16), still, still, still, place, second)
    if isinstance(settings, PretrainSettings):
        sample.mask = draw(cell_sizes(geometry, place), settings.mask, 0, 0, "")
    return sample


def draw_sample(item: Item, dataset: Dataset, geometry: Geometry, settings: TrainSettings) -> Sample:
    """One session's windows and, in pretraining, its mask, drawn by (seed, epoch, key).

    Raises
    ------
    SampleCorrupt
        If its bytes are damaged, or it has brain to be masked in one cell alone.
    ConfigError
        If it has fewer windows than are drawn; a `Stream` with `least_windows` has no such session.
    """
    windows, seed, key = settings.windows, settings.run.seed, item.session.key
    best = min(windows.best, item.session.n_kept)
    if best < windows.k:
        hint = "Lower windows.k or convert with a larger windows.minimum"
        raise ConfigError(f"{dataset.folder} ({key})", "windows", f"{best} windows", f"windows.k = {windows.k}", hint)
    ranks = generator(seed, item.epoch, key, "windows").permutation(best)[: windows.k]
    sample = read_windows(dataset, item.session, np.sort(ranks), item.epoch)
    if not isinstance(settings, PretrainSettings):
        return sample
    size_SL = cell_sizes(geometry, sample.place)
    places = np.count_nonzero(size_SL.any(axis=0))
    if places < 2:
        raise SampleCorrupt(
            f"{dataset.folder} ({key})",
            "patch",
            f"brain in {places} cell of the grid",
            "2 or more, for context and targets",
            "Take a model with smaller cells (unit, strides), or leave the session out",
        )
    sample.mask = draw(size_SL, settings.mask, seed, item.epoch, key)
    return sample


def cell_sizes(geometry: Geometry, place: np.ndarray) -> np.ndarray:
    """Brain tokens of each cell, int64 (S, L), given the flat patch places that hold brain."""
    frames, places = geometry.tokens[0], prod(geometry.tokens[1:])
    tokens = (np.arange(frames)[:, None] * places + place).ravel()
    count = np.bincount(geometry.cell_of[tokens], minlength=prod(geometry.cells))
    return count.reshape(geometry.cells[0], -1)
