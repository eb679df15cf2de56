"""Layouts of sparse tokens in plain PyTorch: kept tokens are stored in contiguous segments of different lengths.

The kept tokens of a batch are sorted so that each mask unit, and the children of each pooled token, are contiguous. The
layout is then described by the lengths of these segments. `plan` computes it once per batch, on the CPU and in
integers; `slim.model.ragged_ops` has the operations on segments.

Legend: B samples; N tokens; U segments (mask units or samples); L tokens of the first global level; M tokens of the
last level; S a bucket's segments; Q, K padded queries and keys of a bucket; H heads; D channels of a head; C channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from slim.model.geometry import Geometry

# The shortest segment of a bucket has at least this share of the keys of the longest, which limits padding.
_FILL = 0.9


@dataclass
class Bucket:
    """Segments of similar length that are processed together: first row and length of their queries and keys."""

    q_first: Tensor
    q_length: Tensor
    k_first: Tensor
    k_length: Tensor
    q_max: int
    k_max: int
    full: bool  # all segments have k_max keys, so no mask is needed


@dataclass
class Children:
    """Contiguous segments that are pooled to one token each, longest first.

    Attributes
    ----------
    first_M : int tensor
        First row of each segment, longest first.
    back_M : int tensor
        Position of each segment in that order.
    at_least : sequence of int
        Numbers of segments with at least 1, 2, ... tokens.
    """

    first_M: Tensor
    back_M: Tensor
    at_least: list[int]


@dataclass
class Segments:
    """Segments for attention: the queries of a segment attend to the keys of the same segment only.

    Attributes
    ----------
    buckets : sequence of Bucket
        The segments by length, longest first.
    back_N : int tensor
        Position of each query's output in the concatenated outputs of the buckets, including padding.
    q_bound, k_bound : int tensor, (U + 1,)
        First row of each segment, followed by the number of rows, for varlen attention.
    """

    buckets: list[Bucket]
    back_N: Tensor
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


def integers(values: np.ndarray | list[int]) -> Tensor:
    """An int32 tensor; numbers of tokens are far below 2^31."""
    return torch.from_numpy(np.asarray(values, np.int32))


def _starts(length_U: np.ndarray) -> np.ndarray:
    """First row of each concatenated segment, followed by the number of rows; (U + 1,)."""
    return np.concatenate([[0], np.cumsum(length_U)])


def segments(q_length_U: np.ndarray, k_length_U: np.ndarray) -> Segments:
    """Segments for attention, from the numbers of queries and keys of concatenated segments."""
    q_bound, k_bound = _starts(q_length_U), _starts(k_length_U)
    order = np.argsort(-k_length_U, kind="stable")
    buckets, at, back_N, offset = [], 0, np.empty(int(q_bound[-1]), np.int64), 0
    while at < len(order):
        longest = k_length_U[order[at]]
        stop = at + int(np.searchsorted(-k_length_U[order[at:]], -_FILL * longest, side="right"))
        chosen = order[at:stop]
        q_length = q_length_U[chosen]
        before = _starts(q_length)[:-1]
        number = np.arange(int(q_length.sum()))
        padded = offset + np.arange(len(chosen)) * q_length.max()
        back_N[np.repeat(q_bound[chosen] - before, q_length) + number] = np.repeat(padded - before, q_length) + number
        offset += len(chosen) * int(q_length.max())
        buckets.append(
            Bucket(
                integers(q_bound[chosen]),
                integers(q_length),
                integers(k_bound[chosen]),
                integers(k_length_U[chosen]),
                int(q_length.max()),
                int(longest),
                bool((k_length_U[chosen] == longest).all()),
            )
        )
        at = stop
    return Segments(
        buckets,
        integers(back_N),
        integers(q_bound),
        integers(k_bound),
        int(q_length_U.max(initial=0)),
        int(k_length_U.max(initial=0)),
    )


def children(length_M: np.ndarray) -> Children:
    """Segments for pooling, from the numbers of tokens of concatenated segments."""
    order = np.argsort(-length_M, kind="stable")
    at_least = np.bincount(length_M)[::-1].cumsum()[::-1]
    return Children(integers(_starts(length_M)[order]), integers(np.argsort(order)), at_least[1:].tolist())


def _run_lengths(ids: np.ndarray) -> np.ndarray:
    """Lengths of the runs of equal values."""
    return np.diff(np.flatnonzero(np.concatenate([[True], ids[1:] != ids[:-1], [True]])))


@dataclass
class _Stages:
    """Segments of some stages: their lengths at each level, and the number of children of each pooled token.

    `first_M` is, for each token of the last level, the first token of the first level that is merged into it.
    """

    lengths: list[np.ndarray]
    children: list[np.ndarray]
    first_M: np.ndarray

    @classmethod
    def climb(cls, segment_N: np.ndarray, parents: list[np.ndarray]) -> _Stages:
        """Build from each token's segment and its parent at each level. Tokens with equal parents are contiguous."""
        lengths, below, first = [_run_lengths(segment_N)], [], np.arange(len(segment_N))
        for parent_N in parents:
            run = _run_lengths(parent_N[first])
            below.append(run)
            first = first[_starts(run)[:-1]]
            lengths.append(_run_lengths(segment_N[first]))
        return cls(lengths, below, first)

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
    token_BN: list[np.ndarray],
    row_BN: list[np.ndarray],
    patch_BN: list[np.ndarray],
    chunk_tokens: int | None = None,
) -> Plan:
    """Sort the tokens of a batch and compute the layout of its segments.

    Parameters
    ----------
    geometry : Geometry
    token_BN : sequence of int arrays
        For each sample, the flat indices of its tokens in the dense token grid, in any order, without duplicates.
    row_BN, patch_BN : sequence of int arrays
        For each sample, the rows of its tokens in the batch's tables of voxel values and of patches.
    chunk_tokens : int, optional
        Largest number of tokens in a chunk of mask units; a single unit may exceed it. None for one chunk.
    """
    total = geometry.order.size
    token_N, row_N, patch_N = (np.concatenate(part) for part in (token_BN, row_BN, patch_BN))
    sample_N = np.repeat(np.arange(len(token_BN)), [len(token) for token in token_BN])
    order_N = sample_N * total + geometry.order[token_N]
    # Longest units first, so that units of similar length share a chunk and a bucket, with little padding.
    unit_N = sample_N * total + geometry.unit_of[token_N]
    length_N = np.bincount(unit_N)[unit_N]
    by = np.lexsort((order_N, -length_N))
    token_N, row_N, patch_N, sample_N, unit_N, order_N = (
        values[by] for values in (token_N, row_N, patch_N, sample_N, unit_N, order_N)
    )
    parents = [sample_N * total + ancestor[token_N] for ancestor in geometry.ancestors]
    local = _Stages.climb(unit_N, parents[: geometry.local_steps])
    by_L = np.argsort(order_N[local.first_M])
    first_L = local.first_M[by_L]
    samples = _Stages.climb(sample_N[first_L], [parent[first_L] for parent in parents[geometry.local_steps :]])
    first_M = first_L[samples.first_M]
    places = total // geometry.tokens[0]
    return Plan(
        integers(row_N),
        integers(patch_N),
        integers(sample_N * geometry.tokens[0] + token_N // places),
        integers(token_N % places),
        [local.chunk(*bounds) for bounds in pairwise(_chunk_bounds(local.lengths[0], chunk_tokens))],
        integers(by_L),
        samples.chunk(0, len(samples.lengths[0])),
        integers(geometry.cell_of[token_N[first_M]]),
        integers(sample_N[first_M]),
        integers([len(token) for token in token_BN]),
    )


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
