"""The target encoder: an exponential moving average (EMA) of the online encoder, in fp32.

Legend: M cells; C channels.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

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
        self._linear = [
            f"{module}.{name}"
            for module, layer in self.encoder.named_modules()
            if isinstance(layer, nn.Linear)
            for name, _ in layer.named_parameters()
        ]

    @torch.no_grad()
    def encode(self, batch: Batch, plan: Plan) -> Tensor:
        """Features of the cells of a plan, float32 (M, C)."""
        with torch.autocast(batch.brain_QV.device.type, torch.bfloat16, enabled=self.bf16):
            return functional_call(self.encoder, self._halves() if self.bf16 else {}, (batch.voxels, plan)).float()

    def _halves(self) -> dict[str, Tensor]:
        """Weights of the linear layers in bf16, copied in one call. Autocast would copy each of them for each chunk."""
        weights: list[Tensor] = [self.encoder.get_parameter(name) for name in self._linear]
        halves = [torch.empty_like(weight, dtype=torch.bfloat16) for weight in weights]
        torch._foreach_copy_(halves, weights)
        return dict(zip(self._linear, halves, strict=True))

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
        mine: list[Tensor] = [*self.encoder.parameters()]
        others: list[Tensor] = [*encoder.parameters()]
        if full is None:
            torch._foreach_lerp_(mine, others, 1 - momentum)
            return
        for own, other in zip(mine, others, strict=True):  # one by one: each whole value takes memory
            own.lerp_(full(other).to(own.device, own.dtype), 1 - momentum)
