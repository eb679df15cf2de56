"""Distributions of the quality measures of sessions, and outlying sessions.

A value is outlying if it is more than three robust standard deviations from the median of its cohort, on the bad side.
The robust standard deviation is 1.4826 times the median absolute deviation (MAD), which is the standard deviation of a
normal distribution [1]_. A value that was not recorded is neither outlying nor good.

Legend: S sessions.

References
----------
.. [1] Leys et al. (2013), "Detecting outliers: do not use standard deviation around the mean, use absolute deviation
   around the median", Journal of Experimental Social Psychology 49(4).
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from shards.format.session_record import SessionRecord
from shards.reporting import html

_OUTLYING = 30  # largest number of outlying sessions listed
_DOTS = 150  # largest number of sessions drawn as dots per cohort
_LANES = 12  # largest number of cohorts drawn separately
_FEW = 8  # a cohort with fewer sessions is judged by the median and spread of the whole dataset
_FAR = 3.0  # robust standard deviations from the median
_NORMAL = 1.4826  # standard deviation of a normal distribution, in units of its MAD


@dataclass(frozen=True)
class Far:
    """An outlying value: whether it is too low or too high, and a description with the median of the others."""

    side: Literal["low", "high"]
    words: str


Outlying = dict[str, dict[str, Far]]  # key: field: value


@dataclass(frozen=True)
class Measure:
    """A quality measure: field of the session, titles, unit, bad side, and the smallest spread that is not rounding.

    `short` is the title of a column. With `own`, cohorts may differ in it: also a small cohort is judged by its own
    values, and a session that differs is listed, but not counted as bad.
    """

    field: str
    title: str
    short: str
    unit: str
    bad: str
    least: float
    own: bool = False

    def of(self, session: SessionRecord) -> float:
        """The value in `unit`; NaN if the session has none."""
        value = getattr(session, self.field)
        if value is None:
            return np.nan
        if self.field == "dvars_outliers":
            return 100 * value / max(session.frames - 1, 1)
        return 100 * value if self.unit == "%" else value

    def words(self, value: float) -> str:
        """A value with its unit."""
        return f"{value:.4g} {self.unit}".rstrip()


MEASURES = (
    Measure("source_tr", "TR of the scan", "TR", "s", "both", 0.0025, own=True),
    Measure("tsnr", "Temporal signal-to-noise ratio", "tSNR", "", "low", 1),
    Measure("dvars_outliers", "Frames with an outlying DVARS", "DVARS", "%", "high", 1),
    Measure("mean_fd_mm", "Mean framewise displacement", "FD", "mm", "high", 0.025),
    Measure("brain_ml", "Brain volume", "Volume", "ml", "both", 25),
    Measure("mask_outside_grid", "Brain mask outside the grid", "Outside grid", "%", "high", 0.25),
    Measure("mni_dice", "Dice with the MNI152 brain", "MNI Dice", "", "low", 0.015),
)


RULE = (
    f"A value is outlying if it is more than {_FAR:g} robust standard deviations ({_NORMAL} times the median absolute "
    "deviation) from the median of its cohort, on the bad side. If a cohort has fewer than "
    f"{_FEW} such values, those of all sessions are taken, except for the TR. Smaller differences never count: "
    + ", ".join(f"{measure.short} {measure.words(_FAR * measure.least)}" for measure in MEASURES)
    + ". What was not recorded is missing: it was not checked."
)


def find_outlying(sessions: Sequence[SessionRecord]) -> Outlying:
    """Find sessions of outlying quality, worst first; sessions with only an outlying TR come last.

    The rule is `RULE`.

    Returns
    -------
    dict of str to dict of str to Far
        For the key of each session, its outlying fields.
    """
    members: dict[str, list[int]] = defaultdict(list)
    for number, session in enumerate(sessions):
        members[session.cohort].append(number)
    worst = np.zeros(len(sessions))
    found: dict[int, dict[str, Far]] = defaultdict(dict)
    for measure in MEASURES:
        value_S = np.array([measure.of(session) for session in sessions])
        for part in members.values():
            judged_by = value_S[part][np.isfinite(value_S[part])]
            if len(judged_by) < _FEW and not measure.own:
                judged_by = value_S[np.isfinite(value_S)]
            if not len(judged_by):
                continue
            middle = float(np.median(judged_by))
            spread = max(_NORMAL * float(np.median(np.abs(judged_by - middle))), measure.least)
            for number in part:
                away = (value_S[number] - middle) / spread
                beyond = {"low": -away, "high": away, "both": abs(away)}[measure.bad]
                if beyond > _FAR:
                    worst[number] = max(worst[number], 0.0 if measure.own else beyond)
                    words = f"{measure.title} {measure.words(value_S[number])} (median {measure.words(middle)})"
                    found[number][measure.field] = Far("low" if away < 0 else "high", words)
    order = sorted(found, key=lambda number: (-worst[number], sessions[number].key))
    return {sessions[number].key: found[number] for number in order}


def in_words(found: Mapping[str, Far]) -> str:
    """The outlying values of a session."""
    return "; ".join(one.words for one in found.values())


def describe(sessions: Sequence[SessionRecord], outlying: Outlying) -> list[html.Part]:
    """Parts of the page: a table of the quality measures, a figure of their distributions, outlying sessions."""
    present = [measure for measure in MEASURES if any(np.isfinite(measure.of(s)) for s in sessions)]
    rows = []
    for measure in present:
        value_S = np.array([measure.of(session) for session in sessions])
        value_S = value_S[np.isfinite(value_S)]
        mark_5 = np.percentile(value_S, [0, 5, 50, 95, 100], method="nearest")  # values that a session has
        marks = [measure.words(mark) for mark in mark_5]
        rows.append([measure.title, len(value_S), *marks])
    parts: list[html.Part] = [
        html.Table(["Measure", "Sessions", "Lowest", "5 %", "Median", "95 %", "Highest"], rows, numbers=True),
        html.Picture.of(
            _draw(sessions, present, outlying),
            "Quality measures of the sessions, one row per cohort",
            "TR is that of the scan, before resampling. Each row is a cohort and each dot a session (a selection in "
            "large cohorts). The line marks the median, the box the middle half. Orange diamonds are outlying "
            "sessions. Cohorts may differ (scanner, smoothing, voxel size); check sessions that are far from their own "
            "cohort.",
        ),
    ]
    if not outlying:
        return [*parts, html.Text("No session is outlying, by the rule below.")]
    where = {session.key: session.split for session in sessions}
    named = [[key, where[key], in_words(outlying[key])] for key in list(outlying)[:_OUTLYING]]
    parts.append(
        html.Text(
            f"{html.count(len(outlying), 'outlying session')}, worst first"
            + (f" (the first {_OUTLYING})." if len(outlying) > _OUTLYING else ".")
            + " They are in the dataset; decide whether to leave them out of the cohort. The rule is below."
        )
    )
    return [*parts, html.Table(["Session", "Split", "What is outlying"], named)]


def _draw(sessions: Sequence[SessionRecord], measures: Sequence[Measure], outlying: Outlying) -> Figure:
    sizes = Counter(session.cohort for session in sessions)
    names = [name for name, _ in sorted(sizes.items(), key=lambda item: (-item[1], item[0]))[:_LANES]]
    rest = "other cohorts"
    lanes = [*sorted(names), *([rest] if len(sizes) > len(names) else [])]
    figure = Figure(figsize=(11, 0.75 + 0.42 * len(lanes) + 0.9 * (len(lanes) == 1)), layout="constrained")
    row = figure.subplots(1, len(measures), sharey=True, squeeze=False)[0]
    for axes, measure in zip(row, measures, strict=True):
        for lane, name in enumerate(lanes):
            mine = [s for s in sessions if s.cohort == name or (name == rest and s.cohort not in names)]
            mine = [s for s in mine if np.isfinite(measure.of(s))]
            if not mine:
                continue
            mine.sort(key=lambda s: (measure.of(s), s.key))
            value_S = np.array([measure.of(s) for s in mine])
            far_S = np.array([measure.field in outlying.get(s.key, ()) for s in mine])
            low, middle, high = np.percentile(value_S, [25, 50, 75])
            axes.fill_betweenx([lane - 0.34, lane + 0.34], low, high, color=html.PALE, alpha=0.6, lw=0)
            axes.plot([middle, middle], [lane - 0.34, lane + 0.34], color=html.INK, lw=1.5, zorder=5)
            shown = np.flatnonzero(~far_S)
            shown = shown[np.linspace(0, len(shown) - 1, min(len(shown), _DOTS)).astype(int)]
            # steps of the golden ratio spread the dots evenly without random numbers
            height_S = lane + 0.6 * ((np.arange(len(value_S)) * 0.618034) % 1 - 0.5)
            axes.plot(value_S[shown], height_S[shown], ".", ms=7, color=html.SKY, alpha=0.9, mew=0, zorder=4)
            axes.plot(value_S[far_S], height_S[far_S], "D", ms=4.5, color=html.ORANGE, mec=html.INK, mew=0.5, zorder=6)
        lowest, highest = axes.dataLim.intervalx
        # do not magnify tiny differences
        margin = max(0.06 * (highest - lowest), measure.least / 4, 0.02 * highest)
        axes.set_xlim(max(lowest - margin, -margin / 4), highest + margin)  # no measure is negative
        axes.set_title(_wrapped(measure.title), fontsize=9)
        axes.set_xlabel(measure.unit or "ratio")
        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.grid(axis="x")
        axes.set_yticks(range(len(lanes)), [name if len(name) < 24 else name[:22] + "…" for name in lanes])
        axes.set_ylim(len(lanes) - 0.5, -0.5)
        axes.tick_params(axis="y", length=0)
    return figure


def _wrapped(words: str) -> str:
    """Break a text into two lines at the space nearest to the middle."""
    spaces = [place for place, letter in enumerate(words) if letter == " "]
    if len(words) < 20 or not spaces:
        return words
    place = min(spaces, key=lambda space: abs(space - len(words) / 2))
    return f"{words[:place]}\n{words[place + 1 :]}"
