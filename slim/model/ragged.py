"""Sparse patch gathers in plain PyTorch: only tokens that exist are ever stored, in contiguous ragged segments.

The kept tokens of a batch are sorted so that each mask unit, and the children of each pooled token, lie side by side;
lengths then say everything. `plan` works that out once per batch, on the CPU and in integers; `attend` and
`segment_max` are the two ragged operations an encoder needs.

Legend: B samples; N tokens; U segments (mask units or samples); L tokens of the first global level; M tokens of the
last level; S a bucket's segments; Q, K padded queries and keys of a bucket; H heads; D channels of a head; C channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from slim.model.geometry import Geometry

# Segments share a bucket while the shortest has at least this share of the longest's keys: padding stays small.
_FILL = 0.9
# What flash attention over segments of different lengths asks of a device and of its inputs.
_VARLEN_CAPABILITY, _VARLEN_TYPES, _VARLEN_HEAD, _VARLEN_STEP = (8, 0), (torch.bfloat16, torch.float16), 256, 8


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
class Children:
    """Contiguous segments that are pooled to one token each, longest first.

    Attributes
    ----------
    first_M : first row of each, longest first
    back_M : where each segment stands in that order
    at_least : how many segments have 1, 2, ... tokens or more
    """

    first_M: Tensor
    back_M: Tensor
    at_least: list[int]


@dataclass
class Segments:
    """Ragged attention: queries of segment u see the keys of segment u and no others.

    Attributes
    ----------
    buckets : the segments by length, longest first
    back_N : where each query's output lies in the concatenated outputs of the buckets, padding included
    q_bound, k_bound : first row of each segment, and the number of rows at the end (U + 1); with the longest segment,
        all that varlen attention needs
    """

    buckets: list[Bucket]
    back_N: Tensor
    q_bound: Tensor
    k_bound: Tensor
    q_max: int
    k_max: int


@dataclass
class Chunk:
    """Whole segments (mask units; samples in the global stages) that pass through some stages together.

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
    """Where every kept token of a batch lies and what it attends to; everything an encoder needs beside the values.

    Units of similar length follow each other, whatever their sample; behind the local stages tokens lie sample by
    sample, in the order of the geometry. All tensors are int32.

    Attributes
    ----------
    row_N : rows of the tokens in the batch's table of voxel values, in sorted order
    patch_N : rows of the tokens in the batch's table of patches
    frame_N : sample * frames + place on the first axis, of each token; space_N : its place (flat) on the others
    chunks : the mask units, in order, for the local stages
    by_sample_L : what the local stages leave, put in order for the global ones
    samples : the samples, for the global stages
    cell_M : flat cell index of every token of the last level; sample_M : its sample
    tokens_B : tokens of each sample
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
    """An int32 tensor; counts of tokens stay far below 2^31."""
    return torch.from_numpy(np.asarray(values, np.int32))


def _starts(length_U: np.ndarray) -> np.ndarray:
    """First row of each of the segments that lie one after another, and the number of rows; (U + 1)."""
    return np.concatenate([[0], np.cumsum(length_U)])


def segments(q_length_U: np.ndarray, k_length_U: np.ndarray) -> Segments:
    """Ragged attention of segments with these many queries and keys, lying one after another in the tensors."""
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
    """Segments of these many tokens, lying one after another, to be pooled to one token each."""
    order = np.argsort(-length_M, kind="stable")
    at_least = np.bincount(length_M)[::-1].cumsum()[::-1]
    return Children(integers(_starts(length_M)[order]), integers(np.argsort(order)), at_least[1:].tolist())


def _run_lengths(ids: np.ndarray) -> np.ndarray:
    """Lengths of the runs of equal values."""
    return np.diff(np.flatnonzero(np.concatenate([[True], ids[1:] != ids[:-1], [True]])))


@dataclass
class _Stages:
    """Segments of some stages: their lengths at each level, and the number of children of each pooled token.

    `first_M` is the first token of the first level below each token of the last one.
    """

    lengths: list[np.ndarray]
    children: list[np.ndarray]
    first_M: np.ndarray

    @classmethod
    def climb(cls, segment_N: np.ndarray, parents: list[np.ndarray]) -> _Stages:
        """From the segment of each token and, level by level, the token that it ends in; equal ones lie together."""
        lengths, below, first = [_run_lengths(segment_N)], [], np.arange(len(segment_N))
        for parent_N in parents:
            run = _run_lengths(parent_N[first])
            below.append(run)
            first = first[_starts(run)[:-1]]
            lengths.append(_run_lengths(segment_N[first]))
        return cls(lengths, below, first)

    def chunk(self, first: int, stop: int) -> Chunk:
        """Segments `first` to `stop`."""
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
    """Sort the tokens of a batch and lay out its ragged segments.

    Parameters
    ----------
    geometry : Geometry
    token_BN : per sample, flat places (in the dense token grid) of its tokens, in any order, none twice
    row_BN, patch_BN : per sample, the tokens' rows in the batch's tables of voxel values and of patches
    chunk_tokens : int, optional
        Mask units are put into chunks of at most this many tokens (a single unit may exceed it); None for one chunk.
    """
    total = geometry.order.size
    token_N, row_N, patch_N = (np.concatenate(part) for part in (token_BN, row_BN, patch_BN))
    sample_N = np.repeat(np.arange(len(token_BN)), [len(token) for token in token_BN])
    order_N = sample_N * total + geometry.order[token_N]
    # Longest units first: units of similar length share a chunk and a bucket, and little is padded.
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

    Where the device has flash attention over segments of different lengths (varlen), nothing is padded. Elsewhere
    segments of similar length are padded to the longest of their bucket, never to the longest of the batch. Both give
    the same numbers, up to rounding.
    """
    if has_varlen(q_NHD):
        return varlen_attn(q_NHD, k_NHD, v_NHD, where.q_bound, where.k_bound, where.q_max, where.k_max)
    outputs = []
    for bucket in where.buckets:
        q_slot = torch.arange(bucket.q_max, device=q_NHD.device)
        k_slot = torch.arange(bucket.k_max, device=q_NHD.device)
        k_valid_SK = k_slot < bucket.k_length[:, None]
        # Rows behind a segment's end are clamped to its last row: finite values, masked or never read.
        q_row_SQ = bucket.q_first[:, None] + torch.minimum(q_slot, bucket.q_length[:, None] - 1)
        k_row_SK = bucket.k_first[:, None] + torch.minimum(k_slot, bucket.k_length[:, None] - 1)
        bias = None
        if not bucket.full:
            bias = torch.zeros(k_valid_SK.shape, dtype=q_NHD.dtype, device=q_NHD.device)
            bias = bias.masked_fill(~k_valid_SK, -torch.inf)[:, None, None, :]
        out_SHQD = F.scaled_dot_product_attention(
            q_NHD[q_row_SQ].transpose(1, 2), k_NHD[k_row_SK].transpose(1, 2), v_NHD[k_row_SK].transpose(1, 2), bias
        )
        outputs.append(out_SHQD.transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs)[where.back_N]


def has_varlen(q_NHD: Tensor) -> bool:
    """Whether `attend` takes varlen flash attention: half precision, on CUDA from compute capability 8.0."""
    heads_fit = q_NHD.shape[2] <= _VARLEN_HEAD and q_NHD.shape[2] % _VARLEN_STEP == 0
    if not (q_NHD.is_cuda and q_NHD.dtype in _VARLEN_TYPES and heads_fit):
        return False
    return torch.cuda.get_device_capability(q_NHD.device) >= _VARLEN_CAPABILITY


def varlen_attn(
    q_NHD: Tensor, k_NHD: Tensor, v_NHD: Tensor, q_bound: Tensor, k_bound: Tensor, q_max: int, k_max: int
) -> Tensor:
    """Flash attention of torch over segments of different lengths."""
    from torch.nn.attention.varlen import varlen_attn  # 1.5 s of imports that a CPU has no use for

    out_NHD = varlen_attn(q_NHD, k_NHD, v_NHD, q_bound, k_bound, q_max, k_max)
    assert isinstance(out_NHD, Tensor)  # without the log-sum-exp, which was not asked for
    return out_NHD


class _SegmentMax(torch.autograd.Function):
    """Maximum over contiguous segments; keeps for the backward only which token of its segment won."""

    @staticmethod
    def forward(ctx: Any, x_NC: Tensor, where: Children) -> Tensor:
        many = len(where.at_least) > torch.iinfo(torch.uint8).max
        winner_MC = x_NC.new_zeros((len(where.first_M), x_NC.shape[1]), dtype=torch.int32 if many else torch.uint8)
        best_MC = _maximum(x_NC, where, winner_MC)
        ctx.save_for_backward(winner_MC)
        ctx.where, ctx.rows = where, len(x_NC)
        return best_MC

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (winner_MC,), where = ctx.saved_tensors, ctx.where
        row_MC = (winner_MC + where.first_M[:, None])[where.back_M].long()
        out = grads[0].new_zeros(ctx.rows, grads[0].shape[1])
        return out.scatter_(0, row_MC, grads[0]), None


def _maximum(x_NC: Tensor, where: Children, winner_MC: Tensor | None = None) -> Tensor:
    """Maximum of each segment; `winner_MC` receives, longest segment first, which of its tokens has it."""
    best_MC = x_NC[where.first_M]
    for j, count in enumerate(
        where.at_least[1:], start=1
    ):  # the tokens after the first, of the segments that have them
        value_MC, best = x_NC[where.first_M[:count] + j], best_MC[:count]
        if winner_MC is not None:
            winner_MC[:count].masked_fill_(value_MC > best, j)
        torch.maximum(best, value_MC, out=best)
    return best_MC[where.back_M]


def segment_max(x_NC: Tensor, where: Children) -> Tensor:
    """Channel-wise maximum over the tokens of each segment, (M, C); the first of equal values wins."""
    if torch.is_grad_enabled() and x_NC.requires_grad:
        return _SegmentMax.apply(x_NC, where)
    return _maximum(x_NC, where)


def segment_sum(x_NC: Tensor, where: Children) -> Tensor:
    """Channel-wise sum over the tokens of each segment, (M, C)."""
    above_N = x_NC.new_zeros(len(x_NC), dtype=torch.int64)
    above_N[where.first_M[where.back_M][1:]] = 1
    return x_NC.new_zeros(len(where.first_M), x_NC.shape[1]).index_add_(0, above_N.cumsum(0), x_NC)
