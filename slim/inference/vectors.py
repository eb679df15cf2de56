"""The tokens of a session, and ways to make one vector of them, or one of each window.

    vector = location(features, features.places)
    vector_WP = vectors(features, "window", "mean", features.places)

Legend: N sessions; S time slots of a session; W windows; L places (cells of the last stage that hold brain); C
channels; M tokens of all places and slots; Q principal axes; P features of a session.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

import numpy as np
import torch
from torch import Tensor

from shards.core.deprecation import OldName, renamed_state
from shards.core.errors import ConfigError, DatasetError
from slim.model import pooling as in_torch


@dataclass
class Features:
    """What the encoder made of one session.

    Attributes
    ----------
    key : the session's key
    tokens : float32 (S, L, C); slots in time order, places in ascending order
    places : int64 (L,), flat index of each place in the grid of cells
    slot_times : (S,), middle of each slot, s from the start of the scan
    slot_window_onsets : float64 (S,), start of the window that holds each slot, s from the start of the scan
    tr : TR of the frames that were encoded, s; None where nobody said
    source_tr : TR of the scan, as it was read or stated, s; where it differs the scan was brought to `tr`
    assumed : what was assumed about the scan (its space, orientation, TR, mask), a sentence each
    """

    key: str
    tokens: np.ndarray
    places: np.ndarray
    slot_times: np.ndarray
    slot_window_onsets: np.ndarray
    tr: float | None = None
    source_tr: float | None = None
    assumed: tuple[str, ...] = ()

    @property
    def window_onsets(self) -> np.ndarray:
        """Start of each window in time order, s from the start of the scan; float64 (W,)."""
        return np.unique(self.slot_window_onsets)

    # the names of version 0.1
    token_SLC = OldName("tokens")
    place_L = OldName("places")
    second_S = OldName("slot_times")
    window_S = OldName("slot_window_onsets")
    start_W = OldName("window_onsets")

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(renamed_state(Features, state))


def common_places(features: Sequence[Features]) -> np.ndarray:
    """Places that hold brain in every session, ascending."""
    place_L = reduce(np.intersect1d, [item.places for item in features])
    if not len(place_L):
        raise DatasetError("features", "places", "no place that all sessions have", "masks that overlap")
    return place_L


def at_places(features: Features, place_L: np.ndarray) -> np.ndarray:
    """Tokens at these places, (S, L, C).

    Raises
    ------
    DatasetError
        If it has no tokens at one of them.
    """
    missing = np.setdiff1d(place_L, features.places)
    if len(missing):
        got = f"no brain in {len(missing)} of the {len(place_L)} places"
        raise DatasetError(features.key, "places", got, "tokens at all of them", "Pool over places that all have")
    return features.tokens[:, np.searchsorted(features.places, place_L)]


def fixed(features: Features, place_L: np.ndarray, pooling: str) -> np.ndarray:
    """One of `slim.model.pooling.FIXED`, of the tokens at these places, float32 (P,)."""
    return _float32(in_torch.FIXED[pooling](_tensor(at_places(features, place_L))))


def _tensor(x: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(x))


def _float32(x: Tensor) -> np.ndarray:
    return x.float().numpy()


def principal_axes(features: Sequence[Features], place_L: np.ndarray, count: int) -> np.ndarray:
    """Axes of largest variance over time, pooled over places and sessions, (C, Q).

    The mean over time of each session's place is taken off first: what differs between places (anatomy,
    position) would otherwise take the first axes, and it cannot take part in a correlation over time.
    """
    dim = features[0].tokens.shape[2]
    if count > dim:
        raise ConfigError("task", "components", count, f"at most {dim}, the channels of the encoder")
    scatter_CC = np.zeros((dim, dim))
    for item in features:
        x_SLC = at_places(item, place_L)
        x_MC = (x_SLC - x_SLC.mean(axis=0)).reshape(-1, dim).astype(np.float64)
        scatter_CC += x_MC.T @ x_MC
    return np.linalg.eigh(scatter_CC)[1][:, ::-1][:, :count]


def cov(features: Features, place_L: np.ndarray, axes_CQ: np.ndarray) -> np.ndarray:
    """Correlations over slots between all pairs of (place, axis): a learned connectome, (L Q (L Q - 1) / 2,).

    The upper triangle, row by row. A series that does not vary correlates 0 with all others.
    """
    return _float32(in_torch.cov(_tensor(at_places(features, place_L)), _tensor(axes_CQ)))


def pool(features: Sequence[Features], pooling: str, components: int, train: np.ndarray) -> np.ndarray:
    """One vector for each session, float32 (N, P), on the places that all of them have.

    Without answers: attentive pooling, which needs them, is `slim.evaluation.attentive`.

    Parameters
    ----------
    features : sequence of Features
    pooling : "mean", "mean+sd", "location" or "cov"
    components : int
        Axes of `cov`.
    train : int array
        Rows of the sessions that the axes of `cov` may be fitted on.
    """
    place_L = common_places(features)
    if pooling == "cov":
        axes_CQ = principal_axes([features[row] for row in train], place_L, components)
        return np.stack([cov(item, place_L, axes_CQ) for item in features])
    return np.stack([fixed(item, place_L, pooling) for item in features])


def windows(features: Features, place_L: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Each window's tokens at these places, the mean over its slots: starts (s), (W,), and (W, L, C), in time order."""
    start_W, number_S = np.unique(features.slot_window_onsets, return_inverse=True)
    token_SLC = _tensor(at_places(features, place_L))
    return start_W, _float32(in_torch.group_means(token_SLC, _tensor(number_S), len(start_W)))


def vectors(features: Features, per: str, pooling: str, place_L: np.ndarray) -> np.ndarray:
    """A vector of each window, or of the whole scan, float32.

    Parameters
    ----------
    features : Features
    per : "window" or "scan"
        "run" is an older word for "scan".
    pooling : "mean", "mean+sd" or "location"
        For a scan see `mean`, `mean_sd` and `location`; `mean+sd` of a window has the SD over places, because a window
        has too few slots for one over time.
    place_L : int array

    Returns
    -------
    ndarray, (W, P) in the order of `features.window_onsets`, or (P,)

    Raises
    ------
    ConfigError
        If `per` or `pooling` is none of these; `cov` and `attentive` are fitted on a set of scans.
    """
    check_fixed(per, pooling)
    if per != "window":
        return fixed(features, place_L, pooling)
    _, x_WLC = windows(features, place_L)
    if pooling == "location":
        return x_WLC.reshape(len(x_WLC), -1)
    token_WLC = _tensor(x_WLC)
    mean_WC = token_WLC.mean(dim=1, dtype=torch.float64)
    return _float32(mean_WC if pooling == "mean" else torch.cat([mean_WC, in_torch.sd(token_WLC, 1)], dim=1))


def check_fixed(per: str, pooling: str) -> None:
    """Raise what `vectors` raises."""
    if per not in ("window", "scan", "run"):
        raise ConfigError("per", "", per, "window or scan")
    if pooling not in tuple(in_torch.FIXED):
        hint = "Others are fitted on a set of scans: slim.SlimBrainTransformer does that"
        raise ConfigError("pooling", "", pooling, ", ".join(in_torch.FIXED), hint)
