"""Poolings: they reduce the tokens of a session or sample to one vector, and are differentiable.

`mean`, `mean_sd`, `location`, `cov` and `patterns` take all tokens of a session as an array. `attentive` takes
sessions padded to one length. `ragged` and `ragged_cov` take a batch of samples with concatenated tokens. The first
three sum in float64, so the float32 result does not depend on the order of summation.

Legend: B sessions or samples; S time slots; L places; C channels; T tokens of a session; M tokens of a batch; A queries
of a member, of which there are M in `attentive`; H queries; Q principal components; P series or features; E pairs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_STILL = 1e-24  # a series counts as constant up to this variance or sum of squares


def mean(token_SLC: Tensor) -> Tensor:
    """Mean over slots and places, float64 (C,)."""
    return token_SLC.mean(dim=(0, 1), dtype=torch.float64)


def sd(x: Tensor, dim: int) -> Tensor:
    """SD along a dimension, float64. For constant values the SD and its gradient are 0."""
    centred = x - x.mean(dim=dim, keepdim=True, dtype=torch.float64).to(x.dtype)
    variance = centred.square().mean(dim=dim, dtype=torch.float64)
    return torch.where(variance > _STILL, variance.clamp(min=_STILL).sqrt(), 0.0)


def mean_sd(token_SLC: Tensor) -> Tensor:
    """Mean over slots and places, followed by the SD over slots averaged over places, float64 (2 C,)."""
    return torch.cat([mean(token_SLC), sd(token_SLC, 0).mean(dim=0)])


def location(token_SLC: Tensor) -> Tensor:
    """Mean over slots of each place, float64 (L C,)."""
    return token_SLC.mean(dim=0, dtype=torch.float64).flatten()


def group_means(x_SLC: Tensor, number_S: Tensor, groups: int) -> Tensor:
    """Mean over the slots of each group (a window); `number_S` is the group of each slot. float64 (groups, L, C)."""
    sum_WLC = torch.zeros(groups, *x_SLC.shape[1:], dtype=torch.float64, device=x_SLC.device)
    count_W = torch.bincount(number_S, minlength=groups)
    return sum_WLC.index_add(0, number_S, x_SLC.double()) / count_W[:, None, None]


# Poolings that need no fit.
FIXED = {"mean": mean, "mean+sd": mean_sd, "location": location}


def correlations(x_SP: Tensor) -> Tensor:
    """Correlations of all pairs of series: the upper triangle, row by row, (E,).

    The correlations of a constant series are 0.
    """
    x_SP = x_SP - x_SP.mean(dim=0)
    square_P = (x_SP**2).sum(dim=0)
    x_SP = torch.where(square_P > _STILL, x_SP / square_P.clamp(min=_STILL).sqrt(), 0.0)
    row, column = torch.triu_indices(x_SP.shape[1], x_SP.shape[1], 1, device=x_SP.device)
    return (x_SP.T @ x_SP)[row, column]


def cov(token_SLC: Tensor, axes_CQ: Tensor) -> Tensor:
    """Correlations over slots between all pairs of (place, axis), float64 (L Q (L Q - 1) / 2,)."""
    return correlations((token_SLC @ axes_CQ.to(token_SLC)).flatten(1).double())


def patterns(token_SLC: Tensor, pattern_LCQ: Tensor) -> Tensor:
    """Correlations over slots between the strengths of all pairs of patterns of the brain, float64 (Q (Q - 1) / 2,)."""
    return correlations((token_SLC.flatten(1) @ pattern_LCQ.to(token_SLC).flatten(0, 1)).double())


# Poolings with principal components, which are fitted on a set of sessions.
FITTED = {"cov": cov, "patterns": patterns}


def attentive(query_MAC: Tensor, token_BTC: Tensor, valid_BT: Tensor) -> Tensor:
    """Means of the valid tokens of each session, weighted by softmax attention to each query, (B, M, A, C)."""
    score_BTH = token_BTC @ query_MAC.flatten(0, 1).T
    weight_BTH = score_BTH.masked_fill(~valid_BT[:, :, None], -torch.inf).softmax(dim=1)
    mean_BHC = torch.bmm(weight_BTH.transpose(1, 2), token_BTC)
    return mean_BHC.unflatten(1, query_MAC.shape[:2])


def ragged(x_MC: Tensor, logit_MH: Tensor, sample_M: Tensor, samples: int) -> Tensor:
    """Means of the tokens of each sample, weighted by the softmax of their logits for each query, (B, H C).

    Parameters
    ----------
    sample_M : int tensor
        Sample of each token, in any order.
    """
    index_M = sample_M.long()
    index_MH = index_M[:, None].expand(logit_MH.shape)
    largest_BH = logit_MH.new_full((samples, logit_MH.shape[1]), -torch.inf)
    largest_BH = largest_BH.scatter_reduce(0, index_MH, logit_MH.detach(), "amax")
    weight_MH = torch.exp(logit_MH - largest_BH[index_M])
    total_BH = weight_MH.new_zeros(largest_BH.shape).index_add(0, index_M, weight_MH)
    share_MH = weight_MH / total_BH[index_M]
    pooled = [x_MC.new_zeros(samples, x_MC.shape[1]).index_add(0, index_M, x_MC * s_M[:, None]) for s_M in share_MH.T]
    return torch.cat(pooled, dim=1)


def ragged_cov(
    x_MC: Tensor, axes_CQ: Tensor, sample_M: Tensor, cell_M: Tensor, slots_B: Sequence[int], shape: tuple[int, int]
) -> Tensor:
    """`cov` of each sample, (B, E), in the precision of the tokens. The correlations of places without tokens are 0.

    Parameters
    ----------
    cell_M : int tensor
        Flat index of the cell of each token, slot by slot.
    slots_B : sequence of int
        Number of slots of each sample; the others of the grid do not count.
    shape : tuple of int
        Slots and places of the grid.
    """
    index_M = sample_M.long() * math.prod(shape) + cell_M
    queries = axes_CQ.shape[1]
    series_NQ = x_MC.new_zeros(len(slots_B) * math.prod(shape), queries).index_copy(0, index_M, x_MC @ axes_CQ)
    series_BSP = series_NQ.view(len(slots_B), *shape, queries).flatten(2)
    return torch.stack([correlations(x_SP[:slots]) for x_SP, slots in zip(series_BSP, slots_B, strict=True)])


def varies(mean_P: Any, sd_P: Any) -> Any:
    """Which features vary, bool (P,), from their means and SDs (numpy or torch).

    Because of rounding in float32, the SD of a constant feature may be about 1e-6 of its mean.
    """
    return sd_P > 1e-5 * (abs(mean_P) + sd_P + 1e-30)
