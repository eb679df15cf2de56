"""Layouts of sparse tokens in plain PyTorch: kept tokens are stored in contiguous segments of different lengths.

The kept tokens of a batch are sorted so that each mask unit, and the children of each pooled token, are contiguous. The
layout is then described by the lengths of these segments. `plan` computes it once per batch, on the CPU and in
integers; `slim.model.ragged_ops` has the operations on segments.

Nothing is sorted token by token. `Geometry.in_order` lists all tokens of the dense grid so that every unit, and every
token of a later level, is a block of fixed size. The kept tokens of a batch are a table of booleans in that order, and
the lengths of segments are sums over its blocks; only the mask units, some hundred per sample, are sorted.

Legend: B samples; R tokens of the dense grid, in the geometry's order; P patches that hold brain; S places of the
spatial grid; C cells; N kept tokens; U segments (mask units or samples); L tokens of the first global level; M tokens
of a later level.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import prod

import numpy as np
import torch
from torch import Tensor

from slim.model.geometry import Geometry


@dataclass
class Children:
    """Contiguous segments that are pooled to one token each.

    Attributes
    ----------
    first_M, length_M : int tensor
        First row and number of tokens of each segment.
    most : int
        Largest number of tokens.
    """

    first_M: Tensor
    length_M: Tensor
    most: int


@dataclass
class Segments:
    """Segments for attention: the queries of a segment attend to the keys of the same segment only.

    Attributes
    ----------
    runs : sequence of (int, int, int)
        Number of consecutive segments of equal lengths, their queries and their keys, in the order of `q_order_N` and
        `k_order_N`. A run needs no padding.
    q_order_N, k_order_N : int tensor, optional
        Rows of queries and of keys, so that segments of equal lengths are next to each other; None if they are already.
    q_back_N : int tensor, optional
        Positions of the queries in that order; None as `q_order_N`.
    q_bound, k_bound : int tensor, (U + 1,)
        First row of each segment, followed by the number of rows, for varlen attention.
    q_max, k_max : int
        Largest numbers of queries and of keys, for varlen attention.
    """

    runs: list[tuple[int, int, int]]
    q_order_N: Tensor | None
    k_order_N: Tensor | None
    q_back_N: Tensor | None
    q_bound: Tensor
    k_bound: Tensor
    q_max: int
    k_max: int


@dataclass
class Chunk:
    """Whole segments (mask units; samples in the global stages) that are computed together in some stages.

    `levels[i]` attends inside segments at pooling level i; `pools[i]` has queries of level i + 1 and keys of level i;
    `children[i]` are the tokens of level i below each token of level i + 1.
    """

    first: int
    stop: int
    levels: list[Segments]
    pools: list[Segments]
    children: list[Children]


@dataclass
class Plan:
    """Layout of the kept tokens of a batch: their positions, and the segments for attention and pooling.

    In the local stages, mask units are sorted by length, across samples. In the global stages, tokens are sorted by
    sample, in the order of the geometry. All tensors are int32.

    Attributes
    ----------
    row_N, patch_N : int tensors
        Rows of the sorted tokens in the batch's tables of voxel values and of patches.
    frame_N : int tensor
        sample * frames + position on the first axis, of each token.
    space_N : int tensor
        Flat position of each token on the other axes.
    chunks : sequence of Chunk
        The mask units, in order, for the local stages.
    by_sample_L : int tensor
        Order of the tokens for the global stages, as rows of the output of the local stages.
    samples : Chunk
        The samples, for the global stages.
    cell_M, sample_M : int tensors
        Flat index of the cell, and sample, of every token of the last level.
    tokens_B : int tensor
        Number of tokens of each sample.
    cells_B, slots_B : sequence of int
        Number of tokens of the last level of each sample, and of its slots; not tensors, so that nobody waits for a
        device to read them.
    """

    row_N: Tensor
    patch_N: Tensor
    frame_N: Tensor
    space_N: Tensor
    chunks: list[Chunk]
    by_sample_L: Tensor
    samples: Chunk
    cell_M: Tensor
    sample_M: Tensor
    tokens_B: Tensor
    cells_B: list[int]
    slots_B: list[int]


def integers(values: np.ndarray | list[int]) -> Tensor:
    """An int32 tensor; numbers of tokens are far below 2^31."""
    return torch.from_numpy(np.asarray(values, np.int32))


def _starts(length_U: np.ndarray) -> np.ndarray:
    """First row of each concatenated segment, followed by the number of rows; (U + 1,)."""
    return np.concatenate([[0], np.cumsum(length_U)])


def _rows(first_U: np.ndarray, length_U: np.ndarray) -> np.ndarray:
    """Rows of segments, one segment after the other; int32 (N,)."""
    before_U = _starts(length_U)
    shift_U = (first_U - before_U[:-1]).astype(np.int32)
    return np.repeat(shift_U, length_U) + np.arange(before_U[-1], dtype=np.int32)


def _inverse(order_N: np.ndarray) -> np.ndarray:
    """Positions of 0, 1, ... in an order."""
    back_N = np.empty_like(order_N)
    back_N[order_N] = np.arange(len(order_N), dtype=order_N.dtype)
    return back_N


def segments(q_length_U: np.ndarray, k_length_U: np.ndarray) -> Segments:
    """Segments for attention, from the numbers of queries and keys of concatenated segments."""
    q_bound, k_bound = _starts(q_length_U), _starts(k_length_U)
    order_U = np.lexsort((-q_length_U, -k_length_U))
    both_U2 = np.stack([q_length_U, k_length_U], axis=1)[order_U]
    firsts = np.flatnonzero(np.concatenate([[True], (both_U2[1:] != both_U2[:-1]).any(axis=1)])[: len(order_U)])
    counts = np.diff([*firsts, len(order_U)])
    runs = [(int(count), int(q), int(k)) for count, (q, k) in zip(counts, both_U2[firsts], strict=True)]
    q_order_N = k_order_N = q_back_N = None
    if (order_U[1:] < order_U[:-1]).any():
        q_rows_N = _rows(q_bound[order_U], both_U2[:, 0])
        q_order_N, q_back_N = integers(q_rows_N), integers(_inverse(q_rows_N))
        k_order_N = q_order_N if q_length_U is k_length_U else integers(_rows(k_bound[order_U], both_U2[:, 1]))
    return Segments(
        runs,
        q_order_N,
        k_order_N,
        q_back_N,
        integers(q_bound),
        integers(k_bound),
        int(q_length_U.max(initial=0)),
        int(k_length_U.max(initial=0)),
    )


def children(length_M: np.ndarray) -> Children:
    """Segments for pooling, from the numbers of tokens of concatenated segments."""
    return Children(integers(_starts(length_M)[:-1]), integers(length_M), int(length_M.max(initial=0)))


@dataclass
class _Stages:
    """Segments of some stages: their lengths at each level, and the number of children of each pooled token."""

    lengths: list[np.ndarray]
    children: list[np.ndarray]

    def chunk(self, first: int, stop: int) -> Chunk:
        """The chunk of the segments from `first` up to `stop`."""
        lengths = [length[first:stop] for length in self.lengths]
        starts = [(int(length[:first].sum()), int(length[:stop].sum())) for length in self.lengths]
        return Chunk(
            *starts[0],
            [segments(level, level) for level in lengths],
            [segments(above, below) for below, above in pairwise(lengths)],
            [children(run[slice(*start)]) for run, start in zip(self.children, starts[1:], strict=True)],
        )


def plan(
    geometry: Geometry,
    place_BP: list[np.ndarray],
    kept_BC: np.ndarray | None = None,
    chunk_tokens: int | None = None,
    frames_B: Sequence[int] | None = None,
) -> Plan:
    """Compute the layout of the tokens of a batch.

    Row t * P + p of a sample's values is frame t of its patch p; the tables of the samples are concatenated. A sample
    may have fewer frames than the geometry: its later frames have no tokens.

    Parameters
    ----------
    geometry : Geometry
    place_BP : sequence of int arrays
        For each sample, the flat positions of its patches on the spatial grid, without duplicates.
    kept_BC : bool (B, C), optional
        The cells to keep; by default all.
    chunk_tokens : int, optional
        Largest number of tokens in a chunk of mask units; a single unit may exceed it. None for one chunk.
    frames_B : sequence of int, optional
        Number of frames of each sample; by default all of the geometry.
    """
    frames, places = geometry.tokens[0], prod(geometry.tokens[1:])
    samples, cell = len(place_BP), prod(geometry.cell)
    patch_BS = patch_table(place_BP, places)
    kept_BR = np.take(patch_BS >= 0, geometry.space_in_order, axis=1)
    length_B = np.full(samples, frames, np.int32) if frames_B is None else np.array(frames_B, np.int32)
    for row in np.flatnonzero(length_B < frames):
        kept_BR[row] &= geometry.frame_in_order < length_B[row]
    if kept_BC is not None:
        kept_BR &= np.repeat(np.take(kept_BC, geometry.cell_in_order, axis=1), cell, axis=1)

    exists, below = [kept_BR], []  # at each level: which tokens there are, and the numbers of their children
    for stride in geometry.strides:
        number_BM = exists[-1].reshape(samples, -1, prod(stride)).sum(axis=2, dtype=np.int32)
        exists.append(number_BM > 0)
        below.append(number_BM[exists[-1]])
    steps, units = geometry.local_steps, prod(geometry.tokens) // prod(geometry.unit)
    length_LBU = [np.count_nonzero(level.reshape(samples, units, -1), axis=2) for level in exists[: steps + 1]]
    there_BU = length_LBU[0] > 0
    lengths = [length_BU[there_BU] for length_BU in length_LBU]
    # Longest units first, so that units of equal length are next to each other.
    order_U = np.lexsort([-length for length in reversed(lengths)])
    rows = [_rows(_starts(length)[order_U], length[order_U]) for length in lengths]
    local = _Stages(
        [length[order_U] for length in lengths],
        [number[row] for number, row in zip(below[:steps], rows[1:], strict=True)],
    )
    whole = _Stages([np.count_nonzero(level, axis=1) for level in exists[steps:]], below[steps:])

    tokens_B = length_LBU[0].sum(axis=1)
    at_N = np.concatenate([np.flatnonzero(kept_R) for kept_R in kept_BR]).astype(np.int32)[rows[0]]
    sample_N = np.repeat(np.arange(samples, dtype=np.int32), tokens_B)[rows[0]]
    frame_N, space_N = geometry.frame_in_order[at_N], geometry.space_in_order[at_N]
    patch_N = patch_BS.ravel()[sample_N * np.int32(places) + space_N]
    patches_B = np.array([len(place) for place in place_BP], np.int32)
    first_B, first_row_B = first_rows(patches_B, length_B)
    cell_M = np.flatnonzero(exists[-1])
    sample_M, at_M = np.divmod(cell_M, exists[-1].shape[1])
    return Plan(
        integers(first_row_B[sample_N] + frame_N * patches_B[sample_N] + patch_N),
        integers(first_B[sample_N] + patch_N),
        integers(sample_N * np.int32(frames) + frame_N),
        integers(space_N),
        [local.chunk(*bounds) for bounds in pairwise(_chunk_bounds(local.lengths[0], chunk_tokens))],
        integers(_inverse(rows[-1])),
        whole.chunk(0, samples),
        integers(geometry.cell_in_order[at_M]),
        integers(sample_M),
        integers(tokens_B),
        np.bincount(sample_M, minlength=samples).tolist(),
        [geometry.slots(int(length)) for length in length_B],
    )


def first_rows(patches_B: np.ndarray, frames_B: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """First row of each sample in the batch's tables of patches and of voxel values, int32 (B,)."""
    return (_starts(patches_B)[:-1].astype(np.int32), _starts(patches_B * frames_B)[:-1].astype(np.int32))


def patch_table(place_BP: list[np.ndarray], places: int) -> np.ndarray:
    """For each sample, the number of the patch at every place, -1 where there is none; int32 (B, S)."""
    patch_BS = np.full((len(place_BP), places), -1, np.int32)
    for patch_S, place in zip(patch_BS, place_BP, strict=True):
        patch_S[place] = np.arange(len(place))
    return patch_BS


def _chunk_bounds(lengths_U: np.ndarray, chunk_tokens: int | None) -> list[int]:
    """Bounds of chunks between units. No chunk exceeds `chunk_tokens`, unless it is a single unit."""
    if chunk_tokens is None:
        return [0, len(lengths_U)]
    bounds, filled = [0], 0
    for unit, length in enumerate(lengths_U):
        if filled and filled + length > chunk_tokens:
            bounds.append(unit)
            filled = 0
        filled += int(length)
    return [*bounds, len(lengths_U)]
