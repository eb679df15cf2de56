"""The windows of a session, one at a time: which parcels carry the score, DVARS, displacement, parts, events.

The view is a file of its own beside the page, as those of `shards.reporting.viewer`. Its template holds the script.

Legend: X, Y, Z voxels of the grid, or of every so many of them; R parcels; T frames; W windows.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from matplotlib import colormaps
from scipy.spatial import cKDTree

from shards.core import templates
from shards.format.grid import Grid
from shards.format.reader import Dataset
from shards.format.session_record import SessionRecord
from shards.reporting import quality_figures

if TYPE_CHECKING:
    import pandas as pd

_PREDICTED = {"scores_space": "predicted from other parcels", "scores_time": "predicted from frames nearby"}
_MOST = 64  # largest number of voxels along an axis of the map
ARRAYS = (
    *("baseline", "brain", "carpet", "displacement", "patch", "roi", "roi_centre", "roi_number"),
    *("scores", "scores_space", "scores_time", "start"),
)


Energies = Callable[[np.ndarray, np.ndarray, int], Mapping[str, np.ndarray]]  # see `Given`


@dataclass(frozen=True)
class Event:
    """An event of a scan: onset and end in s from the start of the harmonised scan, and its state."""

    onset: float
    end: float
    state: str


@dataclass(frozen=True)
class Given:
    """What a page can show beyond the dataset.

    Attributes
    ----------
    parcels : callable, optional
        The parcels of a brain mask, labels (X, Y, Z), as they were used in the conversion. Without it, a voxel gets the
        parcel with the nearest centre.
    events : callable, optional
        The events of a session: a table with `onset` and `end` in s from the start of the harmonised scan, and `state`;
        None if it has none.
    energies : callable, optional
        The predictable energy of each parcel in every window, (R, W) by the name of the part of the score that rests on
        it: from the series of the parcels, their centres in mm and the number of frames of a window, as
        `slim.ranking.rankers.Ranker.energies`.
    states : callable, optional
        The state of each window, or None: from the events of a session, the starts of its windows and their length, in
        s.
    """

    parcels: Callable[[np.ndarray], np.ndarray] | None = None
    events: Callable[[SessionRecord], pd.DataFrame | None] | None = None
    states: Callable[[pd.DataFrame, np.ndarray, float], list[str | None]] | None = None
    energies: Energies | None = None

    def events_of(self, session: SessionRecord) -> list[Event] | None:
        """The events of a session; None if no events were given."""
        found = None if self.events is None else self.events(session)
        if found is None:
            return None
        return [Event(float(row.onset), float(row.end), str(row.state)) for row in found.itertuples()]

    def states_of(self, session: SessionRecord, frames: int) -> list[str | None] | None:
        """The state of each window of a session; None if no events were given, or it has none."""
        found = None if self.events is None else self.events(session)
        if found is None or self.states is None:
            return None
        seconds = frames * session.tr
        return self.states(found, np.arange(session.n_windows) * seconds, seconds)

    def of(self, original: Mapping[str, SessionRecord]) -> Given:
        """The same for sessions with other keys and subjects; `original` has the session of each key."""
        if self.events is None:
            return self
        events = self.events
        return replace(self, events=lambda session: events(original[session.key]))


def render(dataset: Dataset, session: SessionRecord, given: Given) -> str:
    """The view as an HTML document.

    Parameters
    ----------
    dataset, session
    given : Given

    Raises
    ------
    SampleCorrupt
        If the session is damaged.
    """
    arrays = dataset.read(session, ARRAYS)
    shown = quality_figures.Shown(dataset.grid, dataset.frames, session, arrays)
    windows, frames = len(shown.scores_W), dataset.frames
    z_RWF = shown.z_RT[:, : windows * frames].reshape(len(shown.z_RT), windows, frames)
    kept_W = np.zeros(windows, int)
    kept_W[arrays["start"] // frames] = np.arange(1, session.n_kept + 1)
    label_XYZ, exact = _labels(shown, arrays, given)
    step = max(1, -(-max(dataset.grid.shape) // _MOST))
    thin = (slice(None, None, step),) * 3
    events = given.events_of(session)
    data = {
        "tr": session.tr,
        "frames": frames,
        "scores": _rounded(shown.scores_W),
        "parts": [{"name": title, "values": _rounded(values_W)} for values_W, _, title in shown.parts],
        "kept": kept_W.tolist(),
        "best": len(shown.best_K),
        "dvars": _rounded(shown.dvars_T),
        "dvarsLimit": round(float(shown.limit), 4),
        "displacement": None if shown.moved_T is None else _known(shown.moved_T),
        "displacementLimit": quality_figures.MOVED_MM,
        "meanFd": session.mean_fd_mm,
        "events": None if events is None else [vars(event) for event in events],
        "parcels": arrays["roi_number"].tolist(),
        "centres": np.round(arrays["roi_centre"], 1).tolist(),
        "layers": _layers(arrays, dataset.frames, z_RWF, given),
        "exact": exact,
        "ranker": str(dataset.manifest.ranker.get("name", "")),
        "sure": shown.sure,
        **_map_of(shown, dataset.grid, label_XYZ[thin], thin, step),
        "colours": {"energy": _colours("inferno"), "signed": _colours("RdBu_r")},
    }
    return templates.render("windows.html", "shards.reporting", data=data)


def _labels(shown: quality_figures.Shown, arrays: dict[str, np.ndarray], given: Given) -> tuple[np.ndarray, bool]:
    """For each voxel, 1 + the row of its parcel or 0, int16; and whether these are the parcels of the conversion."""
    number_R = arrays["roi_number"]
    found_XYZ = np.zeros(shown.brain_XYZ.shape, np.int16)
    if given.parcels is not None:
        label_XYZ = given.parcels(shown.brain_XYZ)
        row_XYZ = np.searchsorted(number_R, label_XYZ).clip(max=len(number_R) - 1)
        return np.where(number_R[row_XYZ] == label_XYZ, row_XYZ + 1, 0).astype(np.int16), True
    index_N3 = np.argwhere(shown.brain_XYZ)
    mm_N3 = index_N3 @ shown.grid.affine[:3, :3].T + shown.grid.affine[:3, 3]
    found_XYZ[shown.brain_XYZ] = cKDTree(arrays["roi_centre"]).query(mm_N3)[1] + 1
    return found_XYZ, False


def _map_of(
    shown: quality_figures.Shown, grid: Grid, label_XYZ: np.ndarray, thin: Sequence[slice], step: int
) -> dict[str, object]:
    """The volumes of the map, every `step`-th voxel in C order, and where they lie."""
    low, high = np.percentile(shown.baseline_XYZ[shown.brain_XYZ], [2, 98])
    grey_XYZ = 40 + 215 * (shown.baseline_XYZ[*thin] - low) / max(high - low, 1e-12)
    inside_XYZ = shown.brain_XYZ[*thin]
    return {
        "shape": list(label_XYZ.shape),
        "mm": grid.mm * step,
        "origin": np.round(grid.affine[:3, 3], 3).tolist(),
        "labels": _packed(label_XYZ.astype("<u2")),
        "grey": _packed(np.where(inside_XYZ, grey_XYZ.clip(1, 255), 0).astype(np.uint8)),
    }


def _layers(arrays: dict[str, np.ndarray], frames: int, z_RWF: np.ndarray, given: Given) -> list[dict[str, object]]:
    """What the map can show: each with a title, its values (R, W), and whether they have a sign."""
    found = [("energy", "energy (mean z²)", np.square(z_RWF).mean(axis=2), False)]
    if given.energies is not None:
        energies = given.energies(arrays["roi"], arrays["roi_centre"], frames)
        found += [(name, _PREDICTED[name], energy_RW, False) for name, energy_RW in energies.items()]
    found.append(("mean", "mean z", z_RWF.mean(axis=2), True))
    return [
        {"name": name, "title": title, "values": _encoded(value_RW), "signed": signed}
        for name, title, value_RW, signed in found
    ]


def _known(values: np.ndarray) -> list[float | None]:
    return [round(float(value), 4) if np.isfinite(value) else None for value in values]


def _rounded(values: np.ndarray) -> list[float]:
    return np.round(values.astype(np.float64), 4).tolist()


def _encoded(values: np.ndarray) -> str:
    return _packed(values.astype("<f4"))


def _packed(values: np.ndarray) -> str:
    return base64.b64encode(np.ascontiguousarray(values).tobytes()).decode()


def _colours(name: str) -> str:
    """The 256 colours of a colour map, RGB bytes."""
    return _packed((colormaps[name](np.arange(256))[:, :3] * 255).round().astype(np.uint8))
