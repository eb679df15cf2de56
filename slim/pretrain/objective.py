"""The pretraining objective: JEPA, SIG and MAE terms on one encoder.

- JEPA: smooth-L1 loss between predicted and target features at the target cells. The EMA encoder computes the target
  features from all brain tokens. They are layer-normed, centred by the running mean of their place and slot, and
  standardised per channel; predicting the mean of each place therefore gains nothing.
- SIG: the Epps-Pulley statistic of random projections (slices) of the place-centred context features against a standard
  normal. It keeps the features from collapsing onto few dimensions (after LeJEPA, Balestriero & LeCun, arXiv
  2511.08544).
- MAE: the predictor reconstructs the z-scored voxels of some target cells; the term is the mean squared error divided
  by the variance of these voxels.

Every term is a mean over samples of the mean inside a sample, so it does not depend on how samples are divided among
processes. SIG is computed over groups of `sig_samples` samples.

Legend: B samples; M cells of the context; K targets; G rebuilt targets; E tokens of a cell; V voxels of a patch; C
channels of the encoder; W channels of the predictor; S slices; P points; J context and targets together.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from slim.config import PretrainSettings
from slim.model.geometry import Geometry
from slim.model.hiera import Hiera
from slim.model.inputs import Batch
from slim.pretrain.losses import SLICES, jepa_loss, mae_loss, sig_loss
from slim.pretrain.predictor import Predictor
from slim.training.task import Losses


class Objective(nn.Module):
    """The encoder, the predictor and the terms of the loss, as the module that DeepSpeed trains."""

    def __init__(self, settings: PretrainSettings, geometry: Geometry, voxels: int):
        super().__init__()
        self.loss_weights = settings.loss_weights
        self.sig_samples = settings.loss.sig_samples
        self.seed = settings.run.seed
        self.bf16 = settings.precision == "bf16"
        chunk = settings.tokens_at_once
        self.rebuilt_at_once = None if chunk is None else max(1, chunk // math.prod(geometry.cell))
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
            Running mean (cells, C) of the context features, subtracted for the SIG term; None without it.
        step : int
            Optimizer step. It and the seed determine the slices of SIG.
        """
        assert batch.context is not None and batch.targets is not None
        jepa, sig, mae = self.loss_weights
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
            loss = self._sig(centred_MC, batch.context.cells_B, step)
            total = total + sig * loss
            logs["loss_sig"] = loss.detach()
        if loss_mae is not None:
            total = total + mae * loss_mae
            logs["loss_mae"] = loss_mae.detach()
        logs["loss"] = total.detach()
        return Losses(total, logs, {"context": context_MC.detach()})

    def _sig(self, x_MC: Tensor, cells_B: list[int], step: int) -> Tensor:
        """Mean over groups of samples, given the number of cells of each sample."""
        rng = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        slice_CS = torch.randn(x_MC.shape[1], SLICES, generator=rng).to(x_MC.device)
        slice_CS = slice_CS / slice_CS.norm(dim=0)
        size = self.sig_samples or len(cells_B)
        cells = [sum(cells_B[first : first + size]) for first in range(0, len(cells_B), size)]
        return torch.stack([sig_loss(group_MC, slice_CS) for group_MC in x_MC.split(cells)]).mean()
