"""The figure of the experiments: scores against the number of people in pretraining."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from shards.core.files import atomically
from slim.evaluation.results import Estimate

_OURS, _THEIRS = "#0072B2", "#D55E00"  # Okabe-Ito


def save_people(
    path: Path,
    people: Mapping[int, Mapping[str, Estimate]],
    theirs: Mapping[str, Estimate] | None,
    words: Mapping[str, str],
) -> None:
    """Draw the score of each task against the people in pretraining, with functional connectivity as a line.

    Parameters
    ----------
    path : Path
        A PNG file. Without scores none is written.
    people : mapping of int to mapping of task to Estimate
    theirs : mapping of task to Estimate, optional
        Functional connectivity of the same windows.
    words : mapping of task to str
        The task and its metric.
    """
    if not people:
        return
    tasks = list(next(iter(people.values())))
    columns = 3
    rows = -(-len(tasks) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(3.6 * columns, 2.8 * rows), squeeze=False, layout="constrained")
    for axis in axes.flat[len(tasks) :]:
        axis.set_visible(False)
    for axis, task in zip(axes.flat, tasks, strict=False):
        counts = [count for count, scores in people.items() if task in scores]
        scores = [people[count][task] for count in counts]
        low, high = zip(*[score.interval or (score.value, score.value) for score in scores], strict=True)
        value = [score.value for score in scores]
        below = [v - bound for v, bound in zip(value, low, strict=True)]
        above = [bound - v for v, bound in zip(value, high, strict=True)]
        axis.errorbar(counts, value, [below, above], color=_OURS, marker="o", capsize=3, label="pretrained encoder")
        if theirs and task in theirs:
            axis.axhline(theirs[task].value, color=_THEIRS, linestyle="--", label="functional connectivity")
            if (interval := theirs[task].interval) is not None:
                axis.axhspan(*interval, color=_THEIRS, alpha=0.15, linewidth=0)
        axis.set_xscale("log")
        axis.set_xticks(counts, [str(count) for count in counts])
        axis.minorticks_off()
        axis.set_title(words[task])
        axis.set_xlabel("people in pretraining")
    axes[0, 0].legend(fontsize=8)
    with atomically(path) as file:
        figure.savefig(file, dpi=150, format="png")
    plt.close(figure)
