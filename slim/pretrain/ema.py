"""The target encoder, an exponential moving average in fp32, and running means of features.

Legend: M cells; C channels.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from slim.data.collate import Batch
from slim.model.hiera import Hiera
from slim.model.ragged import Plan


class PlaceMean:
    """Running mean of features at each cell (place and slot), and their variance around it per channel.

    Sums of a step are collected over micro-batches and processes, then committed once, so the statistics do not depend
    on how the step's samples were spread.
    """

    _NAMES = ("mean", "variance", "seen", "started")

    def __init__(self, cells: int, dim: int, decay: float, device: torch.device):
        self.decay = decay
        self.mean = torch.zeros(cells, dim, device=device)
        self.variance = torch.ones(dim, device=device)
        self.seen = torch.zeros(cells, device=device)
        self.started = torch.zeros(1, device=device)  # whether `variance` was measured yet
        self._sums = torch.zeros(cells, dim + 1, device=device)
        self._squares = torch.zeros(dim + 1, device=device)

    def observe(self, x_MC: Tensor, cell_M: Tensor) -> None:
        """Collect features of this step."""
        self._sums[:, :-1].index_add_(0, cell_M, x_MC)
        self._sums[:, -1].index_add_(0, cell_M, torch.ones_like(cell_M, dtype=x_MC.dtype))
        centred_MC = x_MC - self.mean[cell_M]
        known_M = self.seen[cell_M] > 0
        self._squares[:-1] += (centred_MC[known_M] ** 2).sum(dim=0)
        self._squares[-1] += known_M.sum()

    def commit(self) -> None:
        """Take in what all processes collected."""
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(self._sums)
            dist.all_reduce(self._squares)
        count = self._sums[:, -1]
        here = count > 0
        fresh = self._sums[here, :-1] / count[here, None]
        decay = torch.where(self.seen[here] > 0, self.decay, 0.0)[:, None]
        self.mean[here] = decay * self.mean[here] + (1 - decay) * fresh
        self.seen[here] = 1
        if self._squares[-1] > 0:
            fresh = self._squares[:-1] / self._squares[-1]
            self.variance.lerp_(fresh, 1 - self.decay if self.started else 1.0)
            self.started.fill_(1)
        self.discard()

    def discard(self) -> None:
        """Drop what was collected."""
        self._sums.zero_()
        self._squares.zero_()

    def state(self, prefix: str) -> dict[str, Tensor]:
        return {f"{prefix}.{name}": getattr(self, name) for name in self._NAMES}

    def load(self, tensors: dict[str, Tensor], prefix: str) -> None:
        for name in self._NAMES:
            getattr(self, name).copy_(tensors[f"{prefix}.{name}"])


class Target:
    """The EMA encoder.

    Parameters
    ----------
    encoder : Hiera
        The online encoder at its start; copied.
    bf16 : bool
        Autocast its forward pass.
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
        """Move towards the online encoder.

        Parameters
        ----------
        encoder : nn.Module
            The online encoder.
        momentum : float
            Share that stays.
        full : callable, optional
            Gives the whole fp32 value of a parameter where processes hold parts of it (ZeRO stage 3).
        """
        for mine, other in zip(self.encoder.parameters(), encoder.parameters(), strict=True):
            value = other.detach() if full is None else full(other)
            mine.lerp_(value.to(mine.device, mine.dtype), 1 - momentum)
