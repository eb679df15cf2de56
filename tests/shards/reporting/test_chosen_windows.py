"""Where the chosen windows lie: expected numbers are right, and a preference is found only where there is one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from helpers.pages import Reader, check_self_contained, page_of
from shards.format.reader import Dataset
from shards.reporting import chosen_windows, html
from shards.reporting.chosen_windows import Chosen, Tally, count, describe
from shards.reporting.windows_view import Given


def draw(rng: np.random.Generator, windows: int, chosen: int, cluster: int = 1) -> np.ndarray:
    """Windows at random places; with `cluster`, so many neighbours together, round the end."""
    starts = rng.choice(windows // cluster, chosen // cluster, replace=False) * cluster + rng.integers(windows)
    chosen_W = np.zeros(windows, bool)
    chosen_W[(starts[:, None] + np.arange(cluster)) % windows] = True
    return chosen_W


def test_expected_numbers_are_those_of_every_shift() -> None:
    chosen_W = draw(np.random.default_rng(0), 30, 8)
    at_W2 = np.zeros((30, 2), bool)
    at_W2[3:9, 0] = True
    at_W2[::4, 1] = True
    tallies = [Tally(), Tally()]
    count(chosen_W, at_W2, tallies)
    for place, tally in enumerate(tallies):
        numbers = [np.roll(chosen_W, shift)[at_W2[:, place]].sum() for shift in range(30)]
        assert (tally.windows, tally.chosen) == (at_W2[:, place].sum(), chosen_W[at_W2[:, place]].sum())
        assert tally.expected == pytest.approx(np.mean(numbers)) == pytest.approx(8 * tally.windows / 30)
        assert tally.variance == pytest.approx(np.var(numbers))


@pytest.mark.parametrize("cluster", [1, 4])
def test_the_spread_is_right_also_for_neighbours_that_are_chosen_together(cluster: int) -> None:
    """Over 300 datasets of 20 sessions, the distances of a part of the run have the SD 1."""
    rng, distances = np.random.default_rng(1), []
    for _ in range(300):
        choice = Chosen.empty("")
        for _ in range(20):
            choice.add(draw(rng, 40, 8, cluster), None)
        distances.append([choice.parts[3].distance, choice.first.distance, choice.last.distance, choice.inner.distance])
    assert np.abs(np.mean(distances, axis=0)).max() < 0.2
    assert np.std(distances, axis=0) == pytest.approx(1, abs=0.12)


def test_a_preference_for_the_start_is_found() -> None:
    rng, choice = np.random.default_rng(2), Chosen.empty("")
    for _ in range(30):
        chosen_W = draw(rng, 40, 7)
        chosen_W[0] = True
        choice.add(chosen_W, None)
    assert choice.first.distance > 5 and choice.first.chosen == 30 == choice.first.windows
    assert choice.parts[0].distance > 3 and abs(choice.last.distance) < 3


def test_sessions_with_all_windows_chosen_say_nothing() -> None:
    choice = Chosen.empty("")
    choice.add(np.ones(12, bool), ["move"] * 12)
    assert choice.sessions == 0 and not choice.states and not sum(tally.windows for tally in choice.parts)


def test_a_preference_for_an_event_is_found() -> None:
    rng, choice = np.random.default_rng(3), Chosen.empty("")
    for _ in range(20):
        chosen_W = draw(rng, 40, 6)
        state_W = ["move" if chosen and rng.random() < 0.7 else None for chosen in chosen_W]
        choice.add(chosen_W, state_W)
    assert choice.states["move"].distance > 5 and choice.states["no state"].distance < -3
    assert sum(tally.windows for tally in choice.states.values()) == 20 * 40


def test_short_scans_have_parts_without_windows() -> None:
    choice = Chosen.empty("")
    choice.add(draw(np.random.default_rng(0), 12, 4), None)
    assert sum(tally.windows for tally in choice.parts) == 12 and sum(tally.windows > 0 for tally in choice.parts) == 12
    with html.drawing():
        shown = check_self_contained(page_of(chosen_windows._over_the_run([choice], 1, 1)))
    assert "No part of the run is more than 3 SD" in shown.text and "first window" in shown.text


def test_the_section_of_a_dataset(dataset: Path) -> None:
    opened = Dataset(dataset)
    with html.drawing():
        parts = describe(opened, Given())
    text = Reader(page_of(parts)).text
    chosen = len([s for s in opened.sessions if s.n_windows > 8])
    assert f"in {len(opened)} sessions" in text and "slim-brain report DATASET --states" in text and chosen
    starts = [opened.read(one, ("start",))["start"][:8] // opened.frames for one in opened.sessions]
    first = sum(0 in windows for windows in starts)
    assert f"the 8 most salient, first window {chosen} {first} " in text
    table = pd.DataFrame({"onset": [0.0], "end": [9.0], "state": ["move"]})
    given = Given(
        events=lambda _: table,
        states=lambda events, start_W, seconds: ["move" if start < 9 else None for start in start_W],
    )
    with html.drawing():
        text = Reader(page_of(describe(opened, given))).text
    assert "the 8 most salient, move" in text and "the 8 most salient, no state" in text


def test_thousands_of_sessions_are_sampled(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = Dataset(dataset)
    monkeypatch.setattr(chosen_windows, "_SESSIONS", 4)
    with html.drawing():
        text = Reader(page_of(describe(opened, Given()))).text
    assert f"in 4 of {len(opened)} sessions, chosen by a hash of their keys" in text
