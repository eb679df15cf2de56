"""The pretrainings that are compared: each is trained, resumed if it was stopped, and scored.

OUT/cohorts/   pretrained-snrS, probed-snrS: synthetic people, two sessions each
OUT/shards/    the same, converted; a dataset for each ranker
OUT/runs/      VARIANT-snrS-seedK: run folders of pretrain
OUT/draws/     scores on the probed people, with their bootstrap draws
"""

from __future__ import annotations

import json
import os
import subprocess
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from launchers import environment
from shards.core.errors import Stopped
from shards.core.presets import find
from shards.core.progress import progress
from slim.checkpoints.run_folder import METRICS

CONFIG = "experiments"
TASKS = ("group", "score", "fingerprint", "state")
GRID = ("grid.mm=8", "grid.shape=[24,24,24]", "windows.keep=24")
FRAMES, PRETRAINED, PROBED = 240, 120, 200  # frames of a session; people, two sessions each
PARTS = ("main", "steps", "view", "ranker", "targets", "pooling")
# Random weights: the initial ones, and a control with small position embeddings, see `comparison`.
RANDOM = {"random": "random weights", "control": "random weights, small positions"}
BASELINES = {
    "connectome": "functional connectivity",
    "connectome_kept": "functional connectivity, kept windows",
    "parcel_means": "parcel means of the window",
    "mean_image": "mean image",
}
POOLINGS = ("mean", "mean+sd", "location", "attentive", "cov")


@dataclass(frozen=True)
class Variant:
    """A row of a table: the settings that are changed, and the ranker of the windows."""

    name: str
    words: str
    changes: tuple[str, ...] = ()
    ranker: str = "mutual"


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
TARGETS = tuple(
    Variant(f"targets-{kind}", f"{kind.replace('_', '-')} alone", (f"mask.kinds=[{kind}]",))
    for kind in ("cross_location", "cross_time", "double_cross")
)


@dataclass(frozen=True)
class Trial:
    """One pretraining: a variant, a seed, a signal-to-noise ratio."""

    variant: Variant
    seed: int
    snr: float

    @property
    def name(self) -> str:
        return f"{self.variant.name}-snr{self.snr:g}-seed{self.seed}"


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

    def dataset(self, who: str, snr: float, ranker: str = "mutual") -> Path:
        return self.out / "shards" / f"{who}-snr{snr:g}-{ranker}"

    def cohort(self, who: str, snr: float) -> Path:
        return self.out / "cohorts" / f"{who}-snr{snr:g}"

    def trials(self, parts: list[str], snrs: list[float]) -> list[Trial]:
        """All pretrainings, those of the main table first."""
        found = [Trial(v, seed, snr) for snr in snrs for seed in range(self.seeds) for v in OBJECTIVES]
        small = {"steps": LENGTHS, "view": VIEWS, "ranker": RANKERS, "targets": TARGETS}
        wanted = [variant for part in parts for variant in small.get(part, ())]
        return ([] if "main" not in parts else found) + [Trial(v, 0, snrs[0]) for v in wanted]

    def prepare(self, trials: list[Trial], snrs: list[float]) -> None:
        """Make cohorts and datasets. The temporal extractor is trained on the pretraining cohort."""
        made = [(snr, *people) for snr in snrs for people in (("pretrained", PRETRAINED, 1), ("probed", PROBED, 2))]
        with ThreadPoolExecutor(self.jobs) as pool:
            list(pool.map(lambda facts: self.make_cohort(*facts), made))
        for snr in snrs:
            rankers = {"mutual"} | {trial.variant.ranker for trial in trials if trial.snr == snr}
            for ranker in sorted(rankers):
                self.convert("pretrained", snr, ranker, "split.shares=[1,0,0]")
                words = ["--extractor", self.dataset("pretrained", snr) / "extractor"] if ranker == "mutual" else []
                self.convert("probed", snr, ranker, "split.shares=[0,0,1]", *words)

    def make_cohort(self, snr: float, who: str, people: int, seed: int) -> None:
        folder = self.cohort(who, snr)
        if not (folder / "cohort.yaml").exists():  # written last
            size = ("--subjects", people, "--frames", FRAMES, "--seed", seed, "--snr", snr)
            call("make-cohort", "--out", folder, *size)

    def convert(self, who: str, snr: float, ranker: str, *words: Any) -> None:
        shards = self.dataset(who, snr, ranker)
        if not (shards / "manifest.json").exists():  # written last
            cohort = self.cohort(who, snr) / "cohort.yaml"
            chosen = ("--ranker", ranker, "--workers", self.jobs, *words, *GRID)
            call("make-shards", cohort, "--out", shards, *chosen)

    def pretrain(self, trial: Trial) -> None:
        """Train one run, or resume it. Only its last checkpoint and its log are kept."""
        data = self.dataset("pretrained", trial.snr, trial.variant.ranker)
        words = [f"data={data}", f"run.out={self.out / 'runs' / trial.name}", f"run.seed={trial.seed}"]
        call("pretrain", CONFIG, *words, *trial.variant.changes, *self.changes)

    def draws_path(self, trial: Trial) -> Path:
        return self.out / "draws" / f"{trial.name}.npz"

    def evaluate(self, trial: Trial, random: str = "") -> None:
        """Score the encoder of a run, or random weights, on the probed people.

        `random` is "random", its initial weights, or "control", these with small random position embeddings.
        """
        import torch

        from launchers.experiments import comparison
        from shards.format.reader import Dataset
        from slim.inference.slim_brain import SlimBrain

        torch.set_num_threads(1)
        path = self.draws_path(trial)
        if random:
            path = path.with_name(f"{random}-{path.name}")
        if path.exists():
            return
        model = SlimBrain.from_pretrained(self.out / "runs" / trial.name)
        if random:
            model = SlimBrain.random(model, trial.seed)
            if random == "control":
                comparison.shrink_positions(model, trial.seed)
        dataset = Dataset(self.dataset("probed", trial.snr, trial.variant.ranker))
        questions = self.questions(dataset, trial.snr)
        features = comparison.encode(model, dataset)
        poolings = POOLINGS if trial.variant.name == "default" and trial.seed == 0 else ()
        comparison.save(path, comparison.encoder_draws(features, questions, poolings))

    def questions(self, dataset: Any, snr: float) -> list[Any]:
        from launchers.experiments import comparison
        from slim.evaluation.task import load_task

        tasks = {}
        for name in TASKS:
            where = find("task", f"synthetic_{name}", "TASKS")
            task = load_task(where)
            changes: dict[str, object] = {"repeats": 1}
            if name == "state":  # windows are many: fewer are enough to train on, and more are tested
                changes |= {"kind": "holdout", "shares": (0.3, 0.05, 0.65)}
            tasks[str(where)] = task.model_copy(update={"split": task.split.model_copy(update=changes)})
        return comparison.ask(tasks, dataset, self.cohort("probed", snr))

    def baselines(self, snr: float) -> None:
        """Score the baselines without an encoder."""
        from launchers.experiments import comparison
        from shards.format.reader import Dataset

        if all(self.baseline_path(snr, name).exists() for name in BASELINES):
            return
        dataset = Dataset(self.dataset("probed", snr))
        for name, draws in comparison.baseline_draws(dataset, self.questions(dataset, snr)).items():
            comparison.save(self.baseline_path(snr, name), draws)

    def baseline_path(self, snr: float, name: str) -> Path:
        return self.out / "draws" / f"{name}-snr{snr:g}.npz"

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
