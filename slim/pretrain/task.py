"""The pretraining task of the trainer: its data and its learner."""

from __future__ import annotations

from typing import Any

import torch

from shards.format.reader import Dataset
from slim.config import PretrainSettings
from slim.pretrain.learner import PretrainLearner
from slim.pretrain.objective import Objective
from slim.training.task import TrainingTask


class PretrainTask(TrainingTask):
    """Pretraining with the JEPA, SIG and MAE terms on all training sessions."""

    name = "pretrain"
    splits = ("train",)
    settings: PretrainSettings

    def __init__(self, settings: PretrainSettings):
        super().__init__(settings, [Dataset(item.path) for item in settings.data])

    @property
    def learned(self) -> Any:
        return self.settings.loss_weights

    def learner(self, device: torch.device) -> PretrainLearner:
        torch.manual_seed(self.settings.run.seed)
        return PretrainLearner(
            self.settings, Objective(self.settings, self.geometry, self.datasets[0].grid.voxels).to(device)
        )
