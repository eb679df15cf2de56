"""The tokens of a session, and poolings to one vector per session or per window.

    vector = location(features, features.places)
    vector_WP = vectors(features, "window", "mean", features.places)

Legend: N sessions; S time slots of a session, T of all sessions; W windows; L places (cells of the last stage that
contain brain); C channels; M tokens of all places and slots; Q principal components; P features of a session or slot.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator, svds
from torch import Tensor

from shards.core.deprecation import OldName, renamed_state
from shards.core.display import as_html, as_text
from shards.core.errors import ConfigError, DatasetError
from slim.model import pooling as in_torch

COMPONENTS = {"cov": 3, "patterns": 64}  # default numbers of principal components


@dataclass
class Features:
    """The features of one session.

    Attributes
    ----------
    key : str
        Key of the session.
    tokens : float32 array (S, L, C)
        Slots in time order, places in ascending order.
    places : int64 array (L,)
        Flat index of each place in the grid of cells.
    slot_times : array (S,)
        Middle of each slot, in s from the start of the scan.
    slot_window_onsets : float64 array (S,)
        Start of the window that contains each slot, in s from the start of the scan.
    tr : float or None
        TR of the encoded frames, in s; None if unknown.
    source_tr : float or None
        TR of the scan, in s. If it differs, the scan was resampled to `tr`.
    assumed : tuple of str
        What was assumed about the scan (space, orientation, TR, mask), one sentence each.
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
        """Start of each window in time order, in s from the start of the scan; float64 (W,)."""
        return np.unique(self.slot_window_onsets)

    def __repr__(self) -> str:
        return as_text(*self._shown())

    def _repr_html_(self) -> str:
        return as_html(*self._shown())

    def _shown(self) -> tuple[str, dict[str, object]]:
        slots, places, channels = self.tokens.shape
        moved = "" if self.source_tr in (None, self.tr) else f", resampled from {self.source_tr:g} s"
        return f"Features of {self.key}", {
            "tokens": f"{slots} slots x {places} places x {channels} channels, {self.tokens.dtype}",
            "windows": len(self.window_onsets),
            "TR": None if self.tr is None else f"{self.tr:g} s{moved}",
            "assumed": "; ".join(self.assumed) or None,
        }

    # names of version 0.1
    token_SLC = OldName("tokens")
    place_L = OldName("places")
    second_S = OldName("slot_times")
    window_S = OldName("slot_window_onsets")
    start_W = OldName("window_onsets")

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(renamed_state(Features, state))


def common_places(features: Sequence[Features]) -> np.ndarray:
    """Places that contain brain in every session, in ascending order."""
    place_L = reduce(np.intersect1d, [item.places for item in features])
    if not len(place_L):
        raise DatasetError("features", "places", "no place that is in all sessions", "overlapping brain masks")
    return place_L


def at_places(features: Features, place_L: np.ndarray) -> np.ndarray:
    """Tokens at these places, (S, L, C).

    Raises
    ------
    DatasetError
        If the session has no tokens at one of them.
    """
    missing = np.setdiff1d(place_L, features.places)
    if len(missing):
        got = f"no brain in {len(missing)} of the {len(place_L)} places"
        hint = "Pool over places that all sessions have"
        raise DatasetError(features.key, "places", got, "tokens at all places", hint)
    return features.tokens[:, np.searchsorted(features.places, place_L)]


def fixed(features: Features, place_L: np.ndarray, pooling: str) -> np.ndarray:
    """Apply one of `slim.model.pooling.FIXED` to the tokens at these places; float32 (P,)."""
    return _float32(in_torch.FIXED[pooling](_tensor(at_places(features, place_L))))


def _tensor(x: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(x))


def _float32(x: Tensor) -> np.ndarray:
    return x.float().numpy()


def fit_components(
    features: Sequence[Features], place_L: np.ndarray, pooling: str, count: int | None = None
) -> np.ndarray:
    """The principal components of a pooling of `slim.model.pooling.FITTED`, fitted on these sessions.

    Parameters
    ----------
    features : sequence of Features
    place_L : int array
    pooling : "cov" or "patterns"
    count : int, optional
        Number of components Q; by default that of `COMPONENTS`.

    Returns
    -------
    ndarray
        `principal_axes`, (C, Q), or `principal_patterns`, (L, C, Q).

    Raises
    ------
    ConfigError
        If there are not that many components.
    """
    fit = principal_axes if pooling == "cov" else principal_patterns
    return fit(features, place_L, COMPONENTS[pooling] if count is None else count)


def fitted(features: Features, place_L: np.ndarray, pooling: str, components: np.ndarray) -> np.ndarray:
    """Apply a pooling of `slim.model.pooling.FITTED` with the result of `fit_components`; float32 (P,)."""
    token_SLC = _tensor(at_places(features, place_L))
    return _float32(in_torch.FITTED[pooling](token_SLC, _tensor(components)))


def principal_axes(features: Sequence[Features], place_L: np.ndarray, count: int) -> np.ndarray:
    """Axes of largest variance over time, pooled over places and sessions, (C, Q).

    The mean over time is subtracted for each place of each session. Otherwise the first axes would describe differences
    between places (anatomy, position), which do not contribute to correlations over time.
    """
    dim = features[0].tokens.shape[2]
    if count > dim:
        raise ConfigError("task", "components", count, f"at most {dim}, the number of channels of the encoder")
    scatter_CC = np.zeros((dim, dim))
    for item in features:
        scatter_CC += scatter(at_places(item, place_L))
    return leading_axes(scatter_CC, count)


def scatter(token_SLC: np.ndarray) -> np.ndarray:
    """Scatter matrix of tokens around the mean of their place over slots, float64 (C, C)."""
    x_MC = (token_SLC - token_SLC.mean(axis=0)).reshape(-1, token_SLC.shape[2]).astype(np.float64)
    return x_MC.T @ x_MC


def leading_axes(scatter_CC: np.ndarray, count: int) -> np.ndarray:
    """The eigenvectors of the largest eigenvalues of a scatter matrix, largest first, (C, Q)."""
    return np.linalg.eigh(scatter_CC)[1][:, ::-1][:, :count]


def principal_patterns(features: Sequence[Features], place_L: np.ndarray, count: int) -> np.ndarray:
    """Patterns over all places and channels with the largest variance over time, pooled over sessions, (L, C, Q).

    As `principal_axes`, of all tokens of a slot together. Each pattern has a length of 1, and is positive where it is
    largest.
    """
    from sklearn.utils.extmath import svd_flip  # takes seconds to import

    slots = sum(len(item.tokens) for item in features)
    most = min(slots, len(place_L) * features[0].tokens.shape[2]) - 1
    if count > most:
        expected = f"at most {most}, because the training sessions have {slots} slots"
        raise ConfigError("task", "components", f"{count} patterns", expected, "Set fewer components")
    matrices = [_flat(item, place_L) for item in features]
    means = [x_SP.mean(axis=0) for x_SP in matrices]
    ends = np.cumsum([len(x_SP) for x_SP in matrices])[:-1]
    shape = slots, matrices[0].shape[1]

    def strengths(pattern_P: np.ndarray) -> np.ndarray:  # session by session, so that no second copy of them is made
        return np.concatenate([x_SP @ pattern_P - m_P @ pattern_P for x_SP, m_P in zip(matrices, means, strict=True)])

    def weighted(weight_T: np.ndarray) -> np.ndarray:
        total_P = np.zeros((shape[1], *weight_T.shape[1:]), weight_T.dtype)
        for x_SP, m_P, part_S in zip(matrices, means, np.split(weight_T, ends), strict=True):
            total_P += x_SP.T @ part_S - np.multiply.outer(m_P, part_S.sum(axis=0))
        return total_P

    centred = LinearOperator(shape, strengths, weighted, strengths, np.float32, weighted)
    start = np.random.default_rng(0).standard_normal(min(shape)).astype(np.float32)
    _, _, pattern_QP = svds(centred, k=count, v0=start, return_singular_vectors="vh")
    pattern_QP = svd_flip(None, pattern_QP[::-1], u_based_decision=False)[1]
    return np.ascontiguousarray(pattern_QP.T).reshape(len(place_L), -1, count)


def _flat(features: Features, place_L: np.ndarray) -> np.ndarray:
    """Tokens at these places, a row for each slot, (S, L C); not copied if the session has no other places."""
    same = np.array_equal(features.places, place_L)
    return (features.tokens if same else at_places(features, place_L)).reshape(len(features.tokens), -1)


def pool(features: Sequence[Features], pooling: str, components: int | None, train: np.ndarray) -> np.ndarray:
    """Pool each session to one vector, float32 (N, P), on the places that all sessions have.

    Attentive pooling needs labels and is in `slim.evaluation.attentive`.

    Parameters
    ----------
    features : sequence of Features
    pooling : "mean", "mean+sd", "location", "cov" or "patterns"
    components : int or None
        Number of components of `cov` or `patterns`, see `fit_components`.
    train : int array
        Rows of the sessions on which they are fitted.
    """
    place_L = common_places(features)
    if pooling in in_torch.FITTED:
        found = fit_components([features[row] for row in train], place_L, pooling, components)
        return np.stack([fitted(item, place_L, pooling, found) for item in features])
    return np.stack([fixed(item, place_L, pooling) for item in features])


def windows(features: Features, place_L: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean tokens of each window at these places: starts in s, (W,), and tokens, (W, L, C), in time order."""
    start_W, number_S = np.unique(features.slot_window_onsets, return_inverse=True)
    token_SLC = _tensor(at_places(features, place_L))
    return start_W, _float32(in_torch.group_means(token_SLC, _tensor(number_S), len(start_W)))


def vectors(features: Features, per: str, pooling: str, place_L: np.ndarray) -> np.ndarray:
    """Pool tokens to one vector per window, or to one vector of the scan, float32.

    Parameters
    ----------
    features : Features
    per : "window" or "scan"
        "run" is accepted as an older name of "scan".
    pooling : "mean", "mean+sd" or "location"
        For a scan see `mean`, `mean_sd` and `location`. For a window, the SD is over places, because a window has too
        few slots for an SD over time.
    place_L : int array

    Returns
    -------
    ndarray, (W, P) in the order of `features.window_onsets`, or (P,)

    Raises
    ------
    ConfigError
        If `per` or `pooling` is another value. `cov`, `patterns` and `attentive` must be fitted on a set of scans.
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
    """Check `per` and `pooling` of `vectors`."""
    if per not in ("window", "scan", "run"):
        raise ConfigError("per", "", per, "window or scan")
    if pooling not in tuple(in_torch.FIXED):
        hint = "Other poolings are fitted on a set of scans: use slim.SlimBrainTransformer"
        raise ConfigError("pooling", "", pooling, ", ".join(in_torch.FIXED), hint)
