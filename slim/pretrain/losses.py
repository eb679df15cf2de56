"""The terms of the pretraining loss: JEPA, MAE and SIG.

Legend: B samples; M cells of the context; K targets; G rebuilt targets; E tokens of a cell; V voxels of a patch; C
channels of the encoder; W channels of the predictor; S slices; P points.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from slim.config import KINDS
from slim.model.embedding import STILL, standardise
from slim.model.inputs import Batch, Targets

SLICES, POINTS, RANGE = 32, 14, (0.2, 4.0)


def jepa_loss(
    predicted_KC: Tensor, target_KC: Tensor, targets: Targets, samples: int
) -> tuple[Tensor, dict[str, Tensor]]:
    """Smooth-L1 loss, averaged inside each sample, then over samples; and numbers to log.

    `trivial` is the loss of predicting the mean of each place. For each kind with targets, `loss_KIND` and
    `trivial_KIND` are means over its targets.
    """
    error_K = F.smooth_l1_loss(predicted_KC, target_KC, reduction="none").mean(dim=1)
    trivial_K = F.smooth_l1_loss(torch.zeros_like(target_KC), target_KC, reduction="none").mean(dim=1)
    loss = _mean_of_samples(error_K, targets.sample_K, samples)
    logs = {"trivial": _mean_of_samples(trivial_K, targets.sample_K, samples).detach()}
    for what, value_K in (("loss", error_K), ("trivial", trivial_K)):
        sums = value_K.new_zeros(len(KINDS)).index_add(0, targets.kind_K, value_K.detach())
        logs |= {
            f"{what}_{kind}": sums[number] / count
            for number, (kind, count) in enumerate(zip(KINDS, targets.of_kind, strict=True))
            if count
        }
    return loss, logs


def _mean_of_samples(value_K: Tensor, sample_K: Tensor, samples: int) -> Tensor:
    """Mean over samples of each sample's mean."""
    terms_2K = torch.stack([value_K, torch.ones_like(value_K)])
    total_B, count_B = value_K.new_zeros(2, samples).index_add(1, sample_K, terms_2K)
    return (total_B / count_B.clamp_min(1)).sum() / (count_B > 0).sum().clamp_min(1)


def mae_loss(rebuild: Callable[[Tensor], Tensor], out_GW: Tensor, batch: Batch, at_once: int | None = None) -> Tensor:
    """Mean squared error of reconstructed voxels, divided by their variance, per sample and then over samples.

    Each voxel's time series is z-scored.

    Parameters
    ----------
    rebuild : callable
        Maps outputs of the predictor to voxels, (G, W) to (G, E V).
    out_GW : Tensor
        Outputs of the predictor at the rebuilt targets.
    batch : Batch
    at_once : int, optional
        Number of cells that are rebuilt together. To save memory, they are computed again in the backward pass. None
        rebuilds all cells at once and keeps them.
    """
    cells = len(out_GW) if at_once is None else at_once
    sums_4B = out_GW.new_zeros(4, len(batch.keys), dtype=torch.float32)
    for first in range(0, len(out_GW), max(cells, 1)):
        part = slice(first, first + cells)
        if at_once is None or not torch.is_grad_enabled():
            sums_4B = sums_4B + _mae_sums(rebuild, out_GW[part], batch, part)
        else:
            sums_4B = sums_4B + checkpoint(_mae_sums, rebuild, out_GW[part], batch, part, use_reentrant=False)
    count_B, total_B, square_B, error_B = sums_4B
    count_B = count_B.clamp_min(1)
    variance_B = square_B / count_B - (total_B / count_B) ** 2
    alive_B = variance_B > 1e-8
    return (error_B / count_B / variance_B.clamp_min(1e-8) * alive_B).sum() / alive_B.sum().clamp_min(1)


def _mae_sums(rebuild: Callable[[Tensor], Tensor], out_GW: Tensor, batch: Batch, part: slice) -> Tensor:
    """For each sample the number, sum and sum of squares of the voxels to rebuild, and the squared error; (4, B)."""
    assert batch.targets is not None
    targets, voxels = batch.targets, batch.voxels
    value_GE, patch_GE = targets.value_GE[part], targets.patch_GE[part].clamp_min(0)
    spread_GEV = voxels.spread_QV[patch_GE]
    known_GEV = (value_GE >= 0)[..., None] & (batch.brain_QV[patch_GE] > 0) & (spread_GEV > STILL)
    value_GEV = standardise(voxels.value_RV[value_GE.clamp_min(0)].float(), spread_GEV) * known_GEV
    error_GEV = (rebuild(out_GW).float().view_as(value_GEV) - value_GEV) * known_GEV
    terms_4G = torch.stack([x.flatten(1).sum(dim=1) for x in (known_GEV, value_GEV, value_GEV**2, error_GEV**2)])
    sample_G = targets.sample_K[targets.rebuilt_G[part]]
    return terms_4G.new_zeros(4, len(batch.keys)).index_add(1, sample_G, terms_4G)


def sig_loss(x_MC: Tensor, slice_CS: Tensor) -> Tensor:
    """Epps-Pulley statistic of the projections on each slice against N(0, 1), averaged over slices.

    It is the integral of |empirical characteristic function - exp(-t^2 / 2)|^2 over t from 0.2 to 4, by the trapezoidal
    rule. Positive t suffice, because the function is Hermitian.
    """
    t_P = torch.linspace(*RANGE, POINTS, device=x_MC.device)
    normal_P = torch.exp(-(t_P**2) / 2)
    phase_MSP = (x_MC @ slice_CS)[..., None] * t_P
    gap_SP = (phase_MSP.cos().mean(dim=0) - normal_P) ** 2 + phase_MSP.sin().mean(dim=0) ** 2
    return torch.trapezoid(gap_SP, t_P, dim=1).mean()
