"""Steps to be counted, and the same carried out; the model is large enough for segments, small enough for a test."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from slim.config import PRESETS, ModelSettings, PretrainSettings
from slim.model.geometry import Geometry
from slim.model.inputs import Batch
from slim.model_settings import PredictorSettings
from slim.planning.step_cost import make_batch
from slim.pretrain.learner import PretrainLearner
from slim.pretrain.objective import Objective
from slim.training.optim import parameter_groups

# Wide enough that nearly all memory lies in tensors far larger than 512 bytes.
MIDDLE = ModelSettings(
    embed=32,
    heads=2,
    depths=(1, 2, 2),
    unit=(5, 4, 4, 4),
    strides=((5, 2, 2, 2),),
    predictor=PredictorSettings(width=96, depth=2, heads=3),
)


def settings(**other) -> PretrainSettings:
    given = {"data": "x", "model": PRESETS["tiny"], "precision": "fp32", "chunk_tokens": None, "windows": {"k": 2}}
    return PretrainSettings(**given | {"run": {"out": "x", "batch": 1}} | other)


def prepared(settings: PretrainSettings, patches: int = 6) -> tuple[Geometry, Batch]:
    """Geometry, and a batch of one box of a brain on a cubic grid of so many patches."""
    geometry = Geometry((settings.windows.k * 5, *[patches] * 3), settings.model.unit, settings.model.strides)
    brain_XYZ = np.zeros([patches * 4] * 3, bool)
    brain_XYZ[4:-4, 3:-2, 5 : -patches - 1] = True
    return geometry, make_batch(settings, geometry, brain_XYZ)


def zero_settings(
    stage: int, accumulate: int = 1, processes: int = 1, model: ModelSettings = MIDDLE
) -> PretrainSettings:
    run = {"out": "x", "batch": 1, "accumulate": accumulate, "processes": processes}
    return settings(model=model, zero={"stage": stage}, run=run)


class RealStep:
    """The step that is counted, carried out: plain torch, on values of the batch's own shapes."""

    def __init__(self, settings: PretrainSettings, geometry: Geometry, batch: Batch, device: str = "cpu"):
        self.settings, self.batch = settings, batch.to(device)
        if device == "cpu":  # `to` has copied the plans
            self.batch.brain_QV = batch.brain_QV.clone()
            self.batch.voxels = type(batch.voxels)(*(value.clone() for value in vars(batch.voxels).values()))
        torch.manual_seed(0)
        for name in ("value_RV", "baseline_QV", "spread_QV"):
            getattr(self.batch.voxels, name).uniform_(0.1, 1)
        self.learner = PretrainLearner(settings, Objective(settings, geometry, batch.brain_QV.shape[1]).to(device))
        self.optimizer = torch.optim.AdamW(parameter_groups(self.learner.model), fused=True)

    def __call__(self, check: bool = True) -> float:
        losses = self.learner.losses(self.batch, 0)
        losses.total.backward()
        nn.utils.clip_grad_norm_(self.learner.model.parameters(), self.settings.optimizer.clip, foreach=True)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.learner.commit(0, 2)
        assert not check or all(x_NC is None or x_NC.isfinite().all() for x_NC in losses.features.values())
        return losses.total.item()
