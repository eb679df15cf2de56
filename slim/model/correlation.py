"""Correlations between series, with gradients.

Legend: S time slots; P series; E pairs of them.
"""

from __future__ import annotations

import torch
from torch import Tensor


def correlations(x_SP: Tensor) -> Tensor:
    """Of all pairs: the upper triangle, row by row, (E,). A series that does not vary correlates 0 with all others."""
    x_SP = x_SP - x_SP.mean(dim=0)
    square_P = (x_SP**2).sum(dim=0)
    x_SP = torch.where(square_P > 1e-24, x_SP / square_P.clamp(min=1e-24).sqrt(), 0.0)
    row, column = torch.triu_indices(x_SP.shape[1], x_SP.shape[1], 1, device=x_SP.device)
    return (x_SP.T @ x_SP)[row, column]
