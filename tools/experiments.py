"""Does pretraining learn? Objectives, views, rankers, targets and poolings on synthetic cohorts with known truth.

    python tools/experiments.py --out runs/experiments [--only PARTS] [--seeds N] [key=value ...]

Makes two cohorts a signal-to-noise ratio (people to pretrain on, and others to probe), converts them, pretrains every
variant with every seed through tools/pretrain.py, probes all of them on the people nobody was trained on, and writes
`tables.md` and `results.json`. What is there is not made again. key=value goes to the pretraining of all variants.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from shards.console import DONE, Parser, progress, run, summary
from shards.errors import ConfigError, Stopped
from shards.layout import dump, write_atomically

ROOT = Path(__file__).parent.parent
CONFIG = ROOT / "configs/experiments.yaml"
TASKS = ("group", "score", "fingerprint", "state")
GRID = ("grid.mm=8", "grid.shape=[24,24,24]", "windows.keep=24")
FRAMES, PRETRAINED, PROBED = 240, 120, 200  # frames of a session; people, two sessions each
PARTS = ("main", "steps", "view", "ranker", "targets", "pooling")
# Random weights: as training begins, and a control whose positions hardly weigh, so that it maps every patch alike.
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
    """A recipe: a row of a table, what is changed for it, and the ranker of the windows it is given."""

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
    """What is asked for, and where it is kept.

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
        """Cohorts and datasets; the temporal extractor is that of the people who are pretrained on."""
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
            call("tools/make_cohort.py", "--out", folder, *size)

    def convert(self, who: str, snr: float, ranker: str, *words: Any) -> None:
        shards = self.dataset(who, snr, ranker)
        if not (shards / "manifest.json").exists():  # written last
            cohort = self.cohort(who, snr) / "cohort.yaml"
            chosen = ("--ranker", ranker, "--workers", self.jobs, *words, *GRID)
            call("tools/make_shards.py", cohort, "--out", shards, *chosen)

    def pretrain(self, trial: Trial) -> None:
        """One run, from where it was stopped; its checkpoint is all that is kept beside its log."""
        data = self.dataset("pretrained", trial.snr, trial.variant.ranker)
        words = [f"data={data}", f"run.out={self.out / 'runs' / trial.name}", f"run.seed={trial.seed}"]
        call("tools/pretrain.py", CONFIG, *words, *trial.variant.changes, *self.changes)

    def draws_path(self, trial: Trial) -> Path:
        return self.out / "draws" / f"{trial.name}.npz"

    def evaluate(self, trial: Trial, random: str = "") -> None:
        """Score the encoder of a run, or random weights, on the probed people.

        `random` is "random", the weights its training began with, or "control": with small random positions.
        """
        import torch

        from shards.reader import Dataset
        from slim import comparison
        from slim.brain import SlimBrain

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
        from slim import comparison
        from slim.task import load_task

        tasks = {}
        for name in TASKS:
            where = ROOT / f"configs/downstream/synthetic_{name}.yaml"
            task = load_task(where)
            changes: dict[str, Any] = {"repeats": 1}
            if name == "state":  # windows are many: fewer are enough to train on, and more are tested
                changes |= {"kind": "holdout", "shares": (0.3, 0.05, 0.65)}
            tasks[str(where)] = task.model_copy(update={"split": task.split.model_copy(update=changes)})
        return comparison.ask(tasks, dataset, 8, self.cohort("probed", snr))

    def baselines(self, snr: float) -> None:
        """Score what needs no encoder."""
        from shards.reader import Dataset
        from slim import comparison

        if all(self.baseline_path(snr, name).exists() for name in BASELINES):
            return
        dataset = Dataset(self.dataset("probed", snr))
        for name, draws in comparison.baseline_draws(dataset, self.questions(dataset, snr)).items():
            comparison.save(self.baseline_path(snr, name), draws)

    def baseline_path(self, snr: float, name: str) -> Path:
        return self.out / "draws" / f"{name}-snr{snr:g}.npz"

    def rank(self, trial: Trial) -> float:
        """Effective rank of the context's features over the last tenth of the logged steps."""
        lines = (self.out / "runs" / trial.name / "metrics.jsonl").read_text().splitlines()
        values = [json.loads(line)["context_rank"] for line in lines]
        return float(np.mean(values[-max(1, len(values) // 10) :]))


def call(*words: Any) -> None:
    """A command of this project, to its end; what it said is told if it failed."""
    done = subprocess.run(
        [sys.executable, *map(str, words)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines()
        raise Stopped(
            f"{' '.join(map(str, words[:2]))} ended with status {done.returncode}: {said[-1] if said else ''}"
        )


def cell(score: dict[str, Any]) -> str:
    spread = f" ±{np.std(score['seeds']):.2f}".replace("0.", ".") if len(score["seeds"]) > 1 else ""
    return f"{score['value']:.2f} [{score['low']:.2f}, {score['high']:.2f}]".replace("0.", ".") + spread


def gap(score: dict[str, Any]) -> str:
    """A difference and its interval, bold where that does not hold 0."""
    text = f"{score['value']:+.3f} [{score['low']:+.3f}, {score['high']:+.3f}]".replace("0.", ".")
    return f"**{text}**" if score["low"] > 0 or score["high"] < 0 else text


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


class Tables:
    """What came out, as far as it is there.

    Parameters
    ----------
    work : Experiments
    trials : list of Trial
    """

    def __init__(self, work: Experiments, trials: list[Trial]):
        self.work, self.trials = work, [trial for trial in trials if work.draws_path(trial).exists()]
        self.results: dict[str, Any] = {}

    def draws(self, variant: str, snr: float, random: str = "", seeds: int | None = None) -> list[dict[str, Any]]:
        """Of each seed of a variant that is there; of random weights in its place, see `evaluate`."""
        from slim import comparison

        paths = [self.work.draws_path(t) for t in self.trials if (t.variant.name, t.snr) == (variant, snr)][:seeds]
        if random:
            paths = [path.with_name(f"{random}-{path.name}") for path in paths]
        return [comparison.load(path) for path in paths if path.exists()]

    def scores(self, variant: str, snr: float, random: str = "", seeds: int | None = None) -> dict[str, Any] | None:
        """Mean scores of a variant over its seeds, by task."""
        from slim import comparison

        found = self.draws(variant, snr, random, seeds)
        return comparison.summarise(found) if found else None

    def baseline_draws(self, name: str, snr: float) -> list[dict[str, Any]]:
        """Of a baseline, if it is there."""
        from slim import comparison

        path = self.work.baseline_path(snr, name)
        return [comparison.load(path)] if path.exists() else []

    def baseline(self, name: str, snr: float) -> dict[str, Any] | None:
        from slim import comparison

        found = self.baseline_draws(name, snr)
        return comparison.summarise(found) if found else None

    def ranks(self, variant: str, snr: float) -> str:
        found = [self.work.rank(t) for t in self.trials if (t.variant.name, t.snr) == (variant, snr)]
        return f"{np.mean(found):.0f}" if found else ""

    def row(self, words: str, scores: dict[str, Any] | None, rank: str, snr: float) -> list[list[str]]:
        """A row of a table; none where nothing is there."""
        if scores is None:
            return []
        self.results.setdefault(f"snr {snr:g}", {})[words] = scores
        names = [f"synthetic_{task}" for task in TASKS]
        return [[words, *[cell(scores[name]) if name in scores else "" for name in names], rank]]

    def main(self, snr: float) -> str:
        rows = []
        for variant in OBJECTIVES:
            rows += self.row(variant.words, self.scores(variant.name, snr), self.ranks(variant.name, snr), snr)
        for random, words in RANDOM.items():
            rows += self.row(words, self.scores("default", snr, random), "", snr)
        for name, words in BASELINES.items():
            rows += self.row(words, self.baseline(name, snr), "", snr)
        return table([f"voxel SNR {snr:g}", *HEAD], rows)

    def small(self, title: str, variants: tuple[Variant, ...], default: str, snr: float) -> str:
        rows = self.row(default, self.scores("default", snr, seeds=1), self.ranks("default", snr), snr)
        for variant in variants:
            rows += self.row(variant.words, self.scores(variant.name, snr), self.ranks(variant.name, snr), snr)
        if title == "windows":
            scores = self.scores("ranker-random", snr, "random")
            rows += self.row("windows at random, random weights", scores, "", snr)
        return table([f"{title} (first seed, SNR {snr:g})", *HEAD], rows)

    def poolings(self, snr: float) -> str:
        rows = []
        for words, random in (("default", ""), ("random weights", "random")):
            scores = self.scores("default", snr, random, seeds=1)
            if scores is None:
                continue
            for pooling in POOLINGS:
                names = [f"synthetic_{task}" + ("" if pooling == "cov" else f"/{pooling}") for task in TASKS[:3]]
                if any(name in scores for name in names):
                    cells = [cell(scores[name]) if name in scores else "" for name in names]
                    rows.append([f"{words}, `{pooling}`", *cells])
        return table([f"pooling (first seed, SNR {snr:g})", *HEAD[:3]], rows)

    def verdict(self, snr: float) -> str:
        """What the default is better than, and on which tasks: by intervals that lie apart, and by differences."""
        from slim import comparison

        ours = self.draws("default", snr)
        rivals = {words: self.draws("default", snr, random) for random, words in RANDOM.items()}
        rivals |= {variant.words: self.draws(variant.name, snr) for variant in OBJECTIVES[1:]}
        rivals |= {words: self.baseline_draws(name, snr) for name, words in BASELINES.items()}
        rows, scores = [], self.scores("default", snr)
        for words, theirs in rivals.items():
            if not ours or not theirs or scores is None:
                continue
            other, less = comparison.summarise(theirs), comparison.differences(ours, theirs)
            better = [t for t in TASKS if (n := f"synthetic_{t}") in other and comparison.apart(scores[n], other[n])]
            self.results[f"snr {snr:g}"][f"better than {words}, intervals apart"] = better
            self.results[f"snr {snr:g}"][f"default less {words}"] = less
            names = [f"synthetic_{task}" for task in TASKS]
            rows.append([words, *[gap(less[name]) if name in less else "" for name in names], ", ".join(better)])
        if not rows:
            return ""
        head = [f"the default less, SNR {snr:g}", *HEAD[:-1], "intervals apart"]
        return f"{table(head, rows)}\nThe default's effective rank at SNR {snr:g} is {self.ranks('default', snr)}.\n"


HEAD = ["group, AUROC", "score, r", "fingerprint, mAP", "state, accuracy", "rank"]


def answer(work: Experiments, trial: Trial) -> None:
    """Pretrain and probe one trial; the default's random weights beside it, and those on other windows."""
    work.pretrain(trial)
    work.evaluate(trial)
    if trial.variant.name in ("default", "ranker-random"):
        work.evaluate(trial, "random")
    if trial.variant.name == "default":
        work.evaluate(trial, "control")


def answer_all(work: Experiments, trials: list[Trial]) -> None:
    """Every trial, some at a time."""
    with (
        progress("experiments", len(trials), "runs") as advance,
        ProcessPoolExecutor(work.jobs, get_context("spawn")) as pool,
    ):
        answers = {pool.submit(answer, work, trial): trial.name for trial in trials}
        for done in as_completed(answers):
            done.result()
            advance(1, answers[done])


def main() -> int:
    parser = Parser(
        __doc__.splitlines()[0], "python tools/experiments.py --out runs/experiments --seeds 1 run.steps=300"
    )
    parser.add_argument("changes", nargs="*", metavar="key=value", help="for every pretraining")
    parser.add_argument("--out", type=Path, default=Path("runs/experiments"), metavar="FOLDER")
    parser.add_argument("--only", default=",".join(PARTS), metavar="PARTS", help=f"some of {','.join(PARTS)}")
    parser.add_argument("--snr", default="0.9,0.3", metavar="A,B", help="voxel signal-to-noise ratios")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="training seeds of the main table")
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="processes at a time, a core each")
    parser.add_argument("--tables", action="store_true", help="only write the tables of what is there")
    args = parser.parse_args()
    parts = args.only.split(",")
    if unknown := set(parts) - set(PARTS):
        raise ConfigError("command line", "--only", min(unknown), f"some of {', '.join(PARTS)}")
    try:
        snrs = [float(value) for value in args.snr.split(",")]
    except ValueError:
        raise ConfigError("command line", "--snr", args.snr, "numbers such as 0.9,0.3") from None
    if min(args.seeds, args.jobs) < 1:
        raise ConfigError("command line", "--seeds, --jobs", min(args.seeds, args.jobs), "1 or more")
    work = Experiments(args.out.resolve(), args.seeds, args.jobs, args.changes)
    trials = work.trials(parts, snrs)
    if not args.tables:
        work.prepare(trials, snrs)
        answer_all(work, trials)
        for snr in snrs:
            work.baselines(snr)
    tables = Tables(work, trials)
    text = [tables.main(snr) + "\n" + tables.verdict(snr) for snr in snrs]
    small = {
        "steps": ("steps", LENGTHS, "all steps (default)"),
        "view": ("view", VIEWS, "view: voxel (default)"),
        "ranker": ("windows", RANKERS, "ranked (default)"),
        "targets": ("targets", TARGETS, "all three kinds (default)"),
    }
    text += [tables.small(*small[part], snrs[0]) for part in parts if part in small]
    text += [tables.poolings(snrs[0])] if "pooling" in parts else []
    write_atomically(work.out / "tables.md", "\n".join(text))
    write_atomically(work.out / "results.json", dump(tables.results) + "\n")
    print("\n".join(text))
    summary(
        {"tables": str(work.out / "tables.md"), "runs": len(tables.trials)}, f"read {work.out / 'tables.md'}", args.json
    )
    return DONE


if __name__ == "__main__":
    run(main)
