"""Running means of features, for each cell of the grid.

Legend: M cells of all brain tokens; C channels.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


class PlaceMean:
    """Running mean of the features at each cell (place and slot), and the variance around it per channel.

    The sums of a step are collected over micro-batches and processes and committed once, so the statistics do not
    depend on how the samples of a step are divided.
    """

    _NAMES = ("mean", "variance", "seen", "started")

    def __init__(self, cells: int, dim: int, decay: float, device: torch.device):
        self.decay = decay
        self.mean = torch.zeros(cells, dim, device=device)
        self.variance = torch.ones(dim, device=device)
        self.seen = torch.zeros(cells, device=device)
        self.started = torch.zeros(1, device=device)  # 1 once `variance` has been measured
        self._sums = torch.zeros(cells, dim + 1, device=device)
        self._squares = torch.zeros(dim + 1, device=device)

    def observe(self, x_MC: Tensor, cell_M: Tensor) -> None:
        """Collect features of this step."""
        self._sums[:, :-1].index_add_(0, cell_M, x_MC)
        self._sums[:, -1].index_add_(0, cell_M, torch.ones_like(cell_M, dtype=x_MC.dtype))
        known_M = self.seen[cell_M]
        centred_MC = (x_MC - self.mean[cell_M]) * known_M[:, None]
        self._squares[:-1] += (centred_MC**2).sum(dim=0)
        self._squares[-1] += known_M.sum()

    def commit(self) -> None:
        """Update the statistics with the features collected in all processes."""
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(self._sums)
            dist.all_reduce(self._squares)
        # No branch depends on a value, because the process would wait for the device to read it.
        count = self._sums[:, -1:]
        here = count > 0
        fresh = self._sums[:, :-1] / count.clamp_min(1)
        decay = self.decay * self.seen[:, None]
        self.mean.copy_(torch.where(here, decay * self.mean + (1 - decay) * fresh, self.mean))
        self.seen.copy_(torch.where(here[:, 0], 1.0, self.seen))
        known = self._squares[-1]
        fresh = self._squares[:-1] / known.clamp_min(1)
        weight = torch.where(known > 0, torch.where(self.started > 0, 1 - self.decay, 1.0), 0.0)
        self.variance.lerp_(fresh, weight.expand_as(fresh))
        self.started.copy_(torch.where(known > 0, 1.0, self.started))
        self.discard()

    def discard(self) -> None:
        """Discard the collected features."""
        self._sums.zero_()
        self._squares.zero_()

    def state(self, prefix: str) -> dict[str, Tensor]:
        return {f"{prefix}.{name}": getattr(self, name) for name in self._NAMES}

    def load(self, tensors: dict[str, Tensor], prefix: str) -> None:
        for name in self._NAMES:
            getattr(self, name).copy_(tensors[f"{prefix}.{name}"])
