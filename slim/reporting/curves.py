"""Figures of the curves of a run, with captions that describe a normal curve.

Curves of long runs are reduced to at most 600 points along the axis, with the range of the values at each point.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from shards.reporting import html
from slim.config import FinetuneSettings, PretrainSettings
from slim.evaluation import metrics
from slim.evaluation.validation import ValidationScore, best_of
from slim.training.metrics import MetricsLine

_POINTS = 600  # largest number of points of a drawn curve
_KINDS = {
    "cross_time": ("cross-time: same places, other windows", html.BLUE),
    "cross_location": ("cross-location: other places, same windows", html.ORANGE),
    "double_cross": ("double-cross: both other", html.GREEN),
}


def values(lines: Sequence[MetricsLine], name: str) -> np.ndarray:
    """The values of a field in all lines; NaN if it was not logged."""
    return np.array([np.nan if line.get(name) is None else line[name] for line in lines], float)


def thin(step: np.ndarray, value: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Reduce a curve to at most 600 points: step, and lowest, mean and highest value of each.

    Non-finite values are left out. The lowest and highest values keep a single spike visible among 10^5 steps.
    """
    finite = np.isfinite(value)
    step, value = step[finite], value[finite]
    if not len(step):
        return step, value, value, value
    first = np.unique(np.linspace(0, len(step), min(len(step), _POINTS) + 1).astype(int)[:-1])
    count = np.diff(np.append(first, len(step)))
    return (
        np.add.reduceat(step, first) / count,
        np.minimum.reduceat(value, first),
        np.add.reduceat(value, first) / count,
        np.maximum.reduceat(value, first),
    )


def smoothed(value: np.ndarray) -> np.ndarray:
    """Running mean over a thirtieth of the curve, with a shorter window at its ends."""
    window = np.ones(max(1, len(value) // 30) | 1)
    half = len(window) // 2
    padded = np.convolve(value, window)[half : half + len(value)]
    return padded / np.convolve(np.ones(len(value)), window)[half : half + len(value)]


@dataclass(frozen=True)
class Curve:
    """A line of a plot: field of metrics.jsonl, name, colour, factor to the plotted unit."""

    field: str
    name: str = ""
    colour: str = html.BLUE
    factor: float = 1.0
    noisy: bool = True


def _plot(axes: Axes, lines: Sequence[MetricsLine], curves: Sequence[Curve], label: str, log: bool = False) -> None:
    step = values(lines, "step")
    drawn, lowest = 0, math.inf
    for curve in curves:
        at, low, mean, high = thin(step, values(lines, curve.field) * curve.factor)
        if len(at):
            axes.fill_between(at, low, high, color=curve.colour, alpha=0.3, lw=0.8)
            line = smoothed(mean) if curve.noisy else mean
            axes.plot(at, line, color=curve.colour, lw=1.8, label=curve.name, marker="o" if len(at) == 1 else "")
            drawn, lowest = drawn + 1, min(lowest, low.min())
    if log and lowest > 0 and drawn:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("")
    if drawn > 1:
        short = sum(len(curve.name) for curve in curves) < 40
        axes.legend(loc="lower left", bbox_to_anchor=(-0.02, 1.0), borderaxespad=0.2, ncols=len(curves) if short else 1)
    axes.set_ylabel(label)
    axes.grid(axis="y")


def _figure(
    title: str,
    lines: Sequence[MetricsLine],
    panels: Sequence[tuple[str, Sequence[Curve], bool]],
    caption: str,
    zero: bool = False,
    limit: tuple[float, str] | None = None,
) -> list[html.Part]:
    """Title and picture of panels (y label, curves, log) over one step axis; empty if no field was logged.

    With `zero`, the line of no gain is drawn, and the area below it is shaded. `limit` adds a line with a name.
    """
    panels = [panel for panel in panels if any(np.isfinite(values(lines, curve.field)).any() for curve in panel[1])]
    if not panels:
        return []
    figure = Figure(figsize=(5.4, 3.1 if len(panels) == 1 else 0.5 + 1.3 * len(panels)), layout="constrained")
    grid = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    for axes, (label, curves, log) in zip(grid, panels, strict=True):
        _plot(axes, lines, curves, label, log)
    grid[-1].set_xlabel("optimizer step")
    axes = grid[0]
    if zero:
        low, high = axes.get_ylim()
        span = max(high, 0.0) - min(low, 0.0)
        axes.set_ylim(min(low - 0.12 * span, -0.15 * span), max(high, 0.05 * span))  # room for the text
        axes.axhspan(axes.get_ylim()[0], 0, color=html.RED, alpha=0.09, lw=0)
        axes.axhline(0, color=html.RED, lw=1, ls="--")
        _say(axes, axes.get_ylim()[0], "no better than the mean of the place")
    if limit is not None:
        axes.axhline(limit[0], color=html.RED, lw=1, ls="--")
        _say(axes, *limit)
    return [html.Heading(title), html.Picture.of(figure, f"{title}, by optimizer step", caption)]


def _say(axes: Axes, height: float, words: str) -> None:
    """Write a text just above a height, at the right end."""
    axes.annotate(
        words,
        (1, height),
        (-3, 3),
        xycoords=axes.get_yaxis_transform(),
        textcoords="offset points",
        ha="right",
        va="bottom",
        fontsize=8,
        color="#8a3d00",
    )


def _kinds(prefix: str) -> list[Curve]:
    return [Curve(f"{prefix}_{kind}", *drawn) for kind, drawn in _KINDS.items()]


def sections(
    settings: PretrainSettings | FinetuneSettings, lines: Sequence[MetricsLine], guess: float | None = None
) -> list[html.Section]:
    """All logged curves of a run, in sections.

    Parameters
    ----------
    settings : PretrainSettings or FinetuneSettings
    lines : sequence of dict
        Lines of metrics.jsonl.
    guess : float, optional
        For a fine-tuning, the validation loss of guessing.
    """
    if not lines:
        return []
    if isinstance(settings, FinetuneSettings):
        learning = _answering(lines, guess)
    else:
        learning = _predicting(settings, lines)
    how = "Line: running mean. Pale: the logged values, or their range in long runs."
    named = (("Learning", learning), ("Health", _health(settings, lines)), ("Speed and memory", _machine(lines)))
    found: list[html.Section] = []
    for title, pictures in named:
        shown = [picture for picture in pictures if picture]
        if shown:
            found.append(html.Section(title, [*([] if found else [html.Text(how)]), html.Pairs(shown)]))
    return found


def validation(scores: Sequence[ValidationScore]) -> list[html.Section]:
    """The scores of the probe during training, with their intervals."""
    shown = [score for score in scores if score.value is not None]
    if not shown:
        return []
    best = best_of(shown)
    assert best is not None
    figure = Figure(figsize=(5.4, 3.1), layout="constrained")
    axes = figure.subplots()
    step = [score.step for score in shown]
    ends = np.array([(score.low, score.high) for score in shown], float)
    axes.fill_between(step, ends[:, 0], ends[:, 1], color=html.BLUE, alpha=0.2, lw=0)
    value = np.array([score.value for score in shown], float)
    axes.plot(step, value, color=html.BLUE, lw=1.8, marker="o", ms=4)
    axes.plot(best.step, value[shown.index(best)], color=html.ORANGE, marker="o", ms=8, ls="")
    _say(axes, axes.get_ylim()[0], f"best: {best.line()}")
    metric = metrics.words(best.metric)
    axes.set_ylabel(metric)
    axes.set_xlabel("optimizer step")
    axes.grid(axis="y")
    caption = (
        f"{metric} of the task {best.task}, fitted on training subjects and scored on {best.subjects} validation "
        "subjects. Band: 95 % interval over subjects. The checkpoint of the best score is kept as checkpoints/best. "
        "With few subjects the best of many scores is too good: compare methods on test subjects (slim-brain probe)."
    )
    title = f"Probe of {best.task} during training"
    picture = html.Picture.of(figure, f"{title}, by optimizer step", caption)
    return [html.Section("Validation", [html.Heading(title), picture])]


def _answering(lines: Sequence[MetricsLine], guess: float | None) -> list[list[html.Part]]:
    """Fine-tuning."""
    training = [Curve("loss", "training, by step", html.BLUE)]
    validation = [Curve("val_loss", "validation, by epoch", html.ORANGE, noisy=False)]
    return [
        _figure(
            "Loss of the training subjects",
            lines,
            [("loss", training, False)],
            "Cross-entropy with equal weight for all classes, or squared error of standardised values. It can fall to "
            "0 by memorising the training subjects: judge the run by the validation loss.",
        ),
        _figure(
            "Loss of the validation subjects",
            lines,
            [("loss", validation, False)],
            "Computed once per epoch from all windows. Normal: it falls, then flattens or rises again. The weights at "
            "its lowest point are kept and tested.",
            limit=None if guess is None else (guess, "guessing"),
        ),
    ]


def _predicting(settings: PretrainSettings, lines: Sequence[MetricsLine]) -> list[list[html.Part]]:
    """Pretraining."""
    terms = [
        Curve("loss", "total", html.INK),
        Curve("loss_jepa", "JEPA", html.BLUE),
        Curve("loss_mae", "MAE", html.ORANGE),
        Curve("loss_sig", "SIG", html.GREEN),
    ]
    weights = " + ".join(
        f"{weight:g} {name}"
        for weight, name in zip(settings.loss_weights, ("JEPA", "SIG", "MAE"), strict=True)
        if weight
    )
    return [
        _figure(
            "Gain over the mean of each place",
            lines,
            [("gain", [Curve("gain")], False)],
            "Gain = 1 - loss / loss of predicting the mean target of each place and slot. At 0, the "
            "model is no better than this mean. Normal: at or below 0 at first, then rising. "
            "Collapse: it stays at or below 0 to the end.",
            zero=True,
        ),
        _figure(
            "Loss and its terms",
            lines,
            [("loss", terms, True)],
            f"Total = {weights}; the terms are drawn without these coefficients. The MAE term falls from about "
            "1. The JEPA term may rise while the gain rises, because the model computes its own targets "
            "and they become harder to predict. A JEPA term near 0 with a gain near 0 is a collapse, not a "
            "success.",
        ),
        _figure(
            "Gain for each kind of target",
            lines,
            [("gain", _kinds("gain"), False)],
            "Normal: cross-location, which depends on brain dynamics, becomes the highest. Cross-time "
            "and double-cross predict windows minutes apart, and depend on the subject (anatomy, "
            "connectivity).",
            zero=True,
        ),
        _figure(
            "Loss for each kind of target",
            lines,
            [("loss", _kinds("loss"), False)],
            "The JEPA term by kind of target. Compare kinds by their gain, not by their loss, because "
            "the variance of targets differs between kinds.",
        ),
    ]


def _health(settings: PretrainSettings | FinetuneSettings, lines: Sequence[MetricsLine]) -> list[list[html.Part]]:
    clip = settings.optimizer.clip
    return [
        _figure(
            "Spread of the targets",
            lines,
            [("SD", [Curve("target_std")], False)],
            "Standard deviation of the targets around the mean of their place, averaged over channels. "
            "Normal: it becomes stable well above 0. Near 0, all samples give the same features.",
            limit=(0, "all samples equal"),
        ),
        _figure(
            "Effective rank",
            lines,
            [
                (
                    "effective rank",
                    [
                        Curve("target_rank", "targets, around their place", html.BLUE),
                        Curve("context_rank", "context", html.ORANGE),
                    ],
                    False,
                )
            ],
            "Number of directions that the features use: of targets around the mean of their place, and of "
            "context features. Normal: it falls from its initial value, then becomes stable. Below 5 is a "
            "dimensional collapse: raise loss.sig or loss.mae.",
            limit=(5, "dimensional collapse below 5"),
        ),
        _figure(
            "Do samples differ?",
            lines,
            [("cosine", [Curve("sample_cosine")], False), ("SD, context", [Curve("context_std")], False)],
            "Cosine similarity between the features of different samples at the same place and slot. It is high at "
            "the start, because anatomy is similar. Normal: it falls, or stays below 1. At 1, all samples give the "
            "same features. Lower panel: the standard deviation of the context features over cells.",
        ),
        _figure(
            "Norm of the gradient",
            lines,
            [("gradient norm", [Curve("grad_norm")], True)],
            f"Before clipping at {clip:g}. Normal: falls early, then flat with rare spikes. Frequent "
            "spikes are a sign of divergence: lower optimizer.lr.",
            limit=(clip, "clipped above"),
        ),
        _figure(
            "Schedules",
            lines,
            [
                ("learning rate", [Curve("lr", noisy=False)], False),
                ("weight decay", [Curve("wd", noisy=False)], False),
                ("EMA momentum", [Curve("ema", noisy=False)], False),
            ],
            "Schedules by optimizer step: the learning rate rises linearly during the warm-up, then falls along "
            "half a cosine to the last step; weight decay and EMA momentum change from their first to their "
            "last value.",
        ),
    ]


def _machine(lines: Sequence[MetricsLine]) -> list[list[html.Part]]:
    return [
        _figure(
            "Speed",
            lines,
            [
                ("samples / s", [Curve("samples_per_s")], False),
                ("data wait, %", [Curve("data_wait", factor=100)], False),
                ("MFU, %", [Curve("mfu", factor=100)], False),
            ],
            "All processes together. Normal: flat. Data wait is the share of time spent waiting for "
            "samples; if it stays high, raise run.workers.",
        ),
        _figure(
            "Memory and tokens",
            lines,
            [
                ("peak memory, GiB", [Curve("peak_memory_bytes", factor=2**-30, noisy=False)], False),
                ("tokens kept", [Curve("tokens_kept")], False),
            ],
            "Peak memory of the GPU's allocator, or of the process without a GPU; it should soon stop "
            "rising. Tokens kept: brain tokens of the context per sample, which varies slightly with the "
            "size of the brains.",
        ),
    ]
