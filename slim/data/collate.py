"""Make batches from items of the stream; runs in the loading processes.

Legend: B samples; S slots; L places; K targets of the batch; G cells that are rebuilt; E tokens of a cell; M cells of
all brain tokens; J joint sequence of context and targets; R, Q, V as in `slim.model.hiera`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from math import prod

import numpy as np
import torch
from torch import Tensor

from shards.core.errors import SampleCorrupt
from shards.format.reader import Dataset
from shards.format.stream import Item
from slim.config import KINDS, TrainSettings
from slim.data.masking import Mask
from slim.data.samples import Sample, draw_sample, empty_sample
from slim.model.geometry import Geometry
from slim.model.inputs import Batch, PackedBatch, Targets, Voxels
from slim.model.ragged import Plan, first_rows, integers, patch_table, plan, segments


def load_batch(
    items: Sequence[Item], datasets: Sequence[Dataset], geometry: Geometry, settings: TrainSettings
) -> PackedBatch:
    """Load a packed micro-batch for training. Damaged samples are left out and listed in `damaged`."""
    samples, damaged = [], {}
    for item in items:
        try:
            samples.append(draw_sample(item, datasets[item.dataset], geometry, settings))
        except SampleCorrupt as error:
            damaged[item.session.key] = error.line()
    batch = collate(
        samples or [empty_sample(geometry, datasets[0].grid.voxels, settings)], geometry, settings.tokens_at_once
    )
    return replace(batch, damaged=damaged, empty=not samples).pack()


def collate(samples: list[Sample], geometry: Geometry, chunk_tokens: int | None) -> Batch:
    """Combine samples into a batch: tables of values, plans, and targets if the samples are masked.

    The tables of all samples are concatenated. Row t * P + p of a sample's values is frame t of its patch p. Baseline
    and spread of voxels outside the brain mask are set to 0, so that no encoder uses their values.
    """

    def table(name: str) -> Tensor:
        return torch.from_numpy(np.concatenate([getattr(s, name).reshape(-1, s.baseline.shape[1]) for s in samples]))

    brain_QV = table("brain")
    baseline_QV, spread_QV = (torch.where(brain_QV > 0, table(name), 0) for name in ("baseline", "spread"))
    second_BT = np.stack([_seconds(sample, geometry) for sample in samples])
    voxels = Voxels(table("value"), baseline_QV, spread_QV, torch.from_numpy(second_BT))
    place_BP, frames_B = [sample.place for sample in samples], [len(sample.second) for sample in samples]
    whole = plan(geometry, place_BP, chunk_tokens=chunk_tokens, frames_B=frames_B)
    batch = Batch([s.key for s in samples], [s.epoch for s in samples], voxels, brain_QV, whole)
    if any(sample.mask is None for sample in samples):
        return batch
    masks = [sample.mask for sample in samples if sample.mask is not None]
    kept_BC = np.zeros((len(masks), prod(geometry.cells)), bool)
    for kept_C, mask in zip(kept_BC, masks, strict=True):
        kept_C[mask.context_K] = True
    context = plan(geometry, place_BP, kept_BC, chunk_tokens, frames_B)
    return replace(batch, context=context, targets=_targets(geometry, masks, whole, context, samples))


def _seconds(sample: Sample, geometry: Geometry) -> np.ndarray:
    """Time of every frame of the geometry in s, float32 (T,).

    No token reads the time of a frame that the sample lacks. Where its last slot is filled in part, the frames that it
    lacks get the mean time of those it has, so that the mean over the slot is the mean of its own frames.
    """
    frames, second_T = geometry.tokens[0], sample.second
    last_T = second_T[len(second_T) // geometry.cell[0] * geometry.cell[0] :]
    filler = last_T.mean() if len(last_T) else 0
    return np.concatenate([second_T, np.full(frames - len(second_T), filler, np.float32)])


def _targets(geometry: Geometry, masks: list[Mask], whole: Plan, context: Plan, samples: list[Sample]) -> Targets:
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
    value_GE, patch_GE = _rows_of_cells(geometry, samples, sample_K[rebuilt_G], cell_K[rebuilt_G])
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
        of_kind=np.bincount(np.concatenate([mask.kind_K for mask in masks]), minlength=len(KINDS)).tolist(),
        joint=segments(of_sample, of_sample),
        slots=segments(of_slot, of_slot),
        **{name: integers(array) for name, array in arrays.items()},
    )


@lru_cache(maxsize=8)
def _tokens_of_cell(geometry: Geometry) -> np.ndarray:
    """Flat indices of the tokens of each cell, int32 (cells, tokens per cell), in C order inside the cell."""
    tokens = np.argsort(geometry.cell_of, kind="stable").astype(np.int32)
    return tokens.reshape(prod(geometry.cells), prod(geometry.cell))


def _rows_of_cells(
    geometry: Geometry, samples: list[Sample], sample_G: np.ndarray, cell_G: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Rows in the batch's tables of voxel values and of patches of the tokens of cells, (G, E).

    They are -1 for tokens without brain, and for frames that a sample lacks.
    """
    place_BP, places = [sample.place for sample in samples], np.int32(prod(geometry.tokens[1:]))
    frame_GE, space_GE = np.divmod(_tokens_of_cell(geometry)[cell_G], places)
    patch_GE = patch_table(place_BP, int(places)).ravel()[(sample_G.astype(np.int32) * places)[:, None] + space_GE]
    patches_B = np.array([len(place) for place in place_BP], np.int32)
    frames_B = np.array([len(sample.second) for sample in samples], np.int32)
    first_B, first_row_B = first_rows(patches_B, frames_B)
    value_GE = first_row_B[sample_G][:, None] + frame_GE * patches_B[sample_G][:, None] + patch_GE
    there_GE = (patch_GE >= 0) & (frame_GE < frames_B[sample_G][:, None])
    return np.where(there_GE, value_GE, -1), np.where(there_GE, first_B[sample_G][:, None] + patch_GE, -1)
