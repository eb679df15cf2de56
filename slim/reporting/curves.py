"""The curves of a run, drawn, each with words on what a normal one looks like.

Long runs are thinned: at most 600 places along the axis, with the range of what shares a place.
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
from slim.training.metrics import MetricsLine

_POINTS = 600  # places along the axis of a drawn curve
_KINDS = {
    "cross_time": ("cross-time: same places, other windows", html.BLUE),
    "cross_location": ("cross-location: other places, same windows", html.ORANGE),
    "double_cross": ("double-cross: both other", html.GREEN),
}


def values(lines: Sequence[MetricsLine], name: str) -> np.ndarray:
    """A field of all lines; NaN where it was not logged."""
    return np.array([np.nan if line.get(name) is None else line[name] for line in lines], float)


def thin(step: np.ndarray, value: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """A curve in at most 600 places: step, lowest, mean and highest value of each.

    Values that are not finite are left out. Lowest and highest keep a single spike visible among 10^5 steps.
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
    """Running mean over a thirtieth of the curve, shorter at its ends."""
    window = np.ones(max(1, len(value) // 30) | 1)
    half = len(window) // 2
    padded = np.convolve(value, window)[half : half + len(value)]
    return padded / np.convolve(np.ones(len(value)), window)[half : half + len(value)]


@dataclass(frozen=True)
class Curve:
    """One line of a plot: field of metrics.jsonl, name, colour, factor to the plotted unit."""

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
    """Title and picture of panels (y label, curves, log) over one step axis; nothing where no field was logged.

    With `zero` the line of no gain is drawn and all below it shaded; `limit` draws and names another line.
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
        axes.set_ylim(min(low - 0.12 * span, -0.15 * span), max(high, 0.05 * span))  # room for the words
        axes.axhspan(axes.get_ylim()[0], 0, color=html.RED, alpha=0.09, lw=0)
        axes.axhline(0, color=html.RED, lw=1, ls="--")
        _say(axes, axes.get_ylim()[0], "no better than the mean of the place")
    if limit is not None:
        axes.axhline(limit[0], color=html.RED, lw=1, ls="--")
        _say(axes, *limit)
    return [html.Heading(title), html.Picture.of(figure, f"{title}, by optimizer step", caption)]


def _say(axes: Axes, height: float, words: str) -> None:
    """Words just above a height, at the right end."""
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
    """All curves of a run, in sections; what was not logged is left out.

    Parameters
    ----------
    settings : PretrainSettings or FinetuneSettings
    lines : sequence of dict
        Of metrics.jsonl.
    guess : float, optional
        Of a fine-tuning: validation loss of whoever guesses.
    """
    if not lines:
        return []
    if isinstance(settings, FinetuneSettings):
        learning = _answering(lines, guess)
    else:
        learning = _predicting(settings, lines)
    how = "Line: running mean. Pale: the logged values themselves, or their range where many share a place."
    named = (("Learning", learning), ("Health", _health(settings, lines)), ("Speed and memory", _machine(lines)))
    found: list[html.Section] = []
    for title, pictures in named:
        shown = [picture for picture in pictures if picture]
        if shown:
            found.append(html.Section(title, [*([] if found else [html.Text(how)]), html.Pairs(shown)]))
    return found


def _answering(lines: Sequence[MetricsLine], guess: float | None) -> list[list[html.Part]]:
    """Fine-tuning."""
    training = [Curve("loss", "training, by step", html.BLUE)]
    validation = [Curve("val_loss", "validation, by epoch", html.ORANGE, noisy=False)]
    return [
        _figure(
            "Loss of the training people",
            lines,
            [("loss", training, False)],
            "Cross-entropy with all classes counted alike, or squared error of standardised values. It can be brought "
            "to nothing by learning people by heart: judge by the validation.",
        ),
        _figure(
            "Loss of the validation people",
            lines,
            [("loss", validation, False)],
            "Once an epoch, from all windows. Normal: it falls, then flattens or rises again; the weights of its "
            "lowest point are kept and tested.",
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
            "Gain = 1 - loss / loss of a predictor that knows only the mean target of each place and "
            "slot. Zero is that predictor: no better than knowing what a place looks like on average. "
            "Normal: at or below 0 at first, then rising. A collapse: it stays at 0 or below to the "
            "end.",
            zero=True,
        ),
        _figure(
            "Loss and its terms",
            lines,
            [("loss", terms, True)],
            f"Total = {weights}; the terms are drawn without their weights. MAE falls from about 1. The "
            "JEPA term may rise while the gain grows: its targets are made by the model itself and "
            "become harder as they grow richer. A JEPA loss that drops to almost nothing with a gain "
            "near 0 is a collapse, not a success.",
        ),
        _figure(
            "Gain for each kind of target",
            lines,
            [("gain", _kinds("gain"), False)],
            "Normal: cross-location carries the dynamics and comes to lead; cross-time and "
            "double-cross, of windows minutes apart, carry the person (anatomy, "
            "connectivity).",
            zero=True,
        ),
        _figure(
            "Loss for each kind of target",
            lines,
            [("loss", _kinds("loss"), False)],
            "The JEPA loss by kind of target. Compare kinds by their gain, not by this: targets of "
            "unlike kinds differ in variance.",
        ),
    ]


def _health(settings: PretrainSettings | FinetuneSettings, lines: Sequence[MetricsLine]) -> list[list[html.Part]]:
    clip = settings.optimizer.clip
    return [
        _figure(
            "Spread of the targets",
            lines,
            [("SD", [Curve("target_std")], False)],
            "Standard deviation of the targets around the mean of their place, mean over channels. "
            "Normal: it settles well above 0. Towards 0: every sample gives the same "
            "features.",
            limit=(0, "all samples alike"),
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
            "How many directions the features use: targets around the mean of their place, and the context's "
            "features as they are. Normal: it falls from its start, then settles. Below 5 is a dimensional "
            "collapse: raise loss.sig or loss.mae.",
            limit=(5, "dimensional collapse below 5"),
        ),
        _figure(
            "Do samples differ?",
            lines,
            [("cosine", [Curve("sample_cosine")], False), ("SD, context", [Curve("context_std")], False)],
            "Cosine between the features of different samples at the same place and slot: high from the start, "
            "because anatomy is shared. Normal: it falls, or stays below 1. At 1 all samples give the same "
            "features. Lower panel: the standard deviation of the context's features over their cells.",
        ),
        _figure(
            "Norm of the gradient",
            lines,
            [("gradient norm", [Curve("grad_norm")], True)],
            f"Before clipping at {clip:g}. Normal: falls early, then flat with rare spikes. Spikes that "
            "become frequent announce a divergence: lower optimizer.lr.",
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
            "As planned, per optimizer step: the learning rate warms up, then falls along half a cosine "
            "and ends on the last step; weight decay and EMA momentum go from their first to their last "
            "value.",
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
            "All processes together. Normal: flat. Data wait is the share of a step spent waiting for "
            "samples; where it stays high, raise run.workers.",
        ),
        _figure(
            "Memory and tokens",
            lines,
            [
                ("peak memory, GiB", [Curve("peak_memory_bytes", factor=2**-30, noisy=False)], False),
                ("tokens kept", [Curve("tokens_kept")], False),
            ],
            "Memory: of the GPU's allocator, or of the process where there is none; it only rises, and "
            "should soon stop rising. Tokens kept: brain tokens of the context, per sample; it varies a "
            "little with the brains.",
        ),
    ]
