"""Ways to make one vector of the tokens of a session, or one of each of its windows.

    vector = location(features, features.place_L)

Legend: N sessions; S time slots of a session; W windows; L places (cells of the last stage that hold brain); C
channels; M tokens of all places and slots; Q principal axes; P features of a session.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import numpy as np

from shards.errors import ConfigError, DatasetError
from slim.brain import Features


def common_places(features: Sequence[Features]) -> np.ndarray:
    """Places that hold brain in every session, ascending."""
    place_L = reduce(np.intersect1d, [item.place_L for item in features])
    if not len(place_L):
        raise DatasetError("features", "places", "no place that all sessions have", "masks that overlap")
    return place_L


def at_places(features: Features, place_L: np.ndarray) -> np.ndarray:
    """Tokens at these places, (S, L, C)."""
    return features.token_SLC[:, np.searchsorted(features.place_L, place_L)]


def mean(features: Features, place_L: np.ndarray) -> np.ndarray:
    """Mean over slots and places, (C,)."""
    return at_places(features, place_L).mean(axis=(0, 1))


def mean_sd(features: Features, place_L: np.ndarray) -> np.ndarray:
    """Mean over slots and places, then the SD over slots averaged over places, (2 C,)."""
    x_SLC = at_places(features, place_L)
    return np.concatenate([x_SLC.mean(axis=(0, 1)), x_SLC.std(axis=0).mean(axis=0)])


def location(features: Features, place_L: np.ndarray) -> np.ndarray:
    """Mean over slots of each place, (L C,)."""
    return at_places(features, place_L).mean(axis=0).ravel()


def principal_axes(features: Sequence[Features], place_L: np.ndarray, count: int) -> np.ndarray:
    """Axes of largest variance over time, pooled over places and sessions, (C, Q).

    The mean over time of each session's place is taken off first: what differs between places (anatomy,
    position) would otherwise take the first axes, and it cannot take part in a correlation over time.
    """
    dim = features[0].token_SLC.shape[2]
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
    x_SLQ = at_places(features, place_L) @ axes_CQ.astype(np.float32)
    x_SP = x_SLQ.reshape(len(x_SLQ), -1).astype(np.float64)
    x_SP -= x_SP.mean(axis=0)
    norm_P = np.sqrt((x_SP**2).sum(axis=0))
    x_SP = x_SP / np.where(norm_P > 1e-12, norm_P, np.inf)
    return (x_SP.T @ x_SP)[np.triu_indices(x_SP.shape[1], 1)].astype(np.float32)


def pool(features: Sequence[Features], pooling: str, components: int, train: np.ndarray) -> np.ndarray:
    """One vector for each session, float32 (N, P), on the places that all of them have.

    Without answers: attentive pooling, which needs them, is `slim.attentive`.

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
    function = {"mean": mean, "mean+sd": mean_sd, "location": location}[pooling]
    return np.stack([function(item, place_L) for item in features])


def windows(features: Features, place_L: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Each window's tokens at these places, the mean over its slots: starts (s), (W,), and (W, L, C), in time order."""
    start_W, number_S = np.unique(features.window_S, return_inverse=True)
    x_SLC = at_places(features, place_L)
    sum_WLC = np.zeros((len(start_W), *x_SLC.shape[1:]), np.float32)
    np.add.at(sum_WLC, number_S, x_SLC)
    return start_W, sum_WLC / np.bincount(number_S)[:, None, None].astype(np.float32)
