"""Operations on segments of different lengths in plain PyTorch: attention inside segments, maxima and sums.

Legend: N tokens; M parents; R rows of a run of segments; S its segments; Q, K queries and keys of a segment, or K
children; H heads; D channels of a head; C channels.
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

    Nothing is padded: flash attention over segments of different lengths (varlen) takes all of them in one call, where
    the device has it; otherwise each run of segments of equal lengths is one call. The results are equal up to
    rounding.
    """
    if has_varlen(q_NHD):
        return varlen_attn(q_NHD, k_NHD, v_NHD, where.q_bound, where.k_bound, where.q_max, where.k_max)
    if where.q_order_N is not None:
        q_NHD, k_NHD, v_NHD = q_NHD[where.q_order_N], k_NHD[where.k_order_N], v_NHD[where.k_order_N]
    q_rows, k_rows = [count * q for count, q, _ in where.runs], [count * k for count, _, k in where.runs]
    parts = zip(where.runs, q_NHD.split(q_rows), k_NHD.split(k_rows), v_NHD.split(k_rows), strict=True)
    outputs = []
    for (count, *_), q_RHD, k_RHD, v_RHD in parts:
        q_SHQD, k_SHKD, v_SHKD = (rows.unflatten(0, (count, -1)).transpose(1, 2) for rows in (q_RHD, k_RHD, v_RHD))
        outputs.append(F.scaled_dot_product_attention(q_SHQD, k_SHKD, v_SHKD).transpose(1, 2).flatten(0, 1))
    out_NHD = torch.cat(outputs) if len(outputs) > 1 else outputs[0]
    return out_NHD if where.q_back_N is None else out_NHD[where.q_back_N]


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


def segment_max(x_NC: Tensor, where: Children) -> Tensor:
    """Channel-wise maximum over the tokens of each segment, (M, C). Of equal values, the first gets the gradient."""
    if torch.is_grad_enabled() and x_NC.requires_grad:
        return _SegmentMax.apply(x_NC, where)
    return torch.segment_reduce(x_NC, "max", lengths=where.length_M, unsafe=True)  # unsafe: lengths are not checked


class _SegmentMax(torch.autograd.Function):
    """Maximum over contiguous segments. For the backward pass it keeps only the index of the largest token."""

    @staticmethod
    def forward(ctx: Any, x_NC: Tensor, where: Children) -> Tensor:
        # Padding repeats the last token of a segment; the first of equal values wins, so it is never the winner.
        child_K = torch.arange(where.most, dtype=torch.int32, device=x_NC.device)
        row_MK = where.first_M[:, None] + torch.minimum(child_K, where.length_M[:, None] - 1)
        best_MC, winner_MC = x_NC[row_MK].max(dim=1)
        many = where.most > torch.iinfo(torch.uint8).max
        ctx.save_for_backward(winner_MC.to(torch.int32 if many else torch.uint8))
        ctx.where, ctx.rows = where, len(x_NC)
        return best_MC

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (winner_MC,) = ctx.saved_tensors
        row_MC = winner_MC + ctx.where.first_M[:, None].long()
        return grads[0].new_zeros(ctx.rows, grads[0].shape[1]).scatter_(0, row_MC, grads[0]), None


def segment_sum(x_NC: Tensor, where: Children) -> Tensor:
    """Channel-wise sum over the tokens of each segment, (M, C)."""
    segments = torch.arange(len(where.length_M), device=x_NC.device)
    above_N = segments.repeat_interleave(where.length_M, output_size=len(x_NC))
    return x_NC.new_zeros(len(segments), x_NC.shape[1]).index_add_(0, above_N, x_NC)
