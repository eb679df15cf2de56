"""From items of the stream to batches of gathered tokens, in the loading processes.

Legend: B samples; S slots; L places; K targets of the batch; G cells that are rebuilt; E tokens of a cell; M cells of
all brain tokens; J joint sequence of context and targets; R, Q, V as in `slim.model.hiera`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shards.core.errors import ConfigError, SampleCorrupt
from shards.format.reader import Dataset, Samples
from shards.format.stream import Item, generator
from slim.config import PretrainSettings, TrainSettings
from slim.data.masking import Mask, draw
from slim.model.geometry import Geometry
from slim.model.hiera import Voxels
from slim.model.packed import Packed
from slim.model.ragged import Plan, Segments, integers, plan, segments


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


@dataclass
class Targets:
    """What is to be predicted.

    Attributes
    ----------
    cell_K, sample_K, kind_K : cell, sample and kind of each target, sample by sample
    row_K : row of each target among the cells of the whole-brain plan
    joint, slots : attention over context and targets of a sample together, and over those of one slot
    joint_J : rows of cat(context, targets) in the order both expect; back_K the targets' rows in that order
    rebuilt_G : targets whose voxels are rebuilt; value_GE rows of their tokens in the voxel table, -1 where none is;
    patch_GE : rows in the patch table, likewise
    """

    cell_K: Tensor
    sample_K: Tensor
    kind_K: Tensor
    row_K: Tensor
    joint: Segments
    slots: Segments
    joint_J: Tensor
    back_K: Tensor
    rebuilt_G: Tensor
    value_GE: Tensor
    patch_GE: Tensor


@dataclass
class Batch:
    """A micro-batch: values, the context's plan, the plan of all brain tokens, and the targets.

    `damaged` names the samples that were left out, with reasons; where nothing else was there the batch is `empty`, and
    what it holds stands for nothing.
    """

    keys: list[str]
    epochs: list[int]
    voxels: Voxels
    brain_QV: Tensor
    whole: Plan
    context: Plan | None = None
    targets: Targets | None = None
    damaged: dict[str, str] = field(default_factory=dict)
    empty: bool = False

    def pack(self) -> PackedBatch:
        """The same in few tensors, to be sent between processes and to a device."""
        plans = Packed([self.whole, self.context, self.targets])
        return PackedBatch(self.keys, self.epochs, self.voxels, self.brain_QV, plans, self.damaged, self.empty)

    def to(self, device: torch.device | str) -> Batch:
        return self.pack().to(device)


@dataclass
class PackedBatch:
    """A batch on its way from a loading process."""

    keys: list[str]
    epochs: list[int]
    voxels: Voxels
    brain_QV: Tensor
    plans: Packed
    damaged: dict[str, str]
    empty: bool

    def to(self, device: torch.device | str) -> Batch:
        """The batch on `device`."""
        whole, context, targets = self.plans.to(device)
        voxels, brain_QV = self.voxels.to(device), self.brain_QV.to(device)
        return Batch(self.keys, self.epochs, voxels, brain_QV, whole, context, targets, dict(self.damaged), self.empty)


# What all data of a model share: with another one, equal numbers in a sample would mean something else.
_SHARED = ("grid", "windows.frames", "tr", "tr_range", "normalisation")


def unlike(manifest: Mapping[str, Any], other: Mapping[str, Any]) -> tuple[str, Any, Any] | None:
    """The first in which two datasets differ that one model is to read: field, and both values; None if they fit."""

    def value(of: Mapping[str, Any], field: str) -> Any:
        name, _, part = field.partition(".")
        return of[name][part] if part else of[name]

    pairs = ((field, value(manifest, field), value(other, field)) for field in _SHARED)
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
    geometry = settings.model.geometry(tokens)
    if prod(geometry.cells[1:]) < 2:
        raise ConfigError("model", "strides", f"{geometry.cells[1:]} cells in space", "2 cells or more")
    return geometry


def read_windows(dataset: Samples, session: dict, rank_K: Sequence[int] | np.ndarray, epoch: int = 0) -> Sample:
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
    second = (start_K[in_time][:, None] + np.arange(frames)) * session["tr"]
    place = np.ravel_multi_index(tuple(arrays["patch"].T.astype(np.intp)), dataset.grid.patch_shape)
    return Sample(
        session["key"],
        epoch,
        arrays["windows"][in_time].reshape(k * frames, patches, voxels),
        arrays["baseline"],
        arrays["spread"],
        arrays["brain"],
        place,
        second.reshape(-1).astype(np.float32),
    )


def firsts(count: int, k: int) -> list[int]:
    """First window of each group of k of `count` in time order; the last one reaches back where k leaves a rest."""
    return [*range(0, count - k, k), count - k]


def load_batch(
    items: Sequence[Item], datasets: Sequence[Dataset], geometry: Geometry, settings: TrainSettings
) -> PackedBatch:
    """A micro-batch for training, packed; samples that are damaged are left out and named."""
    samples, damaged = [], {}
    for item in items:
        try:
            samples.append(draw_sample(item, datasets[item.dataset], geometry, settings))
        except SampleCorrupt as error:
            damaged[item.session["key"]] = error.line()
    batch = collate(samples or [_nothing(geometry, datasets[0].grid.voxels, settings)], geometry, settings.stream)
    return replace(batch, damaged=damaged, empty=not samples).pack()


def _nothing(geometry: Geometry, voxels: int, settings: TrainSettings) -> Sample:
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
    windows, seed, key = settings.windows, settings.run.seed, item.session["key"]
    best = min(windows.best, item.session["n_kept"])
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


@lru_cache(maxsize=8)
def _tokens_of_cell(geometry: Geometry) -> np.ndarray:
    """Tokens of each cell, int64 (cells, tokens of a cell), in C order inside the cell."""
    return np.argsort(geometry.cell_of, kind="stable").reshape(prod(geometry.cells), prod(geometry.cell))


def cell_sizes(geometry: Geometry, place: np.ndarray) -> np.ndarray:
    """Brain tokens of each cell, int64 (S, L), given the flat patch places that hold brain."""
    frames, places = geometry.tokens[0], prod(geometry.tokens[1:])
    tokens = (np.arange(frames)[:, None] * places + place).ravel()
    count = np.bincount(geometry.cell_of[tokens], minlength=prod(geometry.cells))
    return count.reshape(geometry.cells[0], -1)


def collate(samples: list[Sample], geometry: Geometry, chunk_tokens: int | None) -> Batch:
    """Put samples together: tables of values, plans, and (for masked samples) targets.

    Tables of all samples lie one after another: row t * P + p of a sample's values is frame t of its patch p. Voxels
    outside the mask have baseline and spread 0 here, whatever the sample holds there, so no encoder sees them.
    """
    frames, places = geometry.tokens[0], prod(geometry.tokens[1:])
    token_BN, row_BN, patch_BN, dense_B = [], [], [], []
    row_at = patch_at = 0
    for sample in samples:
        n = len(sample.place)
        token = (np.arange(frames)[:, None] * places + sample.place).ravel()
        token_BN.append(token)
        row_BN.append(row_at + np.arange(frames * n))
        patch_BN.append(patch_at + np.tile(np.arange(n), frames))
        dense = np.full(frames * places, -1)
        dense[token] = np.arange(frames * n)
        dense_B.append(dense)
        row_at += frames * n
        patch_at += n

    def table(name: str) -> Tensor:
        return torch.from_numpy(np.concatenate([getattr(s, name).reshape(-1, s.baseline.shape[1]) for s in samples]))

    brain_QV = table("brain")
    baseline_QV, spread_QV = (torch.where(brain_QV > 0, table(name), 0) for name in ("baseline", "spread"))
    voxels = Voxels(table("value"), baseline_QV, spread_QV, torch.from_numpy(np.stack([s.second for s in samples])))
    whole = plan(geometry, token_BN, row_BN, patch_BN, chunk_tokens)
    batch = Batch([s.key for s in samples], [s.epoch for s in samples], voxels, brain_QV, whole)
    if any(sample.mask is None for sample in samples):
        return batch

    masks = [sample.mask for sample in samples if sample.mask is not None]
    kept_BN = []
    for token, mask in zip(token_BN, masks, strict=True):
        in_context = np.zeros(prod(geometry.cells), bool)
        in_context[mask.context_K] = True
        kept_BN.append(in_context[geometry.cell_of[token]])
    context = plan(
        geometry,
        [t[k] for t, k in zip(token_BN, kept_BN, strict=True)],
        [r[k] for r, k in zip(row_BN, kept_BN, strict=True)],
        [p[k] for p, k in zip(patch_BN, kept_BN, strict=True)],
        chunk_tokens,
    )
    return replace(batch, context=context, targets=_targets(geometry, masks, whole, context, row_BN, patch_BN, dense_B))


def _targets(
    geometry: Geometry,
    masks: list[Mask],
    whole: Plan,
    context: Plan,
    row_BN: list[np.ndarray],
    patch_BN: list[np.ndarray],
    dense_B: list[np.ndarray],
) -> Targets:
    cells = prod(geometry.cells)
    sample_K = np.repeat(np.arange(len(masks)), [len(mask.target_K) for mask in masks])
    cell_K = np.concatenate([mask.target_K for mask in masks])
    number_M = whole.sample_M.numpy() * cells + whole.cell_M.numpy()
    by = np.argsort(number_M)
    row_K = by[np.searchsorted(number_M[by], sample_K * cells + cell_K)]

    sample_C = context.sample_M.numpy()
    slot_J = np.concatenate([context.cell_M.numpy(), cell_K]) // prod(geometry.cells[1:])
    row_J = np.concatenate([sample_C, sample_K]) * geometry.cells[0] + slot_J
    joint_J = np.argsort(row_J, kind="stable")
    back = np.empty(len(joint_J), np.int64)
    back[joint_J] = np.arange(len(joint_J))
    of_slot = np.bincount(row_J, minlength=len(masks) * geometry.cells[0])
    of_sample = of_slot.reshape(len(masks), -1).sum(axis=1)
    of_slot = of_slot[of_slot > 0]

    rebuilt_G = np.flatnonzero(np.concatenate([mask.rebuilt_K for mask in masks]))
    tokens_GE = _tokens_of_cell(geometry)[cell_K[rebuilt_G]]
    value_GE, patch_GE = np.full(tokens_GE.shape, -1), np.full(tokens_GE.shape, -1)
    for sample, dense in enumerate(dense_B):
        mine = sample_K[rebuilt_G] == sample
        local = dense[tokens_GE[mine]]
        there = local >= 0
        value_GE[mine] = np.where(there, row_BN[sample][local], -1)
        patch_GE[mine] = np.where(there, patch_BN[sample][local], -1)
    arrays = {
        "cell_K": cell_K,
        "sample_K": sample_K,
        "kind_K": np.concatenate([mask.kind_K for mask in masks]),
        "row_K": row_K,
        "joint_J": joint_J,
        "back_K": back[len(sample_C) :],
        "rebuilt_G": rebuilt_G,
        "value_GE": value_GE,
        "patch_GE": patch_GE,
    }
    return Targets(
        joint=segments(of_sample, of_sample),
        slots=segments(of_slot, of_slot),
        **{name: integers(array) for name, array in arrays.items()},
    )
