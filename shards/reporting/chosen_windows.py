"""Where in the run the chosen windows lie, over all sessions, and during which events.

A ranking should choose by what happens, not by the place in the run. What it would choose if the place did not matter
is found from its own choices: those of a session are moved over the run by every number of windows, round the end.
Neighbouring windows that are chosen together stay together, so the spread is not too small, as it would be for windows
drawn one by one. Sessions are independent, so their expected numbers and variances add up.

Legend: W windows of a session; P places.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.linalg import circulant

from shards.core.progress import progress
from shards.format.reader import Dataset
from shards.format.session_record import SessionRecord
from shards.reporting import html
from shards.reporting.quality_figures import BEST
from shards.reporting.windows_view import Given

_PARTS = 20  # equal parts of the run
_SESSIONS = 2000  # largest number of sessions that are read
_FAR = 3.0  # SDs from the expected number that are pointed out
_NO_STATE = "no state"


@dataclass
class Tally:
    """Chosen windows at a place, summed over sessions.

    Attributes
    ----------
    windows, chosen : int
        All windows at the place, and the chosen ones.
    expected, variance : float
        Of the number of chosen windows, if the place does not matter.
    """

    windows: int = 0
    chosen: int = 0
    expected: float = 0.0
    variance: float = 0.0

    @property
    def sd(self) -> float:
        return float(np.sqrt(self.variance))

    @property
    def distance(self) -> float:
        """Distance of the chosen from the expected number, in SDs; 0 without a spread."""
        return (self.chosen - self.expected) / self.sd if self.variance > 1e-9 else 0.0


def count(chosen_W: np.ndarray, at_WP: np.ndarray, tallies: Sequence[Tally]) -> None:
    """Add a session to the tallies of places.

    Parameters
    ----------
    chosen_W : bool array
        Windows that were chosen, in time order.
    at_WP : bool array
        Which windows lie at each place.
    tallies : sequence of Tally
        One for each place.
    """
    moved_WW = circulant(chosen_W.astype(np.float64))  # a column for each shift
    number_PW = at_WP.astype(np.float64).T @ moved_WW
    for place, tally in enumerate(tallies):
        tally.windows += int(at_WP[:, place].sum())
        tally.chosen += int(chosen_W[at_WP[:, place]].sum())
        tally.expected += float(number_PW[place].mean())
        tally.variance += float(number_PW[place].var())


@dataclass
class Chosen:
    """One kind of choice, for example the most salient windows, with its tallies.

    Attributes
    ----------
    name : str
    sessions : int
        Number of sessions in which some windows were not chosen; others say nothing.
    parts : list of Tally
        For each part of the run.
    first, last, inner : Tally
        For the first and the last window of a session, and those between.
    states : dict of str to Tally
        For each state of the events.
    """

    name: str
    sessions: int
    parts: list[Tally]
    first: Tally
    last: Tally
    inner: Tally
    states: dict[str, Tally]

    @classmethod
    def empty(cls, name: str) -> Chosen:
        return cls(name, 0, [Tally() for _ in range(_PARTS)], Tally(), Tally(), Tally(), defaultdict(Tally))

    def add(self, chosen_W: np.ndarray, state_W: Sequence[str | None] | None) -> None:
        """Add a session with its chosen windows, bool (W,), and the states of its windows, if they are known."""
        windows = len(chosen_W)
        if chosen_W.all():
            return
        self.sessions += 1
        part_W = np.arange(windows) * _PARTS // windows
        count(chosen_W, part_W[:, None] == np.arange(_PARTS), self.parts)
        edge_W = np.arange(windows)
        ends_W3 = np.stack([edge_W == 0, edge_W == windows - 1, (edge_W > 0) & (edge_W < windows - 1)], axis=1)
        count(chosen_W, ends_W3, (self.first, self.last, self.inner))
        if state_W is not None:
            name_W = np.array([_NO_STATE if state is None else state for state in state_W])
            names = np.unique(name_W)
            count(chosen_W, name_W[:, None] == names, [self.states[name] for name in names])


def describe(dataset: Dataset, given: Given) -> list[html.Part]:
    """The section of the page: a figure over the run, tables of its ends and of the events.

    Raises
    ------
    SampleCorrupt
        If a session is damaged.
    """
    sessions = _spread(dataset.sessions)
    best, kept = Chosen.empty(f"the {BEST} most salient"), Chosen.empty("all kept")
    with progress("read the choices", len(sessions), "sessions") as advance:
        for session in sessions:
            window_K = dataset.read(session, ("start",))["start"] // dataset.frames
            state_W = given.states_of(session, dataset.frames)
            for choice, chosen_K in ((best, window_K[:BEST]), (kept, window_K)):
                chosen_W = np.zeros(session.n_windows, bool)
                chosen_W[chosen_K] = True
                choice.add(chosen_W, state_W)
            advance(1, "")
    shown = [choice for choice in (best, kept) if choice.sessions]
    if not shown:
        return [html.Text(f"All windows were chosen: no session has more than {BEST}.")]
    return [*_over_the_run(shown, len(sessions), len(dataset.sessions)), *_over_events(shown)]


def _spread(sessions: Sequence[SessionRecord]) -> list[SessionRecord]:
    """At most so many sessions, chosen by a hash of the key: arbitrary, but the same each time."""
    ordered = sorted(sessions, key=lambda session: hashlib.sha256(session.key.encode()).digest())
    return ordered[:_SESSIONS]


def _over_the_run(shown: Sequence[Chosen], read: int, total: int) -> list[html.Part]:
    figure = Figure(figsize=(11, 2.9 * len(shown)), layout="constrained")
    for axes, choice in zip(figure.subplots(len(shown), 1, squeeze=False)[:, 0], shown, strict=True):
        _draw(axes, choice)
    rows = [
        [f"{choice.name}, {place}", *_cells(tally)]
        for choice in shown
        for place, tally in (("first window", choice.first), ("last window", choice.last), ("between", choice.inner))
    ]
    far = [
        f"{choice.name}: {100 * part // _PARTS} to {100 * (part + 1) // _PARTS} % of the run ({tally.distance:+.1f} SD)"
        for choice in shown
        for part, tally in enumerate(choice.parts)
        if abs(tally.distance) > _FAR
    ]
    said = (
        f"More than {_FAR:g} SD from the expected number: {'; '.join(far)}."
        if far
        else f"No part of the run is more than {_FAR:g} SD from the expected number."
    )
    of = f"{read} of {total} sessions, chosen by a hash of their keys" if read < total else f"{total} sessions"
    intro = (
        f"Does the ranking prefer a place in the run? The windows that it chose, in {of}, beside what is expected if "
        "the place does not matter: the choices of a session, moved over its run by every number of windows. Sessions "
        f"in which all windows were chosen are left out. {said}"
    )
    return [
        html.Text(intro),
        html.Picture.of(
            figure,
            "Share of the windows that were chosen, in each part of the run, with the expected share and its spread",
            "Dots: share of the windows in this part of the run that were chosen. Line and band: expected share, and "
            f"2 SD around it. Orange diamonds: more than {_FAR:g} SD away.",
        ),
        html.Table(["Choice, place", *_HEAD], rows, numbers=True),
    ]


def _over_events(shown: Sequence[Chosen]) -> list[html.Part]:
    rows = [
        [f"{choice.name}, {state}", *_cells(tally)]
        for choice in shown
        for state, tally in sorted(choice.states.items())
    ]
    if not rows:
        words = "No events were given: slim-brain report DATASET --states TASK.yaml compares the choices with them."
        return [html.Text(words)]
    intro = (
        "Does the ranking prefer an event? A window has the state that the task given with --states assigns to it. The "
        "expected number is that of the same choices at other times of the run."
    )
    return [html.Text(intro), html.Table(["Choice, state", *_HEAD], rows, numbers=True)]


_HEAD = ("Windows", "Chosen", "Expected", "SD", "Distance, SD")


def _cells(tally: Tally) -> list[str]:
    numbers = (f"{tally.expected:.1f}", f"{tally.sd:.1f}", f"{tally.distance:+.1f}" if tally.variance > 1e-9 else "")
    return [str(tally.windows), str(tally.chosen), *numbers]


def _draw(axes: Axes, choice: Chosen) -> None:
    some = [(part, tally) for part, tally in enumerate(choice.parts) if tally.windows]
    middle = 100 * (np.array([part for part, _ in some]) + 0.5) / _PARTS
    windows, expected, sd, chosen = (
        np.array([getattr(tally, name) for _, tally in some]) for name in ("windows", "expected", "sd", "chosen")
    )
    share, mean, spread = 100 * chosen / windows, 100 * expected / windows, 100 * sd / windows
    axes.fill_between(middle, mean - 2 * spread, mean + 2 * spread, color=html.PALE, lw=0, label="expected, 2 SD")
    axes.plot(middle, mean, color=html.GREY, lw=1.2)
    far = np.array([abs(tally.distance) > _FAR for _, tally in some])
    axes.plot(middle[~far], share[~far], "o", ms=5, color=html.BLUE, label="chosen")
    if far.any():
        axes.plot(middle[far], share[far], "D", ms=6, color=html.ORANGE, mec=html.INK, label=f"beyond {_FAR:g} SD")
    axes.set(
        title=f"Chosen windows over the run: {choice.name}, {html.count(choice.sessions, 'session')}",
        xlabel="part of the run, %",
        ylabel="chosen, %",
        xlim=(0, 100),
        ylim=(0, None),
    )
    axes.grid(axis="y")
    axes.legend(loc="lower right", bbox_to_anchor=(1, 0.98), ncols=3, borderaxespad=0)
