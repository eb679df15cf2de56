"""Embeddings of patches: of voxel values, of positions on the grid, and of time in seconds.

Legend: N tokens; L places of a grid; A its axes; Q rows of patches; V voxels of a patch; C channels; F frequencies of a
position.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from slim.config import View
from slim.model.inputs import Voxels

# Periods (s) of the sinusoids that encode the time of a window in the scan, from one frame to a long scan.
_PERIODS = tuple(2.0 * 4.0**i for i in range(6))

# Shortest period (in places) of the sinusoids with which position embeddings are initialised.
_SHORTEST = 2.5

# A voxel with an SD (global-SD units) up to this value counts as constant or background.
STILL = 1e-6


def standardise(value_NV: Tensor, spread_NV: Tensor) -> Tensor:
    """Divide the fluctuation of each voxel by its SD; background and constant voxels are 0."""
    alive = spread_NV > STILL
    return torch.where(alive, value_NV / torch.where(alive, spread_NV, 1.0), 0.0)


class PatchEmbed(nn.Module):
    """Linear embedding of the V voxels of a kept patch.

    Because the map is linear, the baseline is embedded once per patch and the fluctuation once per frame, and the two
    are added. The small fluctuation is therefore not rounded by adding it to the much larger baseline first.
    """

    def __init__(self, voxels: int, dim: int, view: View):
        super().__init__()
        self.view = view
        self.whole = nn.Linear(voxels, dim, bias=False) if view != "voxel" else None
        self.own = nn.Linear(voxels, dim, bias=False) if view != "global" else None
        self.bias = nn.Parameter(torch.zeros(dim))

    def baseline(self, voxels: Voxels) -> Tensor | None:
        """Embedding of the baseline of every patch, (Q, C); None if the view has no baseline."""
        return None if self.whole is None else self.whole(voxels.baseline_QV)

    def forward(self, value_NV: Tensor, spread_NV: Tensor, base_NC: Tensor | None) -> Tensor:
        """Embedding of tokens, (N, C), given the spread and the embedded baseline of their patches."""
        x_NC = self.bias
        if self.whole is not None and base_NC is not None:
            x_NC = x_NC + self.whole(torch.where(spread_NV > STILL, value_NV, 0.0)) + base_NC
        if self.own is not None:
            x_NC = x_NC + self.own(standardise(value_NV, spread_NV))
        return x_NC


class Seconds(nn.Module):
    """A linear map of sinusoids of time in s, initialised with zeros."""

    def __init__(self, dim: int):
        super().__init__()
        self.linear = nn.Linear(2 * len(_PERIODS), dim, bias=False)
        self.rate: Tensor
        self.register_buffer("rate", 2 * math.pi / torch.tensor(_PERIODS), persistent=False)
        nn.init.zeros_(self.linear.weight)

    def forward(self, second_N: Tensor) -> Tensor:
        phase = second_N[:, None] * self.rate
        return self.linear(torch.cat([phase.sin(), phase.cos()], dim=1))


def sinusoids(shape: Sequence[int], dim: int) -> Tensor:
    """Sines and cosines for every place of a grid, (places, dim), with an equal share of the channels for each axis.

    Periods decrease geometrically from twice the length of the axis to `_SHORTEST` places. Remaining channels are 0.
    """
    at_LA = torch.cartesian_prod(*[torch.arange(size, dtype=torch.float64) for size in shape]).view(-1, len(shape))
    count = dim // (2 * len(shape))
    table_LC = torch.zeros(len(at_LA), dim)
    for axis, size in enumerate(shape):
        longest = max(2.0 * size, _SHORTEST)
        period = torch.logspace(math.log2(longest), math.log2(_SHORTEST), count, base=2, dtype=torch.float64)
        phase_LF = 2 * math.pi * at_LA[:, axis, None] / period
        first = 2 * count * axis
        table_LC[:, first : first + 2 * count] = torch.stack([phase_LF.sin(), phase_LF.cos()], dim=2).flatten(1)
    return table_LC


@torch.no_grad()
def init_positions(space_LC: Tensor, time_LC: Tensor, seconds: Seconds, shape: Sequence[int]) -> None:
    """Initialise learned positions on a grid (time first) with sinusoids, and positions in s with 0.

    The sinusoids are as large as an embedded patch. With them, neighbouring places have similar embeddings from the
    first step, so attention can find related places. From small random numbers, learning this takes longer than most
    runs.
    """
    space_LC.copy_(sinusoids(shape[1:], space_LC.shape[1]))
    time_LC.copy_(sinusoids(shape[:1], time_LC.shape[1]))
    nn.init.zeros_(seconds.linear.weight)


def init_linear(module: nn.Module) -> None:
    """Xavier weights and zero biases. A fixed SD of 0.02 would be too small for the narrow layers of small presets."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
