"""Sparse patch gathers in plain PyTorch: only tokens that exist are ever stored, in contiguous ragged segments.

The kept tokens of a batch are sorted so that each mask unit, and the children of each pooled token, lie side by side;
lengths then say everything. `plan` works that out once per batch, on the CPU and in integers; `attend` and
`segment_max` are the two ragged operations an encoder needs.

Legend: B samples; N tokens; U segments (mask units or samples); M pooled tokens; S a bucket's segments; Q, K padded
queries and keys of a bucket; H heads; D channels of a head; C channels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, is_dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from slim.geometry import Geometry

# Segments share a bucket while the shortest has at least this share of the longest's keys: padding stays small.
_FILL = 0.8


@dataclass
class Bucket:
    """Segments of similar length that are attended to at once: first row and length of their queries and keys."""

    q_first: Tensor
    q_length: Tensor
    k_first: Tensor
    k_length: Tensor
    q_max: int
    k_max: int
    full: bool  # all segments have k_max keys: no mask is needed


@dataclass
class Segments:
    """Ragged attention: queries of segment u see the keys of segment u and no others."""

    buckets: list[Bucket]
    back: Tensor  # (N,) where each query's output lies in the concatenated outputs of the buckets


@dataclass
class Chunk:
    """Whole mask units that pass through the local stages together.

    `levels[i]` attends inside units at pooling level i; `pools[i]` has queries of level i + 1 and keys of level i;
    `children[i]` counts the tokens of level i below each token of level i + 1.
    """

    first: int
    stop: int
    levels: list[Segments]
    pools: list[Segments]
    children: list[Tensor]


@dataclass
class Plan:
    """Where every kept token of a batch lies and what it attends to; everything an encoder needs beside the values.

    Attributes
    ----------
    row_N : rows of the tokens in the batch's table of voxel values, in sorted order
    patch_N : rows of the tokens in the batch's table of patches
    time_N, space_N : place of each token on the first axis, and (flat) on the others
    chunks : the mask units, in order
    cell_M : flat cell index of every token of the last level; sample_M : its sample
    whole : attention over all cells of a sample
    tokens_B : tokens of each sample
    """

    row_N: Tensor
    patch_N: Tensor
    time_N: Tensor
    space_N: Tensor
    chunks: list[Chunk]
    cell_M: Tensor
    sample_M: Tensor
    whole: Segments
    tokens_B: Tensor


class Packed:
    """A tree of dataclasses and lists whose integer tensors lie in one buffer.

    A plan has thousands of small tensors. Sent one by one from a loading process they take a file descriptor each, and
    a copy each to the device; packed they take one.
    """

    def __init__(self, tree: Any):
        parts: list[Tensor] = []
        self._at = 0
        self._tree = self._take(tree, parts)
        self._buffer = torch.cat(parts) if parts else torch.zeros(0, dtype=torch.long)

    def _take(self, item: Any, parts: list[Tensor]) -> Any:
        if isinstance(item, Tensor):
            assert item.dtype == torch.long
            parts.append(item.reshape(-1))
            self._at += item.numel()
            return _Slot(self._at - item.numel(), tuple(item.shape))
        return _rebuild(item, lambda part: self._take(part, parts))

    def to(self, device: torch.device | str) -> Any:
        """The tree again, its tensors views of one buffer on `device`."""
        buffer = self._buffer.to(device, non_blocking=True)

        def give(item: Any) -> Any:
            if isinstance(item, _Slot):
                return buffer[item.first : item.first + math.prod(item.shape)].view(item.shape)
            return _rebuild(item, give)

        return give(self._tree)


@dataclass
class _Slot:
    first: int
    shape: tuple[int, ...]


def _rebuild(item: Any, change: Callable[[Any], Any]) -> Any:
    """A list or dataclass with `change` applied to its parts; anything else as it is."""
    if isinstance(item, list):
        return [change(part) for part in item]
    if is_dataclass(item) and not isinstance(item, _Slot | type):
        return type(item)(**{name: change(value) for name, value in vars(item).items()})
    return item


def segments(q_length_U: np.ndarray, k_length_U: np.ndarray) -> Segments:
    """Buckets of segments with these many queries and keys, lying one after another in the tensors."""
    q_first = np.concatenate([[0], np.cumsum(q_length_U)[:-1]])
    k_first = np.concatenate([[0], np.cumsum(k_length_U)[:-1]])
    order = np.argsort(-k_length_U, kind="stable")
    buckets, at, back, offset = [], 0, np.empty(int(q_length_U.sum()), np.int64), 0
    while at < len(order):
        longest = k_length_U[order[at]]
        stop = at + int(np.searchsorted(-k_length_U[order[at:]], -_FILL * longest, side="right"))
        chosen = order[at:stop]
        q_length = q_length_U[chosen]
        rows = np.repeat(q_first[chosen] - np.concatenate([[0], np.cumsum(q_length)[:-1]]), q_length)
        rows = rows + np.arange(len(rows))
        back[rows] = offset + np.arange(len(rows))
        offset += len(rows)
        buckets.append(
            Bucket(
                torch.from_numpy(q_first[chosen]),
                torch.from_numpy(q_length),
                torch.from_numpy(k_first[chosen]),
                torch.from_numpy(k_length_U[chosen]),
                int(q_length.max()),
                int(longest),
                bool((k_length_U[chosen] == longest).all()),
            )
        )
        at = stop
    return Segments(buckets, torch.from_numpy(back))


def _run_lengths(ids: np.ndarray) -> np.ndarray:
    """Lengths of the runs of equal values."""
    return np.diff(np.flatnonzero(np.concatenate([[True], ids[1:] != ids[:-1], [True]])))


def plan(
    geometry: Geometry,
    token_BN: list[np.ndarray],
    row_BN: list[np.ndarray],
    patch_BN: list[np.ndarray],
    chunk_tokens: int | None = None,
) -> Plan:
    """Sort the tokens of a batch and lay out its ragged segments.

    Parameters
    ----------
    geometry : Geometry
    token_BN : per sample, flat places (in the dense token grid) of its tokens, in any order, none twice
    row_BN, patch_BN : per sample, the tokens' rows in the batch's tables of voxel values and of patches
    chunk_tokens : int, optional
        Mask units are put into chunks of at most this many tokens (a single unit may exceed it); None for one chunk.
    """
    sorted_by = [np.argsort(geometry.order[token], kind="stable") for token in token_BN]
    token_N = np.concatenate([token[by] for token, by in zip(token_BN, sorted_by, strict=True)])
    row_N = np.concatenate([row[by] for row, by in zip(row_BN, sorted_by, strict=True)])
    patch_N = np.concatenate([patch[by] for patch, by in zip(patch_BN, sorted_by, strict=True)])
    sample_N = np.repeat(np.arange(len(token_BN)), [len(token) for token in token_BN])

    # Tokens of each level, as (sample, flat place) numbers, and the unit of each.
    total = geometry.order.size
    level_tokens = [token_N + sample_N * total]
    level_units = [geometry.unit_of[token_N] + sample_N * total]
    children: list[np.ndarray] = []
    ids_N = [ancestor[token_N] + sample_N * total for ancestor in geometry.ancestors]
    first_of = np.arange(len(token_N))
    for ids in ids_N:
        run = _run_lengths(ids[first_of])
        children.append(run)
        first_of = first_of[np.concatenate([[0], np.cumsum(run)[:-1]])]
        level_tokens.append(ids[first_of])
        level_units.append(level_units[0][first_of])
    unit_lengths = [_run_lengths(units) for units in level_units]

    chunks = []
    bounds = _chunk_bounds(unit_lengths[0], chunk_tokens)
    starts = [np.concatenate([[0], np.cumsum(lengths)]) for lengths in unit_lengths]
    for first, stop in pairwise(bounds):
        lengths = [level[first:stop] for level in unit_lengths]
        chunks.append(
            Chunk(
                int(starts[0][first]),
                int(starts[0][stop]),
                [segments(level, level) for level in lengths],
                [segments(lengths[i + 1], lengths[i]) for i in range(len(children))],
                [
                    torch.from_numpy(children[i][starts[i + 1][first] : starts[i + 1][stop]])
                    for i in range(len(children))
                ],
            )
        )
    sample_M = level_tokens[-1] // total
    per_sample = np.bincount(sample_M, minlength=len(token_BN))
    places = geometry.order.size // geometry.tokens[0]
    return Plan(
        torch.from_numpy(row_N),
        torch.from_numpy(patch_N),
        torch.from_numpy(token_N // places),
        torch.from_numpy(token_N % places),
        chunks,
        torch.from_numpy(level_tokens[-1] % total),
        torch.from_numpy(sample_M),
        segments(per_sample, per_sample),
        torch.tensor([len(token) for token in token_BN]),
    )


def _chunk_bounds(lengths_U: np.ndarray, chunk_tokens: int | None) -> list[int]:
    """Cuts between units so that no chunk exceeds `chunk_tokens` unless one unit alone does."""
    if chunk_tokens is None:
        return [0, len(lengths_U)]
    bounds, filled = [0], 0
    for unit, length in enumerate(lengths_U):
        if filled and filled + length > chunk_tokens:
            bounds.append(unit)
            filled = 0
        filled += int(length)
    return [*bounds, len(lengths_U)]


def attend(q_NHD: Tensor, k_NHD: Tensor, v_NHD: Tensor, where: Segments) -> Tensor:
    """Softmax attention inside segments; (N, H, D) of the queries.

    Segments of similar length are padded to the longest of their bucket, never to the longest of the batch.
    """
    outputs = []
    for bucket in where.buckets:
        q_slot = torch.arange(bucket.q_max, device=q_NHD.device)
        k_slot = torch.arange(bucket.k_max, device=q_NHD.device)
        q_valid_SQ = q_slot < bucket.q_length[:, None]
        k_valid_SK = k_slot < bucket.k_length[:, None]
        # Rows behind a segment's end are clamped to its last row: finite values, masked below.
        q_row_SQ = bucket.q_first[:, None] + torch.minimum(q_slot, bucket.q_length[:, None] - 1)
        k_row_SK = bucket.k_first[:, None] + torch.minimum(k_slot, bucket.k_length[:, None] - 1)
        bias = None
        if not bucket.full:
            bias = torch.zeros(k_valid_SK.shape, dtype=q_NHD.dtype, device=q_NHD.device)
            bias = bias.masked_fill(~k_valid_SK, -torch.inf)[:, None, None, :]
        out_SHQD = F.scaled_dot_product_attention(
            q_NHD[q_row_SQ].transpose(1, 2), k_NHD[k_row_SK].transpose(1, 2), v_NHD[k_row_SK].transpose(1, 2), bias
        )
        outputs.append(out_SHQD.transpose(1, 2)[q_valid_SQ])
    return torch.cat(outputs)[where.back]


class _SegmentMax(torch.autograd.Function):
    """Maximum over contiguous segments; keeps only the winners' rows for the backward."""

    @staticmethod
    def forward(ctx: Any, x_NC: Tensor, length_M: Tensor) -> Tensor:
        first_M = length_M.cumsum(0) - length_M
        order = torch.argsort(length_M, descending=True, stable=True)
        length, first = length_M[order], first_M[order]
        best_MC = x_NC[first]
        row_MC = first[:, None].expand_as(best_MC).clone()
        # at_least[j]: how many segments have j tokens or more
        at_least = torch.bincount(length).flip(0).cumsum(0).flip(0).tolist()
        for j, count in enumerate(at_least[2:], start=1):  # the tokens after the first, of the segments that have them
            value = x_NC[first[:count] + j]
            better = value > best_MC[:count]
            best_MC[:count] = torch.where(better, value, best_MC[:count])
            row_MC[:count] = torch.where(better, (first[:count] + j)[:, None], row_MC[:count])
        back = torch.argsort(order)
        ctx.save_for_backward(row_MC[back])
        ctx.rows = len(x_NC)
        return best_MC[back]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (row_MC,) = ctx.saved_tensors
        grad_MC = grads[0]
        out = grad_MC.new_zeros(ctx.rows, grad_MC.shape[1])
        return out.scatter_(0, row_MC, grad_MC), None


def segment_max(x_NC: Tensor, length_M: Tensor) -> Tensor:
    """Channel-wise maximum over contiguous segments of `length_M` tokens, (M, C); the first of equal values wins."""
    return _SegmentMax.apply(x_NC, length_M)
