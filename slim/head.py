"""What is put on the encoder to answer a task: pooling over the tokens of a sample, and a linear map.

Legend: B samples; M cells; C channels; H queries; P pooled features; K outputs.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from slim.batch import Batch
from slim.config import HeadSettings
from slim.hiera import Hiera


class Head(nn.Module):
    """Mean or attentive pooling, standardised, then a linear map.

    What differs between people is small beside what their tokens have in common, and a linear map trained from a small
    start sees the second first. So pooled features are standardised by means and SDs that are measured once, before
    training (`standardise`). Queries start at zero, where attentive pooling is the mean.
    """

    centre_P: Tensor
    scale_P: Tensor

    def __init__(self, settings: HeadSettings, dim: int, outputs: int):
        super().__init__()
        queries = settings.queries if settings.pooling == "attentive" else 0
        features = dim * max(1, queries)
        self.query = nn.Parameter(torch.zeros(queries, dim)) if queries else None
        self.linear = nn.Linear(features, outputs)
        nn.init.trunc_normal_(self.linear.weight, std=0.02)
        nn.init.zeros_(self.linear.bias)
        self.register_buffer("centre_P", torch.zeros(features))
        self.register_buffer("scale_P", torch.ones(features))

    def pool(self, x_MC: Tensor, sample_M: Tensor, samples: int) -> Tensor:
        """One vector for each sample, (B, P)."""
        if self.query is None:
            logit_MH = x_MC.new_zeros(len(x_MC), 1)
        else:
            logit_MH = x_MC @ self.query.T / x_MC.shape[1] ** 0.5
        index_M = sample_M.long()
        index_MH = index_M[:, None].expand(logit_MH.shape)
        largest_BH = logit_MH.new_full((samples, logit_MH.shape[1]), -torch.inf)
        largest_BH = largest_BH.scatter_reduce(0, index_MH, logit_MH.detach(), "amax")
        weight_MH = torch.exp(logit_MH - largest_BH[index_M])
        total_BH = weight_MH.new_zeros(largest_BH.shape).index_add(0, index_M, weight_MH)
        share_MH = weight_MH / total_BH[index_M]
        pooled = [
            x_MC.new_zeros(samples, x_MC.shape[1]).index_add(0, index_M, x_MC * s_M[:, None]) for s_M in share_MH.T
        ]
        return torch.cat(pooled, dim=1)

    def forward(self, pooled_BP: Tensor) -> Tensor:
        """Logits of the classes, or the value, (B, K)."""
        return self.linear((pooled_BP - self.centre_P) * self.scale_P)

    def standardise(self, mean_P: Tensor, variance_P: Tensor) -> None:
        """Set what pooled features are standardised by; those that do not vary are dropped."""
        sd_P = variance_P.clamp_min(0).sqrt()
        alive_P = sd_P > 1e-5 * (mean_P.abs() + sd_P + 1e-30)  # as in `slim.linear`
        self.centre_P.copy_(mean_P)
        self.scale_P.copy_(torch.where(alive_P, 1 / torch.where(alive_P, sd_P, 1.0), 0.0))


class Answerer(nn.Module):
    """Encoder and head: the module that is fine-tuned."""

    def __init__(self, encoder: Hiera, head: Head, bf16: bool):
        super().__init__()
        self.encoder, self.head, self.bf16 = encoder, head, bf16

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Outputs (B, K) and pooled features before they are standardised (B, P), from all brain tokens of a sample."""
        with torch.autocast(batch.brain_QV.device.type, torch.bfloat16, enabled=self.bf16):
            x_MC = self.encoder(batch.voxels, batch.whole)
        pooled_BP = self.head.pool(x_MC.float(), batch.whole.sample_M, len(batch.keys))
        return self.head(pooled_BP), pooled_BP
