"""The results of the experiments as Markdown tables; trials without results are left out."""

from __future__ import annotations

from typing import Any

import numpy as np

from launchers.experiments.kinds import FINE, Kind
from launchers.experiments.trials import (
    BASELINES,
    OBJECTIVES,
    PEOPLE,
    PEOPLE_SEEDS,
    POOLED,
    POOLINGS,
    PRETRAINED,
    RANDOM,
    WINDOWS,
    Experiments,
    Trial,
    Variant,
)
from slim.evaluation import metrics
from slim.evaluation.results import Draws, Estimate

_TYPES = {
    "group": "classification",
    "score": "regression",
    "fingerprint": "fingerprint",
    "state": "state",
    "fine_group": "classification",
    "fine_score": "regression",
}


def head(kind: Kind, without: str = "") -> list[str]:
    """The tasks of a kind of cohort, each with its metric."""
    found = (f"{task}, {metrics.words(metrics.HEADLINE[_TYPES[task]])}" for task in kind.tasks if task != without)
    return [words.replace("_", " ") for words in found]


def title(kind: Kind, pooling: str = "") -> str:
    """The kind of cohort, and the pooling unless it is `cov`."""
    return f"{kind.words}, {pooling}" if pooling else kind.words


def cell(score: Estimate) -> str:
    seeds = [seed for seed in score.seeds or () if seed is not None]
    spread = f" ±{np.std(seeds):.2f}".replace("0.", ".") if len(seeds) > 1 else ""
    low, high = score.interval or (np.nan, np.nan)
    return f"{score.value:.2f} [{low:.2f}, {high:.2f}]".replace("0.", ".") + spread


def gap(score: Estimate) -> str:
    """A difference and its interval, in bold if the interval does not contain 0."""
    low, high = score.interval or (np.nan, np.nan)
    text = f"{score.value:+.3f} [{low:+.3f}, {high:+.3f}]".replace("0.", ".")
    return f"**{text}**" if low > 0 or high < 0 else text


def table(columns: list[str], rows: list[list[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def under(draws: Draws, pooling: str) -> Draws:
    """The draws of the tasks under a pooling, by task; those of the tasks themselves without one."""
    if not pooling:
        return {name: draw_D for name, draw_D in draws.items() if "/" not in name}
    ending = f"/{pooling}"
    return {name.removesuffix(ending): draw_D for name, draw_D in draws.items() if name.endswith(ending)}


class Tables:
    """The results that exist so far.

    Parameters
    ----------
    work : Experiments
    trials : list of Trial
    """

    def __init__(self, work: Experiments, trials: list[Trial]):
        self.work, self.trials = work, [trial for trial in trials if work.draws_path(trial).exists()]
        self.results: dict[str, Any] = {}

    def draws(
        self, variant: str, kind: Kind, random: str = "", seeds: int | None = None, pooling: str = ""
    ) -> list[Draws]:
        """Draws of each finished seed of a variant, or of random weights (see `Experiments.evaluate`)."""
        from launchers.experiments import comparison

        mine = [t for t in self.trials if (t.variant.name, t.kind) == (variant, kind)][:seeds]
        paths = [self.work.draws_path(trial, random) for trial in mine]
        found = [under(comparison.load(path), pooling) for path in paths if path.exists()]
        return [draws for draws in found if draws]

    def scores(
        self, variant: str, kind: Kind, random: str = "", seeds: int | None = None, pooling: str = ""
    ) -> dict[str, Estimate] | None:
        """Mean scores of a variant over its seeds, by task."""
        from launchers.experiments import comparison

        found = self.draws(variant, kind, random, seeds, pooling)
        return comparison.summarise(found) if found else None

    def baseline_draws(self, name: str, kind: Kind) -> list[Draws]:
        """Mean scores of a baseline, if it has been scored."""
        from launchers.experiments import comparison

        path = self.work.baseline_path(kind, name)
        return [comparison.load(path)] if path.exists() else []

    def baseline(self, name: str, kind: Kind) -> dict[str, Estimate] | None:
        from launchers.experiments import comparison

        found = self.baseline_draws(name, kind)
        return comparison.summarise(found) if found else None

    def ranks(self, variant: str, kind: Kind) -> str:
        found = [self.work.rank(t) for t in self.trials if (t.variant.name, t.kind) == (variant, kind)]
        return f"{np.mean(found):.0f}" if found else ""

    def row(
        self, words: str, scores: dict[str, Estimate] | None, rank: str, kind: Kind, pooling: str = ""
    ) -> list[list[str]]:
        """A row of a table; no row without scores."""
        if scores is None:
            return []
        self.results.setdefault(title(kind, pooling), {})[words] = {
            name: one.tree() | {"seeds": list(one.seeds or ())} for name, one in scores.items()
        }
        names = [f"synthetic_{task}" for task in kind.tasks]
        return [[words, *[cell(scores[name]) if name in scores else "" for name in names], rank]]

    def seeded(self, words: str, variant: str, random: str, kind: Kind, pooling: str = "") -> list[list[str]]:
        """A row of a variant; it gives the number of seeds if some are missing."""
        scores, wanted = self.scores(variant, kind, random, pooling=pooling), self.work.seeds
        if scores is None:
            return []
        (row,) = self.row(words, scores, "" if random else self.ranks(variant, kind), kind, pooling)
        count = len(next(iter(scores.values())).seeds or ())
        return [row if count == wanted else [f"{words} ({count} of {wanted} seeds)", *row[1:]]]

    def main(self, kind: Kind, pooling: str = "") -> str:
        """All variants beside random weights and baselines, under a pooling; by default under `cov`."""
        rows = []
        for variant in OBJECTIVES:
            rows += self.seeded(variant.words, variant.name, "", kind, pooling)
        for random, words in RANDOM.items():
            rows += self.seeded(words, "default", random, kind, pooling)
        if not rows:
            return ""
        for name, words in BASELINES.items():
            rows += self.row(words, self.baseline(name, kind), "", kind, pooling)
        return table([title(kind, pooling), *head(kind), "rank"], rows)

    def small(self, about: str, variants: tuple[Variant, ...], default: str, kind: Kind) -> str:
        rows = self.row(default, self.scores("default", kind, seeds=1), self.ranks("default", kind), kind)
        for variant in variants:
            rows += self.row(variant.words, self.scores(variant.name, kind), self.ranks(variant.name, kind), kind)
        if about == "windows":
            scores = self.scores("ranker-random", kind, "random")
            rows += self.row("windows at random, random weights", scores, "", kind)
        return table([f"{about} (first seed, {kind.words})", *head(kind), "rank"], rows)

    def poolings(self, kind: Kind) -> str:
        from launchers.experiments import comparison

        first = next((t for t in self.trials if (t.variant.name, t.seed, t.kind) == ("default", 0, kind)), None)
        rows = []
        for random, words in {"": "default", **RANDOM}.items():
            if first is None or not (path := self.work.draws_path(first, random, POOLED)).exists():
                continue
            scores = comparison.summarise([comparison.load(path)])
            for pooling in POOLINGS:
                ending = "" if pooling == "cov" else f"/{pooling}"
                names = [f"synthetic_{task}{ending}" for task in kind.tasks if task != "state"]
                if any(name in scores for name in names):
                    cells = [cell(scores[name]) if name in scores else "" for name in names]
                    rows.append([f"{words}, `{pooling}`", *cells])
        return table([f"pooling (first seed, {kind.words})", *head(kind, without="state")], rows) if rows else ""

    def verdict(self, kind: Kind, pooling: str = "") -> str:
        """On which tasks the default is better than other variants: by separate intervals, and by differences."""
        from launchers.experiments import comparison

        ours = self.draws("default", kind, pooling=pooling)
        rivals = {words: self.draws("default", kind, random, pooling=pooling) for random, words in RANDOM.items()}
        rivals |= {variant.words: self.draws(variant.name, kind, pooling=pooling) for variant in OBJECTIVES[1:]}
        rivals |= {words: self.baseline_draws(name, kind) for name, words in BASELINES.items()}
        rows, scores = [], self.scores("default", kind, pooling=pooling)
        for words, theirs in rivals.items():
            if not ours or not theirs or scores is None:
                continue
            other, less = comparison.summarise(theirs), comparison.differences(ours, theirs)
            names = [f"synthetic_{task}" for task in kind.tasks]
            both = {
                name: task for name, task in zip(names, kind.tasks, strict=True) if name in scores and name in other
            }
            better = [task for name, task in both.items() if scores[name].better_than(other[name])]
            results = self.results[title(kind, pooling)]
            results[f"better than {words}, intervals apart"] = better
            results[f"default less {words}"] = {name: one.tree() for name, one in less.items()}
            rows.append(
                [
                    words,
                    *[gap(less[name]) if name in less else "" for name in names],
                    ", ".join(better).replace("_", " "),
                ]
            )
        if not rows:
            return ""
        columns = [f"the default less, {title(kind, pooling)}", *head(kind), "intervals apart"]
        return (
            f"{table(columns, rows)}\nThe default's effective rank at {kind.words} is {self.ranks('default', kind)}.\n"
        )

    def people(self) -> dict[int, dict[str, Estimate]]:
        """Scores on the kind with fine traits by the number of people in pretraining."""
        of = {variant.people: variant.name for variant in PEOPLE} | {PRETRAINED: "default"}
        found = {count: self.scores(name, FINE, seeds=PEOPLE_SEEDS) for count, name in of.items()}
        return {count: scores for count, scores in sorted(found.items()) if scores is not None}

    def people_table(self) -> str:
        rows = []
        for count, scores in self.people().items():
            seeds = len(next(iter(scores.values())).seeds or ())
            words = f"{count} people ({seeds} of {PEOPLE_SEEDS} seeds)" if seeds < PEOPLE_SEEDS else f"{count} people"
            rows += self.row(words, scores, "", FINE)
        for name in ("connectome_kept", "voxels"):
            rows += self.row(f"{BASELINES[name]} (no pretraining)", self.baseline(name, FINE), "", FINE)
        return table([f"people in pretraining ({FINE.words})", *head(FINE), "rank"], rows)

    def windows_table(self, kind: Kind) -> str:
        """Scores with a part of the windows of each run encoded, beside functional connectivity of the same frames."""
        from launchers.experiments import comparison

        rows = []
        for ranker, order in (("mutual", "ranked"), ("random", "in random order")):
            for count in WINDOWS:
                path = self.work.windows_path(kind, ranker, count)
                if not path.exists():
                    continue
                scores = comparison.summarise([comparison.load(path)])
                words = "all windows" if count is None else f"{count} windows, {order}"
                rows += self.row(f"{words}: default", scores, "", kind)
                theirs = {name.split("/")[1]: one for name, one in scores.items() if name.startswith("connectome/")}
                rows += self.row(f"{words}: functional connectivity", theirs, "", kind)
        return table([f"windows encoded (first seed, {kind.words})", *head(kind), "rank"], rows)

    def checkpoints_table(self, trial: Trial) -> str:
        """Scores of the checkpoints of a run on the probed people."""
        from launchers.experiments import comparison

        rows = []
        for checkpoint in self.work.checkpoints(trial):
            if (path := self.work.draws_path(trial, of=checkpoint.name)).exists():
                step = int(checkpoint.name.removeprefix("step-"))
                rows += self.row(f"after {step} steps", comparison.summarise([comparison.load(path)]), "", trial.kind)
        return table([f"checkpoint (first seed, {trial.kind.words})", *head(trial.kind), "rank"], rows)
