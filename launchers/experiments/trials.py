"""The pretrainings that are compared: each is trained, resumed if it was stopped, and scored.

OUT/cohorts/   pretrained-KIND, probed-KIND: synthetic people, two sessions each
OUT/shards/    the same, converted; a dataset for each ranker
OUT/runs/      VARIANT-KIND-seedK: run folders of pretrain
OUT/draws/     scores on the probed people, with their bootstrap draws
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from launchers import environment
from launchers.experiments.kinds import FINE, Kind, real_noise
from shards.core.errors import Stopped
from shards.core.presets import find
from shards.core.progress import progress
from slim.checkpoints.run_folder import CHECKPOINTS, METRICS

CONFIG = "experiments"
KEPT, ALL = "windows.keep=24", "windows.keep=all"
GRID = ("grid.mm=8", "grid.shape=[24,24,24]")
FRAMES, PRETRAINED, PROBED = 240, 120, 200  # frames of a session; people, two sessions each
PARTS = ("main", "fine", "people", "windows", "checkpoint", "noise", "steps", "view", "ranker", "targets", "pooling")
# Random weights: the initial ones, and a control with small position embeddings, see `comparison`.
RANDOM = {"random": "random weights", "control": "random weights, small positions"}
BASELINES = {
    "connectome": "functional connectivity",
    "connectome_kept": "functional connectivity, kept windows",
    "parcel_means": "parcel means of the window",
    "mean_image": "mean image",
    "parcels": "functional connectivity, 400 parcels",
    "voxels": "voxel components, kept windows",
}
# What is asked of the first seed: `cov` with its 3 components, and the others.
POOLINGS: Mapping[str, Mapping[str, object]] = {
    **{name: {"pooling": name} for name in ("mean", "mean+sd", "location", "attentive", "cov", "patterns")},
    "cov, 8 components": {"pooling": "cov", "components": 8},
}
POOLED = "poolings"  # in the names of the draws of all poolings
WINDOWS = (8, 16, 32, None)  # most salient windows of a run that are encoded; None for all


@dataclass(frozen=True)
class Variant:
    """A row of a table: the settings that are changed, the ranker of the windows, and the people of pretraining."""

    name: str
    words: str
    changes: tuple[str, ...] = ()
    ranker: str = "mutual"
    people: int = PRETRAINED

    @property
    def cohort(self) -> str:
        """The name of the pretraining cohort."""
        return "pretrained" if self.people == PRETRAINED else f"pretrained{self.people}"


OBJECTIVES = (
    Variant("default", "JEPA + SIG + MAE (default)"),
    Variant("jepa", "JEPA", ("objective=jepa",)),
    Variant("mae", "MAE", ("objective=mae",)),
    Variant("mae-sig", "MAE + SIG", ("objective=mae", "loss.sig=1")),
)
LENGTHS = (Variant("short", "a third of them", ("run.steps=1500",)),)
VIEWS = (
    Variant("view-global", "view: global", ("view=global",)),
    Variant("view-both", "view: both", ("view=both",)),
)
RANKERS = (Variant("ranker-random", "windows at random", ranker="random"),)
PEOPLE = tuple(Variant(f"people-{count}", f"{count} people", people=count) for count in (15, 30, 60, 240))
PEOPLE_SEEDS = 2
EVERY = 500  # optimizer steps between the checkpoints of the first run that are kept and scored
TARGETS = tuple(
    Variant(f"targets-{kind}", f"{kind.replace('_', '-')} alone", (f"mask.kinds=[{kind}]",))
    for kind in ("cross_location", "cross_time", "double_cross")
)


@dataclass(frozen=True)
class Trial:
    """One pretraining: a variant, a seed, a kind of cohort."""

    variant: Variant
    seed: int
    kind: Kind

    @property
    def name(self) -> str:
        return f"{self.variant.name}-{self.kind.name}-seed{self.seed}"


class Experiments:
    """The requested trials, and the folder of their results.

    Parameters
    ----------
    out : Path
    seeds : int
        Training seeds of the main table; the small tables take the first one.
    jobs : int
        Processes at a time.
    changes : list of str
        key=value for every pretraining.
    """

    def __init__(self, out: Path, seeds: int, jobs: int, changes: list[str]):
        self.out, self.seeds, self.jobs, self.changes = out, seeds, jobs, changes

    def dataset(self, who: str, kind: Kind, ranker: str = "mutual") -> Path:
        return self.out / "shards" / f"{who}-{kind.name}-{ranker}"

    def cohort(self, who: str, kind: Kind) -> Path:
        return self.out / "cohorts" / f"{who}-{kind.name}"

    def trials(self, parts: list[str], kinds: list[Kind]) -> list[Trial]:
        """All pretrainings, those of the main table first; `kinds` are those of the main table."""
        default = OBJECTIVES[0]
        found = [Trial(v, seed, kind) for kind in kinds for seed in range(self.seeds) for v in OBJECTIVES]
        found = found if "main" in parts else []
        if "fine" in parts:
            found += [Trial(default, seed, FINE) for seed in range(self.seeds)]
        if "people" in parts:
            seeds = range(min(self.seeds, PEOPLE_SEEDS))
            found += [Trial(variant, seed, FINE) for variant in (default, *PEOPLE) for seed in seeds]
        if "windows" in parts:
            found.append(Trial(default, 0, FINE))
        if "noise" in parts and (real := real_noise()) is not None:
            found += [Trial(variant, 0, real) for variant in OBJECTIVES]
        small = {
            "steps": LENGTHS,
            "view": VIEWS,
            "ranker": RANKERS,
            "targets": TARGETS,
            "checkpoint": (default,),
        }
        found += [Trial(variant, 0, kinds[0]) for part in parts for variant in small.get(part, ())]
        return list(dict.fromkeys(found))

    def prepare(self, trials: list[Trial], parts: list[str], kinds: list[Kind]) -> None:
        """Make cohorts and datasets. The temporal extractor is trained on the pretraining cohort."""
        everyone = {trial.kind for trial in trials}
        made = {(kind, "pretrained", PRETRAINED, 1) for kind in everyone}
        made |= {(trial.kind, trial.variant.cohort, trial.variant.people, 1) for trial in trials}
        made |= {(kind, "probed", PROBED, 2) for kind in everyone}
        with ThreadPoolExecutor(self.jobs) as pool:
            list(pool.map(lambda facts: self.make_cohort(*facts), sorted(made, key=str)))
        for kind in sorted(everyone, key=str):
            self.convert("pretrained", kind, "mutual", KEPT, "split.shares=[1,0,0]")
            extractor = ("--extractor", self.dataset("pretrained", kind) / "extractor")
            for trial in trials:
                who, ranker = trial.variant.cohort, trial.variant.ranker
                if trial.kind == kind:
                    words = extractor if ranker == "mutual" else ()
                    self.convert(who, kind, ranker, KEPT, "split.shares=[1,0,0]", *words)
                    self.convert("probed", kind, ranker, KEPT, "split.shares=[0,0,1]", *words)
            if kind.parcels is not None:
                image = f"parcels.image={self.cohort('probed', kind) / kind.parcels}"
                self.convert("parcels", kind, "variance", KEPT, "split.shares=[0,0,1]", image, cohort="probed")
        if "windows" in parts:
            extractor = ("--extractor", self.dataset("pretrained", FINE) / "extractor")
            for ranker, words in (("mutual", extractor), ("random", ())):
                self.convert("whole", FINE, ranker, ALL, "split.shares=[0,0,1]", *words, cohort="probed")

    def make_cohort(self, kind: Kind, who: str, people: int, seed: int) -> None:
        folder = self.cohort(who, kind)
        if not (folder / "cohort.yaml").exists():  # written last
            size = ("--subjects", people, "--frames", FRAMES, "--seed", seed, *kind.options)
            call("make-cohort", "--out", folder, *size)

    def convert(self, who: str, kind: Kind, ranker: str, *words: Any, cohort: str = "") -> None:
        """Convert a cohort, by default that of the same name."""
        shards = self.dataset(who, kind, ranker)
        if not (shards / "manifest.json").exists():  # written last
            source = self.cohort(cohort or who, kind) / "cohort.yaml"
            call("make-shards", source, "--out", shards, "--ranker", ranker, "--workers", self.jobs, *words, *GRID)

    def pretrain(self, trial: Trial) -> None:
        """Train one run, or resume it. Its last checkpoint is kept; of the first default, also one in 500 steps."""
        data = self.dataset(trial.variant.cohort, trial.kind, trial.variant.ranker)
        words = [f"data={data}", f"run.out={self.out / 'runs' / trial.name}", f"run.seed={trial.seed}"]
        if trial.variant == OBJECTIVES[0] and trial.seed == 0:
            words.append(f"run.keep_every={EVERY}")
        call("pretrain", CONFIG, *words, *trial.variant.changes, *self.changes)

    def checkpoints(self, trial: Trial) -> list[Path]:
        """The kept checkpoints of a run, the first one first."""
        return sorted((self.out / "runs" / trial.name / CHECKPOINTS).glob("step-*"))

    def evaluate_checkpoints(self, trial: Trial) -> None:
        """Score the kept checkpoints of a run on the probed people."""
        for checkpoint in self.checkpoints(trial):
            if not (path := self.draws_path(trial, of=checkpoint.name)).exists():
                self._score(checkpoint, trial, path)

    def draws_path(self, trial: Trial, random: str = "", of: str = "") -> Path:
        """The draws of a run, or of random weights (see `evaluate`); `of` is a checkpoint or `POOLED`."""
        return self.out / "draws" / f"{'-'.join(filter(None, (of, random, trial.name)))}.npz"

    def evaluate(self, trial: Trial, random: str = "") -> None:
        """Score the encoder of a run, or random weights, on the probed people, also with the poolings of the kind.

        `random` is "random", its initial weights, or "control", these with small random position embeddings.
        """
        if not (path := self.draws_path(trial, random)).exists():
            poolings = {name: POOLINGS[name] for name in trial.kind.poolings}
            self._score(self.out / "runs" / trial.name, trial, path, random, poolings)

    def evaluate_poolings(self, trial: Trial, random: str = "") -> None:
        """Score the encoder of a run, or random weights, under all poolings; see `evaluate`."""
        if not (path := self.draws_path(trial, random, POOLED)).exists():
            self._score(self.out / "runs" / trial.name, trial, path, random, POOLINGS)

    def _score(
        self,
        weights: Path,
        trial: Trial,
        path: Path,
        random: str = "",
        poolings: Mapping[str, Mapping[str, object]] | None = None,
    ) -> None:
        import torch

        from launchers.experiments import comparison
        from shards.format.reader import Dataset
        from slim.inference.slim_brain import SlimBrain

        torch.set_num_threads(1)
        model = SlimBrain.from_pretrained(weights)
        if random:
            model = SlimBrain.random(model, trial.seed)
            if random == "control":
                comparison.shrink_positions(model, trial.seed)
        dataset = Dataset(self.dataset("probed", trial.kind, trial.variant.ranker))
        questions = self.questions(dataset, trial.kind)
        features = comparison.encode(model, dataset)
        comparison.save(path, comparison.encoder_draws(features, questions, poolings))

    def windows_path(self, kind: Kind, ranker: str, count: int | None) -> Path:
        return self.out / "draws" / f"windows-{kind.name}-{ranker}-{count or 'all'}.npz"

    def evaluate_windows(self, trial: Trial) -> None:
        """Score a run on the most salient windows of each session, on as many in random order, and on all of them.

        Beside them, as `connectome/TASK`, functional connectivity of the same frames.
        """
        import torch

        from launchers.experiments import comparison
        from shards.format.reader import Dataset
        from slim.inference.slim_brain import SlimBrain

        torch.set_num_threads(1)
        model = SlimBrain.from_pretrained(self.out / "runs" / trial.name)
        for ranker in ("mutual", "random"):
            whole = Dataset(self.dataset("whole", trial.kind, ranker))
            for count in WINDOWS:
                path = self.windows_path(trial.kind, ranker, count)
                if path.exists() or (count is None and ranker == "random"):  # all windows are the same windows
                    continue
                dataset = whole if count is None else whole.most_salient(count)
                questions = [q for q in self.questions(dataset, trial.kind) if q.task.type != "state"]
                draws = comparison.encoder_draws(comparison.encode(model, dataset), questions)
                # connectivity of all windows is that of the whole run, but for a rest shorter than a window
                name = "connectome" if count is None else "connectome_kept"
                theirs = comparison.baseline_draws(dataset, questions, (name,))[name]
                draws |= {f"connectome/{task}": draw_D for task, draw_D in theirs.items()}
                comparison.save(path, draws)

    def questions(self, dataset: Any, kind: Kind) -> list[Any]:
        from launchers.experiments import comparison
        from slim.evaluation.task import load_task

        tasks = {}
        for name in kind.tasks:
            where = find("task", f"synthetic_{name}", "TASKS")
            task = load_task(where)
            changes: dict[str, object] = {"repeats": 1}
            if name == "state":  # windows are many: fewer are enough to train on, and more are tested
                changes |= {"kind": "holdout", "shares": (0.3, 0.05, 0.65)}
            tasks[str(where)] = task.model_copy(update={"split": task.split.model_copy(update=changes)})
        return comparison.ask(tasks, dataset, self.cohort("probed", kind))

    def baselines(self, kind: Kind) -> None:
        """Score the baselines without an encoder."""
        from launchers.experiments import comparison, voxels
        from shards.format.reader import Dataset

        dataset = Dataset(self.dataset("probed", kind))
        usual = ("connectome", "connectome_kept", "parcel_means", "mean_image")
        if not all(self.baseline_path(kind, name).exists() for name in usual):
            for name, draws in comparison.baseline_draws(dataset, self.questions(dataset, kind)).items():
                comparison.save(self.baseline_path(kind, name), draws)
        if not (path := self.baseline_path(kind, "voxels")).exists():
            comparison.save(path, voxels.draws(dataset, self.questions(dataset, kind)))
        if kind.parcels is not None and not (path := self.baseline_path(kind, "parcels")).exists():
            parcels = Dataset(self.dataset("parcels", kind, "variance"))
            questions = [q for q in self.questions(parcels, kind) if q.task.type != "state"]
            comparison.save(path, comparison.baseline_draws(parcels, questions, ("connectome",))["connectome"])

    def baseline_path(self, kind: Kind, name: str) -> Path:
        return self.out / "draws" / f"{name}-{kind.name}.npz"

    def rank(self, trial: Trial) -> float:
        """Effective rank of the context's features over the last tenth of the logged steps."""
        lines = (self.out / "runs" / trial.name / METRICS).read_text(encoding="utf-8").splitlines()
        values = [json.loads(line)["context_rank"] for line in lines]
        return float(np.mean(values[-max(1, len(values) // 10) :]))


def call(*words: Any) -> None:
    """Run a command of this project; if it fails, its output is part of the error."""
    done = subprocess.run(
        [*environment.SLIM_BRAIN, *map(str, words)],
        env={**environment.with_packages(os.environ), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines()
        raise Stopped(
            f"{' '.join(map(str, words[:2]))} ended with status {done.returncode}: {said[-1] if said else ''}"
        )


def answer(work: Experiments, trial: Trial) -> None:
    """Pretrain and probe one trial; for the default, also its random weights, and those on other windows."""
    work.pretrain(trial)
    work.evaluate(trial)
    if trial.variant.name in ("default", "ranker-random"):
        work.evaluate(trial, "random")
    if trial.variant.name == "default":
        work.evaluate(trial, "control")
    if trial.variant.name == "default" and trial.seed == 0:
        for random in ("", *RANDOM):
            work.evaluate_poolings(trial, random)


def answer_all(work: Experiments, trials: list[Trial]) -> None:
    """Run all trials, several at the same time."""
    with (
        progress("experiments", len(trials), "runs") as advance,
        ProcessPoolExecutor(work.jobs, get_context("spawn")) as pool,
    ):
        answers = {pool.submit(answer, work, trial): trial.name for trial in trials}
        for done in as_completed(answers):
            done.result()
            advance(1, answers[done])
