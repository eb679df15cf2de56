"""The windows of a session, one at a time: the numbers of the view, its parcels and its events."""

from __future__ import annotations

import base64
import json
import re

import numpy as np
import pandas as pd
import pytest

from helpers.pages import NASTY, Reader
from shards.conversion.session import ParcelSettings
from shards.format.patches import scatter
from shards.format.reader import Dataset
from shards.format.session_record import SessionRecord
from shards.preprocessing.quality import dvars
from shards.reporting import windows_view
from shards.reporting.windows_view import Given, render
from slim.ranking.parcels import make_parcels
from slim.ranking.rankers import make_ranker


def content(page: str) -> dict:
    (text,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    return json.loads(text)


def unpacked(text: str, kind: str, *shape: int) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), kind).reshape(shape)


@pytest.fixture
def session(opened: Dataset) -> SessionRecord:
    return opened.sessions[1]


def test_numbers_are_those_of_the_sample(opened: Dataset, session: SessionRecord) -> None:
    """The energy of all parcels and frames is that of z-scores: 1."""
    arrays = opened.read(session)
    data = content(render(opened, session, Given()))
    parcels, windows = len(arrays["roi"]), session.n_windows
    assert data["scores"] == pytest.approx(arrays["scores"], abs=1e-4) and len(data["scores"]) == windows
    assert [part["name"] for part in data["parts"]] == ["space part", "time part"]
    assert data["parts"][1]["values"] == pytest.approx(arrays["scores_time"], abs=1e-4)
    assert [data["kept"][start // opened.frames] for start in arrays["start"]] == [*range(1, session.n_kept + 1)]
    assert data["kept"].count(0) == windows - session.n_kept
    roi_RT = arrays["roi"].astype(float)
    z_RT = (roi_RT - roi_RT.mean(axis=1, keepdims=True)) / roi_RT.std(axis=1, keepdims=True)
    assert [(one["name"], one["signed"]) for one in data["layers"]] == [("energy", False), ("mean", True)]
    energy_RW, mean_RW = (unpacked(one["values"], "<f4", parcels, windows) for one in data["layers"])
    third = slice(2 * opened.frames, 3 * opened.frames)
    np.testing.assert_allclose(energy_RW[:, 2], (z_RT[:, third] ** 2).mean(axis=1), rtol=1e-4)
    np.testing.assert_allclose(mean_RW[:, 2], z_RT[:, third].mean(axis=1), atol=1e-5)
    change_T = dvars(100 * roi_RT.T / roi_RT.mean())
    assert data["dvars"] == pytest.approx(change_T, abs=1e-3) and len(data["dvars"]) == session.frames - 1
    low, high = np.percentile(change_T, [25, 75])
    assert data["dvarsLimit"] == pytest.approx(high + 1.5 * (high - low), abs=1e-3)
    assert data["meanFd"] == session.mean_fd_mm and data["events"] is None


def test_parcels_lie_where_those_of_the_conversion_lie(opened: Dataset, session: SessionRecord) -> None:
    """The mean position of the voxels of each parcel on the map is the centre in the sample."""
    settings = ParcelSettings.model_validate(opened.manifest.configuration["settings"]["parcels"])
    data = content(render(opened, session, Given(make_parcels(opened.grid, settings))))
    assert data["exact"] and data["mm"] == opened.grid.mm and data["shape"] == list(opened.grid.shape)
    label_XYZ = unpacked(data["labels"], "<u2", *opened.grid.shape)
    arrays = opened.read(session, ("brain", "patch", "roi_centre", "roi_number"))
    brain_XYZ = scatter(arrays["brain"], arrays["patch"], opened.grid.shape, opened.grid.patch) > 0
    assert not label_XYZ[~brain_XYZ].any() and label_XYZ.max() == len(data["parcels"])
    assert data["parcels"] == arrays["roi_number"].tolist()
    for row, centre_3 in enumerate(arrays["roi_centre"]):
        place_3 = np.argwhere(label_XYZ == row + 1).mean(axis=0) * data["mm"] + data["origin"]
        np.testing.assert_allclose(place_3, centre_3, atol=0.01)
        np.testing.assert_allclose(data["centres"][row], centre_3, atol=0.06)


def test_without_parcels_a_voxel_gets_the_nearest_centre(opened: Dataset, session: SessionRecord) -> None:
    data = content(render(opened, session, Given()))
    label_XYZ = unpacked(data["labels"], "<u2", *opened.grid.shape)
    assert not data["exact"]
    arrays = opened.read(session, ("brain", "patch", "roi_centre"))
    brain_XYZ = scatter(arrays["brain"], arrays["patch"], opened.grid.shape, opened.grid.patch) > 0
    assert ((label_XYZ > 0) == brain_XYZ).all()
    for index_3 in np.argwhere(brain_XYZ)[::50]:
        distance_R = np.linalg.norm(arrays["roi_centre"] - (index_3 * data["mm"] + data["origin"]), axis=1)
        assert distance_R[label_XYZ[tuple(index_3)] - 1] == pytest.approx(distance_R.min(), abs=1e-3)


def test_energies_are_those_of_the_function_given(opened: Dataset, session: SessionRecord) -> None:
    arrays = opened.read(session, ("roi", "roi_centre"))
    energies = make_ranker("ridge").energies
    data = content(render(opened, session, Given(energies=energies)))
    named = {one["name"]: one for one in data["layers"]}
    assert list(named) == ["energy", "scores_space", "scores_time", "mean"]
    expected = energies(arrays["roi"], arrays["roi_centre"], opened.frames)
    for name, expected_RW in expected.items():
        np.testing.assert_array_equal(unpacked(named[name]["values"], "<f4", *expected_RW.shape), expected_RW)
    assert named["scores_time"]["title"] == "predicted from frames nearby"


def test_displacement_is_that_of_the_frames(opened: Dataset, session: SessionRecord) -> None:
    data = content(render(opened, session, Given()))
    moved_T = opened.read(session, ("displacement",))["displacement"]
    assert data["displacement"][0] is None and len(data["displacement"]) == session.frames
    assert (
        data["displacement"][1:] == pytest.approx(moved_T[1:].tolist(), abs=1e-4) and data["displacementLimit"] == 0.5
    )


def test_events_are_shown_and_their_names_are_text(opened: Dataset, session: SessionRecord) -> None:
    table = pd.DataFrame({"onset": [1.0, 9.0], "end": [4.0, 9.5], "state": ["move", NASTY]})
    page = render(opened, session, Given(events=lambda one: table if one == session else None))
    assert NASTY not in page
    expected = [{"onset": 1.0, "end": 4.0, "state": "move"}, {"onset": 9.0, "end": 9.5, "state": NASTY}]
    assert content(page)["events"] == expected
    other = content(render(opened, opened.sessions[0], Given(events=lambda one: table if one == session else None)))
    assert other["events"] is None


def test_states_are_found_by_the_function_given(opened: Dataset, session: SessionRecord) -> None:
    seen = []

    def states(events: pd.DataFrame, start_W: np.ndarray, seconds: float) -> list[str | None]:
        seen.append((len(events), start_W.tolist(), seconds))
        return ["move"] * len(start_W)

    table = pd.DataFrame({"onset": [1.0], "end": [4.0], "state": ["move"]})
    given = Given(events=lambda _: table, states=states)
    assert given.states_of(session, opened.frames) == ["move"] * session.n_windows
    seconds = opened.frames * session.tr
    assert seen == [(1, pytest.approx([seconds * window for window in range(session.n_windows)]), seconds)]
    assert (
        Given().states_of(session, 5) is None
        and Given(events=lambda _: None, states=states).states_of(session, 5) is None
    )
    hidden = session.model_copy(update={"key": "session 1"})
    assert Given(events=lambda one: [one.key]).of({"session 1": session}).events(hidden) == [session.key]


def test_a_view_names_nobody_and_loads_nothing(opened: Dataset, session: SessionRecord) -> None:
    page = render(opened, session, Given())
    assert session.key not in page and session.source not in page and f"sub-{session.subject}" not in page
    reader = Reader(page)
    assert not {tag for tag, _ in reader.tags} & {"link", "iframe", "object", "embed", "base", "img"}
    assert not any(name in attrs for _, attrs in reader.tags for name in ("src", "href"))
    (policy,) = [attrs["content"] for _, attrs in reader.tags if "http-equiv" in attrs]
    assert policy.startswith("default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; ")
    assert page == render(opened, session, Given())


def test_large_grids_are_thinned_out(opened: Dataset, session: SessionRecord, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every second voxel of a grid that is too large; those that are left keep their places."""
    whole = content(render(opened, session, Given()))
    monkeypatch.setattr(windows_view, "_MOST", 8)
    thin = content(render(opened, session, Given()))
    assert thin["shape"] == [8, 8, 8] and (thin["mm"], thin["origin"]) == (2 * whole["mm"], whole["origin"])
    label_XYZ = unpacked(whole["labels"], "<u2", *opened.grid.shape)
    np.testing.assert_array_equal(unpacked(thin["labels"], "<u2", 8, 8, 8), label_XYZ[::2, ::2, ::2])
