"""What the encoder learns from: JEPA, SIG and MAE terms on one encoder.

- JEPA: smooth-L1 between predicted and target features at the target cells. Targets are those of the EMA encoder on all
  brain tokens, layer-normed, centred by the running mean of their place and slot and standardised per channel, so that
  the trivial predictor (the mean of the place) has nothing to win.
- SIG: keeps the context features from collapsing onto few dimensions. The Epps-Pulley statistic of random slices of the
  place-centred features against a standard normal (after LeJEPA, Balestriero & LeCun, arXiv 2511.08544).
- MAE: voxels of some target cells (each voxel's own z-score) rebuilt from the same predictor, mean squared error over
  the variance of what is rebuilt.

Every term is a mean over samples of a mean inside the sample, so it does not matter how samples are spread over
processes (SIG: over groups of `sig_samples` samples).

Legend: B samples; M cells of the context; K targets; G rebuilt targets; E tokens of a cell; V voxels of a patch; C
channels of the encoder; W channels of the predictor; S slices; P points; J context and targets together.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from slim.config import KINDS, PretrainSettings
from slim.data.collate import Batch, Targets
from slim.model.geometry import Geometry
from slim.model.hiera import STILL, Block, Hiera, Seconds, init_linear, init_positions, standardise
from slim.training.metrics import NOTHING_TO_GAIN

SLICES, POINTS, RANGE = 32, 14, (0.2, 4.0)


class Predictor(nn.Module):
    """A narrow transformer over context features and mask tokens with positions; two light heads.

    Blocks attend inside a slot and over the whole sample in turn: what can be predicted of a target's dynamics stands
    in the other places of its own slot, and a predictor that has to find the slot first learns nothing for long.
    """

    def __init__(self, settings: PretrainSettings, geometry: Geometry, dim: int, voxels: int):
        super().__init__()
        sizes = settings.model.predictor
        jepa, _, mae = settings.weights
        self.geometry = geometry
        self.enter = nn.Linear(dim, sizes.width)
        self.mask_token = nn.Parameter(torch.zeros(sizes.width))
        self.space = nn.Parameter(torch.empty(math.prod(geometry.cells[1:]), sizes.width))
        self.time = nn.Parameter(torch.empty(geometry.cells[0], sizes.width))
        self.seconds = Seconds(sizes.width)
        self.blocks = nn.ModuleList([Block(sizes.width, sizes.width, sizes.heads) for _ in range(sizes.depth)])
        self.norm = nn.LayerNorm(sizes.width, eps=1e-6)
        self.features = nn.Linear(sizes.width, dim) if jepa else None
        self.rebuild = nn.Linear(sizes.width, math.prod(geometry.cell) * voxels) if mae else None
        self.apply(init_linear)
        init_positions(self.space, self.time, self.seconds, geometry.cells)
        nn.init.trunc_normal_(self.mask_token, std=0.02)

    def forward(self, context_MC: Tensor, batch: Batch) -> Tensor:
        """Outputs at the targets, (K, W)."""
        assert batch.context is not None and batch.targets is not None
        targets = batch.targets
        cell_J = torch.cat([batch.context.cell_M, targets.cell_K])
        sample_J = torch.cat([batch.context.sample_M, targets.sample_K])
        places = math.prod(self.geometry.cells[1:])
        slot_J = cell_J // places
        second_BS = batch.voxels.second_BT.unflatten(1, (self.geometry.cells[0], -1)).mean(dim=2)
        entered_MW = self.enter(context_MC)
        x_JW = torch.cat([entered_MW, self.mask_token.to(entered_MW.dtype).expand(len(targets.cell_K), -1)])
        x_JW = x_JW + self.space[cell_J % places] + self.time[slot_J] + self.seconds(second_BS[sample_J, slot_J])
        x_JW = x_JW[targets.joint_J]
        for index, block in enumerate(self.blocks):
            x_JW = block(x_JW, targets.slots if index % 2 == 0 else targets.joint)
        return self.norm(x_JW[targets.back_K])


@dataclass
class Losses:
    """The loss of a micro-batch, and what is logged beside it (detached): numbers, and features whose spread is."""

    total: Tensor
    logs: dict[str, Tensor]
    features: dict[str, Tensor | None] = field(default_factory=dict)


class Objective(nn.Module):
    """Encoder, predictor and the terms of the loss: the module that DeepSpeed trains."""

    def __init__(self, settings: PretrainSettings, geometry: Geometry, voxels: int):
        super().__init__()
        self.weights = settings.weights
        self.sig_samples = settings.loss.sig_samples
        self.seed = settings.run.seed
        self.bf16 = settings.precision == "bf16"
        stream = settings.stream
        self.rebuilt_at_once = None if stream is None else max(1, stream // math.prod(geometry.cell))
        self.encoder = Hiera(settings.model, geometry, voxels, settings.view)
        self.predictor = Predictor(settings, geometry, self.encoder.dim, voxels)

    def forward(self, batch: Batch, target_KC: Tensor | None, place_mean: Tensor | None, step: int) -> Losses:
        """Losses of one micro-batch.

        Parameters
        ----------
        batch : Batch
        target_KC : Tensor, optional
            Centred and standardised targets; None without the JEPA term.
        place_mean : Tensor, optional
            Running mean (cells, C) of the context features, subtracted before the SIG test; None without it.
        step : int
            Optimizer step; the slices of SIG depend on it and the seed.
        """
        assert batch.context is not None and batch.targets is not None
        jepa, sig, mae = self.weights
        with torch.autocast(batch.brain_QV.device.type, torch.bfloat16, enabled=self.bf16):
            context_MC = self.encoder(batch.voxels, batch.context)
            out_KW = self.predictor(context_MC, batch)
            predicted_KC = None if self.predictor.features is None else self.predictor.features(out_KW)
            loss_mae = None
            if self.predictor.rebuild is not None:
                loss_mae = mae_loss(
                    self.predictor.rebuild, out_KW[batch.targets.rebuilt_G], batch, self.rebuilt_at_once
                )
        context_MC = context_MC.float()
        total = context_MC.new_zeros(())
        logs: dict[str, Tensor] = {}
        if predicted_KC is not None and target_KC is not None:
            loss, logs = jepa_loss(predicted_KC.float(), target_KC, batch.targets, len(batch.keys))
            total = total + jepa * loss
            logs["loss_jepa"] = loss.detach()
        if sig and place_mean is not None:
            centred_MC = context_MC - place_mean[batch.context.cell_M]
            loss = self._sig(centred_MC, batch.context.sample_M, len(batch.keys), step)
            total = total + sig * loss
            logs["loss_sig"] = loss.detach()
        if loss_mae is not None:
            total = total + mae * loss_mae
            logs["loss_mae"] = loss_mae.detach()
        logs["loss"] = total.detach()
        return Losses(total, logs, {"context": context_MC.detach()})

    def _sig(self, x_MC: Tensor, sample_M: Tensor, samples: int, step: int) -> Tensor:
        rng = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        slice_CS = torch.randn(x_MC.shape[1], SLICES, generator=rng).to(x_MC.device)
        slice_CS = slice_CS / slice_CS.norm(dim=0)
        size = self.sig_samples or samples
        groups = [sig_loss(x_MC[sample_M // size == group], slice_CS) for group in range(-(-samples // size))]
        return torch.stack(groups).mean()


def jepa_loss(
    predicted_KC: Tensor, target_KC: Tensor, targets: Targets, samples: int
) -> tuple[Tensor, dict[str, Tensor]]:
    """Smooth-L1 averaged inside each sample, then over samples; and its value per kind and for the place mean."""
    error_K = F.smooth_l1_loss(predicted_KC, target_KC, reduction="none").mean(dim=1)
    trivial_K = F.smooth_l1_loss(torch.zeros_like(target_KC), target_KC, reduction="none").mean(dim=1)
    loss = _mean_of_samples(error_K, targets.sample_K, samples)
    logs = {"trivial": _mean_of_samples(trivial_K, targets.sample_K, samples).detach()}
    for number, kind in enumerate(KINDS):
        of_kind = targets.kind_K == number
        if of_kind.any():
            logs[f"loss_{kind}"] = error_K[of_kind].mean().detach()
            trivial = trivial_K[of_kind].mean().detach()
            if trivial > NOTHING_TO_GAIN:
                logs[f"gain_{kind}"] = 1 - logs[f"loss_{kind}"] / trivial
    return loss, logs


def _mean_of_samples(value_K: Tensor, sample_K: Tensor, samples: int) -> Tensor:
    """Mean over samples of each sample's mean."""
    total_B = value_K.new_zeros(samples).index_add(0, sample_K, value_K)
    count_B = torch.bincount(sample_K, minlength=samples)
    return (total_B / count_B.clamp_min(1)).sum() / (count_B > 0).sum().clamp_min(1)


def mae_loss(rebuild: Callable[[Tensor], Tensor], out_GW: Tensor, batch: Batch, at_once: int | None = None) -> Tensor:
    """Mean squared error of rebuilt voxels (own z-score) over their variance, per sample, then over samples.

    Parameters
    ----------
    rebuild : callable
        From outputs of the predictor to voxels, (G, W) to (G, E V).
    out_GW : Tensor
        At the rebuilt targets.
    batch : Batch
    at_once : int, optional
        Cells that are rebuilt together, and again in the backward pass: what is rebuilt is never kept whole. None: all,
        kept.
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
    """Per sample: number, sum and sum of squares of the voxels to be rebuilt, and the squared error; (4, B)."""
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
    """Epps-Pulley statistic of the projections on each slice against N(0, 1), mean over slices.

    Integral of |empirical characteristic function - exp(-t^2 / 2)|^2 over t from 0.2 to 4 (one side is enough: the
    function is Hermitian), by the trapezoidal rule.
    """
    t_P = torch.linspace(*RANGE, POINTS, device=x_MC.device)
    normal_P = torch.exp(-(t_P**2) / 2)
    phase_MSP = (x_MC @ slice_CS)[..., None] * t_P
    gap_SP = (phase_MSP.cos().mean(dim=0) - normal_P) ** 2 + phase_MSP.sin().mean(dim=0) ** 2
    return torch.trapezoid(gap_SP, t_P, dim=1).mean()
