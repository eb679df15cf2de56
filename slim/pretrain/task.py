"""The pretraining task of the trainer: its data and its learner."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from shards.format.reader import Dataset
from slim.checkpoints import checkpoint
from slim.checkpoints.run_folder import CHECKPOINTS
from slim.checkpoints.seen import Seen
from slim.config import PretrainSettings
from slim.pretrain import start
from slim.pretrain.learner import PretrainLearner
from slim.pretrain.objective import Objective
from slim.training.reshard import States
from slim.training.task import Beginning, TrainingTask


class PretrainTask(TrainingTask):
    """Pretraining with the JEPA, SIG and MAE terms on all training sessions."""

    name = "pretrain"
    splits = ("train",)
    settings: PretrainSettings

    def __init__(self, settings: PretrainSettings):
        super().__init__(settings, [Dataset(item.path) for item in settings.data])

    def seen(self) -> Seen | None:
        """The subjects seen in this run; None if it begins with weights that have seen others, see `begin`."""
        return super().seen() if self.settings.init is None else None

    def begin(self, folder: Path) -> Beginning:
        if self.settings.init is None:
            return super().begin(folder)
        return start.begin(self.settings, self.datasets[0], self.geometry, folder, super().seen())

    def moments(self) -> States | None:
        init = self.settings.init
        return start.InitialStates(Path(self.settings.run.out), init) if init is not None and init.optimizer else None

    @property
    def learned(self) -> Any:
        return self.settings.loss_weights

    def learner(self, device: torch.device) -> PretrainLearner:
        folder = Path(self.settings.run.out)
        torch.manual_seed(self.settings.run.seed)
        model, init = Objective(self.settings, self.geometry, self.datasets[0].grid.voxels), self.settings.init
        learner = PretrainLearner(self.settings, model.to(device))
        if init is not None and not checkpoint.folders(folder / CHECKPOINTS):  # a checkpoint holds all weights
            start.InitialStates(folder, init).load_into(model, learner.target.encoder)
        return learner
