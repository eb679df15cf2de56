"""The fine-tuning task: trains an encoder and a head on the labels of a task, with the trainer of pretraining.

The run folder is like that of a pretraining run, with further files that `slim-brain finetune` writes before the start:

    RUN/answers.json         labels of the training and validation subjects (`slim.finetune.labels`)
    RUN/start.safetensors    the initial encoder; if missing, random weights from the seed
    RUN/seen.json            subjects seen in pretraining; missing if this is not known

Of the encoder, all weights are trained, or a part of them; `freeze` and `lora` of the settings say which.

The validation subjects are predicted once per epoch. The weights with the best validation loss are kept in every
checkpoint as `best.encoder...` and `best.head...`. Test subjects are not used here.

Legend: B samples; P pooled features (3: count, sum, sum of squares); K outputs; N sessions; S subjects.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from slim.checkpoints import start
from slim.checkpoints.checkpoint import BEST
from slim.checkpoints.seen import Seen
from slim.config import FinetuneSettings
from slim.finetune.labels import Answers
from slim.inference.predict import predict, sum_over_processes, world_size
from slim.model import lora
from slim.model.geometry import Geometry
from slim.model.head import Answerer, Head
from slim.model.hiera import Hiera
from slim.model.inputs import Batch
from slim.training.metrics import MetricsLine
from slim.training.optim import Group, decays
from slim.training.schedule import StepPlan
from slim.training.task import Forward, Full, Losses, Steps, TrainingTask

LAYER_DECAY = 0.75
_MEASURED = 64  # number of samples (at most an epoch) from which the standardisation of pooled features is computed


class FinetuneTask(TrainingTask):
    """Trains an encoder and a head on the training subjects of a task."""

    name = "fine-tune"
    settings: FinetuneSettings

    def __init__(self, settings: FinetuneSettings):
        self.folder = Path(settings.run.out)
        self.answers = Answers.read(self.folder)
        super().__init__(settings, [self.answers.open(item.path) for item in settings.data])

    def seen(self) -> Seen | None:
        """The subjects seen in pretraining, as written by slim-brain finetune."""
        return Seen.read(self.folder)

    @property
    def learned(self) -> Any:
        settings = self.settings
        adapted = [settings.freeze, settings.lora and settings.lora.model_dump()]
        # as in earlier versions, if all weights are trained
        return [settings.head.model_dump(), settings.start, self.answers.digest(), *(adapted if any(adapted) else [])]

    def learner(self, device: torch.device) -> FinetuneLearner:
        torch.manual_seed(self.settings.run.seed)
        model = make_model(self.settings, self.geometry, self.datasets[0].grid.voxels, self.answers.outputs)
        if self.settings.start is not None:
            tensors = start.read(self.folder, self.settings.start, "slim-brain finetune")
            model.encoder.load_state_dict(tensors)
        model.encoder.freeze(self.settings.freeze)
        if self.settings.lora is not None:
            lora.inject(model.encoder, self.settings.lora, self.settings.freeze)
        return FinetuneLearner(self, model.to(device))


class FinetuneLearner:
    """The learner of fine-tuning, with the best weights so far; see `slim.training.task.Learner`.

    Parameters
    ----------
    task : FinetuneTask
    model : Answerer
        The model before training, on its device.
    """

    logged = ("loss",)

    def __init__(self, task: FinetuneTask, model: Answerer):
        self.task, self.settings, self.model, self.answers = task, task.settings, model, task.answers
        self.device = next(model.parameters()).device
        samples = self.settings.run.batch * self.settings.run.accumulate * world_size()
        self.per_step, self.every = samples, max(1, round(task.stream.per_epoch / samples))
        if self.answers.classes:
            self._weight_K = torch.tensor(self.answers.class_weights(), dtype=torch.float32, device=self.device)
        self.best: dict[str, Tensor] = {}
        self.best_loss, self.best_step = math.inf, 0

    def summarise(self, mean: dict[str, float | None]) -> dict[str, float | None]:
        """Return the means unchanged."""
        return mean

    def groups(self) -> list[Group]:
        """One or two groups for each depth: embedding, blocks, norm, head. The learning rate decreases to the input.

        Only parameters that are trained are in them, so the others have no gradients and no moments.
        """
        decay = self.settings.head.layer_decay
        if decay is None:
            decay = 1.0 if self.settings.start is None else LAYER_DECAY
        found: dict[tuple[int, bool], Group] = {}
        top = self.model.encoder.n + 1
        for name, parameter in self.model.named_parameters():
            if not parameter.requires_grad:
                continue
            depth, decayed = depth_of(name, self.model.encoder.n), decays(name, parameter)
            scale = decay ** (top - depth) if depth <= top else self.settings.head.lr_scale
            group = found.setdefault((depth, decayed), Group([], decayed, scale))
            group.parameters.append(parameter)
        return [found[key] for key in sorted(found)]

    @torch.no_grad()
    def begin(self, steps: Steps, forward: Forward) -> None:
        """Measure the axes of `cov`, then the pooled features, on the first samples before training."""
        head, count = self.model.head, math.ceil(min(_MEASURED, self.task.stream.per_epoch) / self.per_step)
        if head.axis_CQ is not None:
            scatter_CC = torch.zeros(2 * [self.model.encoder.dim], dtype=torch.float64, device=self.device)
            for batch in steps(count):
                x_MC = forward(batch, tokens=True)
                if not batch.empty:
                    scatter_CC += head.scatter(x_MC, batch.whole)
            sum_over_processes(scatter_CC)
            head.set_axes(scatter_CC)
        sums_3P = torch.zeros(3, head.centre_P.numel(), dtype=torch.float64, device=self.device)
        for batch in steps(count):
            _, pooled_BP = forward(batch)
            if not batch.empty:
                x_BP = pooled_BP.double()
                sums_3P += torch.stack([torch.ones_like(x_BP), x_BP, x_BP**2]).sum(dim=1)
        sum_over_processes(sums_3P)
        mean_P, square_P = sums_3P[1:] / sums_3P[0].clamp_min(1)
        head.standardise(mean_P.float(), (square_P - mean_P**2).float())

    def losses(self, batch: Batch, step: int, forward: Forward) -> Losses:
        """Cross-entropy with equal weight for all classes, or squared error, averaged over samples."""
        guess_BK, _ = forward(batch)
        if batch.empty:
            return Losses(guess_BK.sum() * 0, {})
        answer_B = torch.tensor([self.answers.train[key][1] for key in batch.keys], device=self.device)
        if self.answers.classes:
            loss_B = F.cross_entropy(guess_BK, answer_B.long(), reduction="none") * self._weight_K[answer_B.long()]
        else:
            loss_B = (guess_BK[:, 0] - answer_B) ** 2
        return Losses(loss_B.mean(), {"loss": loss_B.mean().detach()})

    def commit(self, step: int, steps: int | StepPlan, forward: Forward, full: Full | None) -> MetricsLine:
        """Validate after the last step of an epoch and of the run, and keep the weights if they are the best so far."""
        done = step + 1
        if done % self.every and done != (steps if isinstance(steps, int) else steps.end):
            return {}
        loss = self.validate(forward)
        if loss < self.best_loss:
            self.best_loss, self.best_step = loss, done
            self.best = {name: value.detach().cpu().clone() for name, value in self._now(full).items()}
        return {"val_loss": loss, "best_step": self.best_step}

    def discard(self) -> None:
        """Do nothing: no statistics are collected."""

    def validate(self, forward: Forward) -> float:
        """Loss of the validation subjects, predicted from all windows of their sessions; equal in all processes."""
        (dataset,) = self.task.datasets
        sessions, classes = dataset.of_split("val"), self.answers.classes
        guess_NK = predict(forward, classes, dataset, sessions, self.task.geometry, self.settings, self.device)
        subject_N, answer_N = np.array([self.answers.val[session.key] for session in sessions]).T
        return validation_loss(guess_NK, subject_N, answer_N, classes)

    def _now(self, full: Full | None) -> dict[str, Tensor]:
        """The present encoder and head as whole tensors, by name; with LoRA, as `slim.model.lora.merged` says."""
        tensors = {name: value if full is None else full(value) for name, value in self.model.named_parameters()}
        if self.settings.lora is not None:
            tensors = lora.merged(tensors, self.settings.lora)
        return tensors | dict(self.model.head.named_buffers(prefix="head"))

    def state(self, full: Full | None) -> dict[str, Tensor]:
        """The model, the best model so far, and its loss and step."""
        best = {f"{BEST}{name}": value for name, value in self.best.items()}
        how = torch.tensor([self.best_loss, self.best_step], dtype=torch.float64)
        return self._now(full) | best | {f"{BEST}of": how}

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Restore the buffers of the model, and the best model. The engine restores the parameters."""
        for name, buffer in self.model.head.named_buffers(prefix="head"):
            buffer.copy_(tensors[name])
        self.best_loss, best_step = tensors[f"{BEST}of"].tolist()
        self.best_step = int(best_step)
        self.best = {
            name.removeprefix(BEST): value
            for name, value in tensors.items()
            if name.startswith((f"{BEST}encoder.", f"{BEST}head.", f"{BEST}{lora.PREFIX}"))
        }


def make_model(settings: FinetuneSettings, geometry: Geometry, voxels: int, outputs: int) -> Answerer:
    """Make a model with random weights, drawn with the caller's generator."""
    encoder = Hiera(settings.model, geometry, voxels, settings.view)
    return Answerer(encoder, Head(settings.head, encoder.dim, outputs, geometry.cells), settings.precision == "bf16")


def count_trained(settings: FinetuneSettings, geometry: Geometry, voxels: int, outputs: int) -> int:
    """Number of parameters that a fine-tuning trains."""
    with torch.device("meta"):
        model = make_model(settings, geometry, voxels, outputs)
    model.encoder.freeze(settings.freeze)
    if settings.lora is None:
        return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    updates = lora.shapes(model.encoder, settings.lora, settings.freeze)
    head = sum(parameter.numel() for parameter in model.head.parameters())
    return head + sum(math.prod(shape) for shape in updates.values())


def depth_of(name: str, blocks: int) -> int:
    """Depth of a parameter of `Answerer`: 0 for embedding and positions, 1 ... for blocks, then last norm and head."""
    if name.startswith("encoder.blocks."):
        return int(name.split(".")[2]) + 1
    if name.startswith("head."):
        return blocks + 2
    return blocks + 1 if name.startswith("encoder.norm.") else 0


def validation_loss(guess_NK: np.ndarray, subject_N: np.ndarray, answer_N: np.ndarray, classes: int) -> float:
    """Loss over subjects (means of their sessions): log loss with equal weight for all classes, or squared error."""
    subjects, first = np.unique(subject_N, return_index=True)
    guess_SK = np.stack([guess_NK[subject_N == subject].mean(axis=0) for subject in subjects])
    answer_S = answer_N[first]
    if not classes:
        return float(((guess_SK[:, 0] - answer_S) ** 2).mean())
    loss_S = -np.log(np.maximum(guess_SK[np.arange(len(subjects)), answer_S.astype(int)], 1e-12))
    return float(np.mean([loss_S[answer_S == answer].mean() for answer in np.unique(answer_S)]))
