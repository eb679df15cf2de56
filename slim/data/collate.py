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
from slim.config import TrainSettings
from slim.data.masking import Mask
from slim.data.samples import Sample, draw_sample, empty_sample
from slim.model.geometry import Geometry
from slim.model.inputs import Batch, PackedBatch, Targets, Voxels
from slim.model.ragged import Plan, integers, plan, segments


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
        samples or [empty_sample(geometry, datasets[0].grid.voxels, settings)], geometry, settings.chunk_tokens
    )
    return replace(batch, damaged=damaged, empty=not samples).pack()


@lru_cache(maxsize=8)
def _tokens_of_cell(geometry: Geometry) -> np.ndarray:
    """Flat indices of the tokens of each cell, int64 (cells, tokens per cell), in C order inside the cell."""
    return np.argsort(geometry.cell_of, kind="stable").reshape(prod(geometry.cells), prod(geometry.cell))


def collate(samples: list[Sample], geometry: Geometry, chunk_tokens: int | None) -> Batch:
    """Combine samples into a batch: tables of values, plans, and targets if the samples are masked.

    The tables of all samples are concatenated. Row t * P + p of a sample's values is frame t of its patch p. Baseline
    and spread of voxels outside the brain mask are set to 0, so that no encoder uses their values.
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
