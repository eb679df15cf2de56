"""Fine-tuning as a method for a task, in addition to the probes of frozen features.

Each split of the subjects has a fine-tuning in a separate run folder. It gets the labels of the training and validation
subjects. The test subjects are predicted once, in this module, after the training has ended.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from shards.core.errors import ConfigError
from shards.core.settings import check, override
from shards.format.reader import Dataset
from slim.checkpoints import checkpoint, lock, start
from slim.checkpoints.checkpoint import BEST, CheckpointError
from slim.checkpoints.run_folder import CHECKPOINTS, PROBE
from slim.checkpoints.seen import Seen
from slim.config import AnswerSettings, FinetuneSettings, renamed_assignments
from slim.evaluation import probe
from slim.evaluation.results import Report
from slim.evaluation.splits import Fold, Split
from slim.evaluation.task import Cases, Task
from slim.finetune.labels import Answers
from slim.finetune.task import count_trained, make_model
from slim.inference import export
from slim.inference.predict import predict
from slim.inference.slim_brain import SlimBrain
from slim.model import lora

FINETUNED, SCRATCH = "finetuned", "scratch"
_DEFAULTS: dict[str, dict[str, object]] = {
    "optimizer": {"lr": 1e-4, "betas": [0.9, 0.999], "wd": [0.05, 0.05]},
    "run": {"epochs": 30, "keep": 1},
}
_KEPT = ("precision", "chunk_tokens", "zero")  # from the pretraining run, unless given
_OF_RUN = ("batch", "workers", "wandb")
# Settings that are determined by the weights and by the command.
_FIXED = ("model", "model_name", "view", "data", "start", "answer", "before")


def refuse(task: Task, where: str | Path) -> None:
    """Raise ConfigError if fine-tuning cannot be used for a task."""
    if task.type not in ("classification", "regression"):
        raise ConfigError(where, "type", task.type, "classification or regression", "Probe the frozen features instead")
    if task.split.kind not in ("holdout", "listed"):
        hint = "The best epoch is selected on validation subjects, which the other splits do not have"
        raise ConfigError(where, "split.kind", task.split.kind, "holdout or listed", hint)


def settings_for(
    ours: SlimBrain, data: str, out: Path, sessions: int, assignments: Sequence[str], number: int
) -> FinetuneSettings:
    """Settings of one fine-tuning. Precision, chunk_tokens and ZeRO settings are those of the pretraining.

    Parameters
    ----------
    ours : SlimBrain
    data : str
        The dataset.
    out : Path
        Folder of the run.
    sessions : int
        Number of training sessions; by default a checkpoint is written after each epoch.
    assignments : sequence of str
        `key=value` overrides.
    number : int
        Number of the fine-tuning of the task; added to `run.seed`.

    Raises
    ------
    ConfigError
        If a setting is wrong, or is determined by the weights.
    """
    ours.require_dropped("a fine-tuning")
    of_ours = ours.settings.model_dump(mode="json")
    given = {name: of_ours[name] for name in ("model", "model_name", "view", "windows", *_KEPT)}
    given["windows"] |= {"minimum": 1}  # as in probes, sessions of any length
    given |= {"data": data, "optimizer": _DEFAULTS["optimizer"]}
    given["run"] = {name: of_ours["run"][name] for name in _OF_RUN} | _DEFAULTS["run"] | {"out": str(out)}
    tree = override(given, renamed_assignments(assignments))
    for name in _FIXED:
        if tree.get(name) != given.get(name):
            raise ConfigError("command line", name, tree[name], "no override", "The weights or --data determine it")
    if tree["windows"]["k"] != given["windows"]["k"] or tree["run"]["out"] != str(out):
        name = "run.out" if tree["run"]["out"] != str(out) else "windows.k"
        raise ConfigError("command line", name, "a value", "no override", "The weights or --out determine it")
    tree["run"]["seed"] = tree["run"].get("seed", 0) + number
    if "checkpoint_every" not in tree["run"]:
        settings = check(FinetuneSettings, tree, "command line").run
        per_step = settings.batch * settings.accumulate * settings.processes
        tree["run"]["checkpoint_every"] = max(1, round(sessions / per_step))
    return check(FinetuneSettings, tree, "command line")


@dataclass(frozen=True, kw_only=True)
class FinetuneRun:
    """A finished fine-tuning: its folder and seed, and the step and loss of its best validation."""

    run: str
    seed: int
    best_step: int
    val_loss: float


@dataclass
class Finetuned:
    """Fine-tuning as a method of `slim.evaluation.probe`.

    Parameters
    ----------
    name : `FINETUNED` or `SCRATCH`
        `SCRATCH` starts with random weights.
    ours : SlimBrain
        The model with the pretrained encoder.
    task : Task
    dataset, cases
        Of the task.
    splits : list of list of Split
        Of the task, one list for each repeat. Each repeat is a separate fine-tuning.
    folder : Path
        The runs are in `folder/seed-K`.
    assignments : sequence of str
        `key=value` overrides of the settings of the runs.
    train : callable
        Runs a fine-tuning to its end.
    device : torch.device or str
        Device for the prediction of test subjects.

    Attributes
    ----------
    runs : list of FinetuneRun
    """

    name: str
    ours: SlimBrain
    task: Task
    dataset: Dataset
    cases: Cases
    splits: list[list[Split]]
    folder: Path
    assignments: Sequence[str]
    train: Callable[[FinetuneSettings], None]
    device: torch.device | str = "cpu"
    runs: list[FinetuneRun] = field(default_factory=list)

    @property
    def seen(self) -> Seen | None:
        """The subjects seen in pretraining; None if this is not known."""
        return Seen(frozenset()) if self.name == SCRATCH else self.ours.seen

    def settings(self, number: int) -> FinetuneSettings:
        """The settings of one fine-tuning, without the hash of its initial weights."""
        (split,) = self.splits[number]
        out = self.folder / f"seed-{number}"
        data, sessions = str(self.dataset.folder), len(split.train)
        settings = settings_for(self.ours, data, out, sessions, self.assignments, number)
        if self.name == SCRATCH:
            for key, given in (("freeze", settings.freeze), ("lora", settings.lora)):
                if given:
                    hint = "Leave it out, or --from-scratch"
                    raise ConfigError("command line", key, "a value", "none with --from-scratch: all is trained", hint)
        return settings

    def prepare(self, number: int) -> FinetuneSettings:
        """Make the run folder of a fine-tuning with its input files; returns its complete settings."""
        (split,) = self.splits[number]
        return self._prepare(number, probe.make_fold(self.task, self.cases, split, repeat=number)[0])

    def _prepare(self, number: int, fold: Fold) -> FinetuneSettings:
        settings = self.settings(number)
        out = Path(settings.run.out)
        settings = settings.model_copy(update={"answer": self._answer(fold)})
        with lock.holding(out):
            out.mkdir(parents=True, exist_ok=True)
            self._answers(fold).write(out)
            if self.seen is not None:
                self.seen.write(out)
            if self.name == SCRATCH:
                return settings
            begun_with = start.write(out, self.ours.encoder.state_dict())
        before = export.history(self.ours)
        if settings.lora is not None:  # for exports of the updates, which fit no other weights
            before = {**before, "checksum": self.ours.checksum}
        return settings.model_copy(update={"start": begun_with, "before": before})

    def trained(self) -> int:
        """Number of parameters that each fine-tuning trains."""
        outputs = max(1, len(self.cases.classes))
        return count_trained(self.settings(0), self.ours.geometry, self.dataset.grid.voxels, outputs)

    def predict(self, fold: Fold) -> np.ndarray:
        """Predict probabilities (m, K) or values (m, 1) of the test sessions; trains first, if it is not finished."""
        answers, out = self._answers(fold), Path(self.settings(fold.repeat).run.out)
        with lock.holding(out):
            settings = self._prepare(fold.repeat, fold)
            self.train(settings)
        model, step, loss = self._best(out, settings, answers)
        sessions = [self.cases.sessions[row] for row in fold.test]
        geometry = self.ours.geometry
        device = torch.device(self.device)
        guess_mK = predict(model.to(device), answers.classes, self.dataset, sessions, geometry, settings, device)
        self.runs.append(FinetuneRun(run=str(out), seed=settings.run.seed, best_step=step, val_loss=loss))
        return guess_mK

    def _answer(self, fold: Fold) -> AnswerSettings:
        name, label = self.task.name, self.task.label or ""
        if fold.classes:
            return AnswerSettings(task=name, label=label, classes=tuple(self.cases.classes))
        mean, sd = probe.scale_of(self.cases, fold.train)
        return AnswerSettings(task=name, label=label, mean=mean, sd=sd)

    def _answers(self, fold: Fold) -> Answers:
        assert fold.val_n is not None
        sides: list[dict[str, tuple[int, float]]] = [{}, {}]
        for row, answer, is_val in zip(fold.train, fold.answer_n, fold.val_n, strict=True):
            sides[int(is_val)][self.cases.sessions[row].key] = int(self.cases.subject_N[row]), float(answer)
        return Answers(fold.classes, *sides)

    def _best(self, out: Path, settings: FinetuneSettings, answers: Answers) -> tuple[torch.nn.Module, int, float]:
        """The model with the best validation loss, its step, and the loss."""
        found = checkpoint.newest(out / CHECKPOINTS)
        assert found is not None  # the training has ended
        tensors = checkpoint.read_weights(found / checkpoint.WEIGHTS, BEST)
        loss, step = tensors.pop("of").tolist()
        if not tensors:
            hint = "Lower optimizer.lr, and give another --out"
            raise CheckpointError(found, "val_loss", "no finite loss in any epoch", "a finite validation loss", hint)
        tensors = {name: value for name, value in tensors.items() if not name.startswith(lora.PREFIX)}
        model = make_model(settings, self.ours.geometry, self.dataset.grid.voxels, answers.outputs)
        model.load_state_dict(tensors)
        return model.eval().requires_grad_(False), int(step), loss


def check_report(folder: Path, task: Task, cases: Cases, splits: list[list[Split]]) -> None:
    """Raise ConfigError if a report used another version of the task, so that scores could not be compared."""
    report = Report.read(folder / PROBE)
    differing = report.differs(task.name, probe.task_facts(task, cases, splits))
    if differing is not None:
        name, asked, before = differing
        hint = "Probe again, so that all methods use the same task, or give another --out"
        raise ConfigError(folder / PROBE, f"{task.name}.{name}", asked, f"{before}, as in the report", hint)
