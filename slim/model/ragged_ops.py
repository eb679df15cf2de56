"""Operations on segments of different lengths in plain PyTorch: attention inside segments, maxima and sums.

Legend: N tokens; M parents; S segments of a bucket; Q, K padded queries and keys of a bucket; H heads; D channels of a
head; C channels.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from slim.model.ragged import Children, Segments

# Requirements of varlen flash attention on the device and the inputs.
_VARLEN_CAPABILITY, _VARLEN_TYPES, _VARLEN_HEAD, _VARLEN_STEP = (8, 0), (torch.bfloat16, torch.float16), 256, 8


def attend(q_NHD: Tensor, k_NHD: Tensor, v_NHD: Tensor, where: Segments) -> Tensor:
    """Softmax attention inside segments; returns (N, H, D), one row per query.

    If the device supports flash attention over segments of different lengths (varlen), nothing is padded. Otherwise
    segments are padded to the longest one in their bucket, not in the batch. The results are equal up to rounding.
    """
    if has_varlen(q_NHD):
        return varlen_attn(q_NHD, k_NHD, v_NHD, where.q_bound, where.k_bound, where.q_max, where.k_max)
    outputs = []
    for bucket in where.buckets:
        q_slot = torch.arange(bucket.q_max, device=q_NHD.device)
        k_slot = torch.arange(bucket.k_max, device=q_NHD.device)
        k_valid_SK = k_slot < bucket.k_length[:, None]
        # Padding rows repeat the last row of the segment: their values are finite, and they are masked or not read.
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
    """Whether `attend` uses varlen flash attention: half precision, on CUDA from compute capability 8.0."""
    if not (q_NHD.is_cuda and fits_varlen(q_NHD)):
        return False
    return torch.cuda.get_device_capability(q_NHD.device) >= _VARLEN_CAPABILITY


def fits_varlen(q_NHD: Tensor) -> bool:
    """Whether varlen flash attention takes inputs of this type and head width, on a device that has it."""
    return q_NHD.dtype in _VARLEN_TYPES and q_NHD.shape[2] <= _VARLEN_HEAD and q_NHD.shape[2] % _VARLEN_STEP == 0


def varlen_attn(
    q_NHD: Tensor, k_NHD: Tensor, v_NHD: Tensor, q_bound: Tensor, k_bound: Tensor, q_max: int, k_max: int
) -> Tensor:
    """Torch's flash attention over segments of different lengths."""
    from torch.nn.attention.varlen import varlen_attn  # takes 1.5 s to import, and is not used on the CPU

    out_NHD = varlen_attn(q_NHD, k_NHD, v_NHD, q_bound, k_bound, q_max, k_max)
    assert isinstance(out_NHD, Tensor)  # not a tuple: the log-sum-exp was not requested
    return out_NHD


class _SegmentMax(torch.autograd.Function):
    """Maximum over contiguous segments. For the backward pass it keeps only the index of the largest token."""

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
    """Maximum of each segment, longest first; `winner_MC` receives the index of the largest token in its segment."""
    best_MC = x_NC[where.first_M]
    for j, count in enumerate(
        where.at_least[1:], start=1
    ):  # the second, third, ... token of the segments that are long enough
        value_MC, best = x_NC[where.first_M[:count] + j], best_MC[:count]
        if winner_MC is not None:
            winner_MC[:count].masked_fill_(value_MC > best, j)
        torch.maximum(best, value_MC, out=best)
    return best_MC[where.back_M]


def segment_max(x_NC: Tensor, where: Children) -> Tensor:
    """Channel-wise maximum over the tokens of each segment, (M, C). Of equal values, the first gets the gradient."""
    if torch.is_grad_enabled() and x_NC.requires_grad:
        return _SegmentMax.apply(x_NC, where)
    return _maximum(x_NC, where)


def segment_sum(x_NC: Tensor, where: Children) -> Tensor:
    """Channel-wise sum over the tokens of each segment, (M, C)."""
    above_N = x_NC.new_zeros(len(x_NC), dtype=torch.int64)
    above_N[where.first_M[where.back_M][1:]] = 1
    return x_NC.new_zeros(len(where.first_M), x_NC.shape[1]).index_add_(0, above_N.cumsum(0), x_NC)
