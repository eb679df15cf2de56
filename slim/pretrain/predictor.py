"""The predictor: a narrow transformer over context features and mask tokens, with two light heads.

Legend: M cells of the context; K targets; W channels of the predictor; J context and targets together; B samples; S
slots.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from slim.config import PretrainSettings
from slim.model.embedding import Seconds, init_linear, init_positions
from slim.model.geometry import Geometry
from slim.model.hiera import Block
from slim.model.inputs import Batch


class Predictor(nn.Module):
    """A narrow transformer over context features and mask tokens with positions, and two light heads.

    Blocks alternate between attention inside a slot and over the whole sample. The other places in the slot of a target
    carry most of the information about it; with attention over the whole sample only, the predictor learns slowly.
    """

    def __init__(self, settings: PretrainSettings, geometry: Geometry, dim: int, voxels: int):
        super().__init__()
        sizes = settings.model.predictor
        jepa, _, mae = settings.loss_weights
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
        """Compute the outputs at the targets, (K, W)."""
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
