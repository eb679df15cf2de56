"""The target encoder: an exponential moving average (EMA) of the online encoder, in fp32.

Legend: M cells; C channels.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slim.model.hiera import Hiera
from slim.model.inputs import Batch
from slim.model.ragged import Plan


class Target:
    """The EMA encoder.

    Parameters
    ----------
    encoder : Hiera
        The online encoder before training; it is copied.
    bf16 : bool
        Whether the forward pass autocasts to bf16.
    """

    def __init__(self, encoder: Hiera, bf16: bool):
        self.encoder = copy.deepcopy(encoder).eval().requires_grad_(False)
        self.bf16 = bf16

    @torch.no_grad()
    def encode(self, batch: Batch, plan: Plan) -> Tensor:
        """Features of the cells of a plan, float32 (M, C)."""
        with torch.autocast(batch.brain_QV.device.type, torch.bfloat16, enabled=self.bf16):
            return self.encoder(batch.voxels, plan).float()

    def features(self, batch: Batch) -> Tensor:
        """Layer-normed features of all brain cells, float32 (M, C)."""
        x_MC = self.encode(batch, batch.whole)
        return F.layer_norm(x_MC, x_MC.shape[1:])

    @torch.no_grad()
    def update(self, encoder: nn.Module, momentum: float, full: Any = None) -> None:
        """Update the moving average with the weights of the online encoder.

        Parameters
        ----------
        encoder : nn.Module
            The online encoder.
        momentum : float
            Weight of the former value.
        full : callable, optional
            Returns the whole fp32 value of a parameter that is divided among processes (ZeRO stage 3).
        """
        for mine, other in zip(self.encoder.parameters(), encoder.parameters(), strict=True):
            value = other.detach() if full is None else full(other)
            mine.lerp_(value.to(mine.device, mine.dtype), 1 - momentum)
