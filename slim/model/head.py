"""The head that predicts labels from the encoder's features: pooling over the tokens of a sample, and a linear map.

Legend: B samples; M cells; C channels; H queries; S time slots; L places; Q principal axes; P pooled features; K
outputs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from shards.core.errors import ConfigError
from slim.config import HeadSettings
from slim.model import pooling
from slim.model.hiera import Hiera
from slim.model.inputs import Batch
from slim.model.ragged import Plan

_MOST = 2_000_000  # largest number of features of `cov`


class Head(nn.Module):
    """Pooling (`cov`, mean or attentive), standardisation and a linear map.

    Differences between subjects are small compared with what their tokens have in common, so pooled features are
    standardised by means and SDs measured once before training (`standardise`). Queries are initialised with zeros,
    where attentive pooling equals the mean. `cov` is the correlation of places over time, as in
    `slim.inference.vectors`; its principal axes are measured once before training (`set_axes`) and stay fixed.

    Parameters
    ----------
    settings : HeadSettings
    dim : int
        Channels of the encoder.
    outputs : int
    cells : sequence of int
        The grid of cells, (slots, x, y, z).

    Raises
    ------
    ConfigError
        If `cov` has more axes than there are channels, or too many pairs of places.
    """

    centre_P: Tensor
    scale_P: Tensor
    axis_CQ: Tensor | None

    def __init__(self, settings: HeadSettings, dim: int, outputs: int, cells: Sequence[int]):
        super().__init__()
        queries = settings.queries if settings.pooling == "attentive" else 0
        features = dim * max(1, queries)
        self.slots, self.places = cells[0], math.prod(cells[1:])
        axis_CQ = None
        if settings.pooling == "cov":
            features = _pairs(settings.components, dim, self.places)
            axis_CQ = torch.zeros(dim, settings.components)
        self.register_buffer("axis_CQ", axis_CQ)
        self.query = nn.Parameter(torch.zeros(queries, dim)) if queries else None
        self.linear = nn.Linear(features, outputs)
        if axis_CQ is None:
            nn.init.trunc_normal_(self.linear.weight, std=0.02)
        else:
            nn.init.zeros_(self.linear.weight)  # with random weights, a sum over so many features would be large
        nn.init.zeros_(self.linear.bias)
        self.register_buffer("centre_P", torch.zeros(features))
        self.register_buffer("scale_P", torch.ones(features))

    def pool(self, x_MC: Tensor, whole: Plan, samples: int) -> Tensor:
        """Pool the tokens at the cells of a plan to one vector for each sample, (B, P)."""
        if self.axis_CQ is not None:
            shape = (self.slots, self.places)
            return pooling.ragged_cov(x_MC, self.axis_CQ, whole.sample_M, whole.cell_M, whole.slots_B, shape)
        if self.query is None:
            logit_MH = x_MC.new_zeros(len(x_MC), 1)
        else:
            logit_MH = x_MC @ self.query.T / x_MC.shape[1] ** 0.5
        return pooling.ragged(x_MC, logit_MH, whole.sample_M, samples)

    def forward(self, pooled_BP: Tensor) -> Tensor:
        """Logits of the classes, or the predicted value, (B, K)."""
        return self.linear((pooled_BP - self.centre_P) * self.scale_P)

    def scatter(self, x_MC: Tensor, whole: Plan) -> Tensor:
        """Scatter matrix of the tokens around the mean of their sample and place, float64 (C, C)."""
        place_M = whole.sample_M.long() * self.places + whole.cell_M % self.places
        x_MC = x_MC.double()
        sum_NC = x_MC.new_zeros(int(place_M.max()) + 1, x_MC.shape[1]).index_add(0, place_M, x_MC)
        slots_B = torch.tensor(whole.slots_B, dtype=x_MC.dtype, device=x_MC.device)
        x_MC = x_MC - sum_NC[place_M] / slots_B[whole.sample_M.long()][:, None]
        return x_MC.T @ x_MC

    def set_axes(self, scatter_CC: Tensor) -> None:
        """Set the axes of `cov` to the directions of largest variance over time."""
        assert self.axis_CQ is not None
        vectors_CC = torch.linalg.eigh(scatter_CC.cpu())[1].flip(1)
        self.axis_CQ.copy_(vectors_CC[:, : self.axis_CQ.shape[1]])

    def standardise(self, mean_P: Tensor, variance_P: Tensor) -> None:
        """Set the means and variances that standardise pooled features; features that do not vary are dropped.

        Features of `cov` are also divided by the square root of their number, because with so many features a small
        change of each weight would change the output strongly.
        """
        sd_P = variance_P.clamp_min(0).sqrt()
        alive_P = pooling.varies(mean_P, sd_P)
        self.centre_P.copy_(mean_P)
        self.scale_P.copy_(torch.where(alive_P, 1 / torch.where(alive_P, sd_P, 1.0), 0.0))
        if self.axis_CQ is not None:
            self.scale_P /= alive_P.sum().clamp_min(1).sqrt()


def _pairs(components: int, dim: int, places: int) -> int:
    if components > dim:
        raise ConfigError("head.components", "", components, f"at most {dim}, the number of channels of the encoder")
    series = places * components
    if (count := series * (series - 1) // 2) > _MOST:
        hint = "Lower head.components, or set head.pooling=attentive"
        raise ConfigError("head.pooling", "", f"cov with {count} pairs of {places} places", f"at most {_MOST}", hint)
    return count


class Answerer(nn.Module):
    """The encoder and the head, as the module that is fine-tuned."""

    def __init__(self, encoder: Hiera, head: Head, bf16: bool):
        super().__init__()
        self.encoder, self.head, self.bf16 = encoder, head, bf16

    def forward(self, batch: Batch, tokens: bool = False) -> tuple[Tensor, Tensor] | Tensor:
        """Outputs (B, K) and pooled features before standardisation (B, P), from all brain tokens of a sample.

        With `tokens`, only the tokens of the encoder are returned, (M, C).
        """
        with torch.autocast(batch.brain_QV.device.type, torch.bfloat16, enabled=self.bf16):
            x_MC = self.encoder(batch.voxels, batch.whole)
        if tokens:
            return x_MC.float()
        pooled_BP = self.head.pool(x_MC.float(), batch.whole, len(batch.keys))
        return self.head(pooled_BP), pooled_BP
