"""The results of the experiments as Markdown tables; trials without results are left out."""

from __future__ import annotations

from typing import Any

import numpy as np

from launchers.experiments.trials import BASELINES, OBJECTIVES, POOLINGS, RANDOM, TASKS, Experiments, Trial, Variant
from slim.evaluation import metrics
from slim.evaluation.results import Draws, Estimate

_TYPES = ("classification", "regression", "fingerprint", "state")
HEAD = [*(f"{task}, {metrics.words(metrics.HEADLINE[kind])}" for task, kind in zip(TASKS, _TYPES, strict=True)), "rank"]


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


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


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
        self, variant: str, snr: float, random: str = "", seeds: int | None = None
    ) -> list[dict[str, np.ndarray]]:
        """Draws of each finished seed of a variant, or of random weights (see `Experiments.evaluate`)."""
        from launchers.experiments import comparison

        paths = [self.work.draws_path(t) for t in self.trials if (t.variant.name, t.snr) == (variant, snr)][:seeds]
        if random:
            paths = [path.with_name(f"{random}-{path.name}") for path in paths]
        return [comparison.load(path) for path in paths if path.exists()]

    def scores(
        self, variant: str, snr: float, random: str = "", seeds: int | None = None
    ) -> dict[str, Estimate] | None:
        """Mean scores of a variant over its seeds, by task."""
        from launchers.experiments import comparison

        found = self.draws(variant, snr, random, seeds)
        return comparison.summarise(found) if found else None

    def baseline_draws(self, name: str, snr: float) -> list[Draws]:
        """Mean scores of a baseline, if it has been scored."""
        from launchers.experiments import comparison

        path = self.work.baseline_path(snr, name)
        return [comparison.load(path)] if path.exists() else []

    def baseline(self, name: str, snr: float) -> dict[str, Estimate] | None:
        from launchers.experiments import comparison

        found = self.baseline_draws(name, snr)
        return comparison.summarise(found) if found else None

    def ranks(self, variant: str, snr: float) -> str:
        found = [self.work.rank(t) for t in self.trials if (t.variant.name, t.snr) == (variant, snr)]
        return f"{np.mean(found):.0f}" if found else ""

    def row(self, words: str, scores: dict[str, Estimate] | None, rank: str, snr: float) -> list[list[str]]:
        """A row of a table; no row without scores."""
        if scores is None:
            return []
        self.results.setdefault(f"snr {snr:g}", {})[words] = {
            name: one.tree() | {"seeds": list(one.seeds or ())} for name, one in scores.items()
        }
        names = [f"synthetic_{task}" for task in TASKS]
        return [[words, *[cell(scores[name]) if name in scores else "" for name in names], rank]]

    def seeded(self, words: str, variant: str, random: str, snr: float) -> list[list[str]]:
        """A row of a variant; it gives the number of seeds if some are missing."""
        scores, wanted = self.scores(variant, snr, random), self.work.seeds
        if scores is None:
            return []
        (row,) = self.row(words, scores, "" if random else self.ranks(variant, snr), snr)
        count = len(next(iter(scores.values())).seeds or ())
        return [row if count == wanted else [f"{words} ({count} of {wanted} seeds)", *row[1:]]]

    def main(self, snr: float) -> str:
        rows = []
        for variant in OBJECTIVES:
            rows += self.seeded(variant.words, variant.name, "", snr)
        for random, words in RANDOM.items():
            rows += self.seeded(words, "default", random, snr)
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
        """On which tasks the default is better than other variants: by separate intervals, and by differences."""
        from launchers.experiments import comparison

        ours = self.draws("default", snr)
        rivals = {words: self.draws("default", snr, random) for random, words in RANDOM.items()}
        rivals |= {variant.words: self.draws(variant.name, snr) for variant in OBJECTIVES[1:]}
        rivals |= {words: self.baseline_draws(name, snr) for name, words in BASELINES.items()}
        rows, scores = [], self.scores("default", snr)
        for words, theirs in rivals.items():
            if not ours or not theirs or scores is None:
                continue
            other, less = comparison.summarise(theirs), comparison.differences(ours, theirs)
            better = [t for t in TASKS if (n := f"synthetic_{t}") in other and scores[n].better_than(other[n])]
            self.results[f"snr {snr:g}"][f"better than {words}, intervals apart"] = better
            self.results[f"snr {snr:g}"][f"default less {words}"] = {name: one.tree() for name, one in less.items()}
            names = [f"synthetic_{task}" for task in TASKS]
            rows.append([words, *[gap(less[name]) if name in less else "" for name in names], ", ".join(better)])
        if not rows:
            return ""
        head = [f"the default less, SNR {snr:g}", *HEAD[:-1], "intervals apart"]
        return f"{table(head, rows)}\nThe default's effective rank at SNR {snr:g} is {self.ranks('default', snr)}.\n"
