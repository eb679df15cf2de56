"""Baselines: functional connectivity, the mean image, parcel means of a window, confounds only.

They are computed from the same samples as the features of the model, so they use the same scans on the same grid.

Legend: N sessions, or rows of windows; R parcels; T frames; P patches; V voxels of a patch; E edges; W voxels that are
brain in all sessions; F features.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import reduce

import numpy as np

from shards.core.errors import DatasetError
from shards.format.reader import Dataset
from shards.format.session_record import SessionRecord
from slim.evaluation.labels import number, word


def connectomes(
    dataset: Dataset, sessions: list[SessionRecord], advance: Callable[[int], None] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Functional connectivity: correlations (Ledoit-Wolf) between parcels, float32 (N, E).

    It is computed for whole scans, and for the frames of the kept windows only, which are those that an encoder reads.
    Only parcels that all sessions have are used. Nothing is estimated across sessions.

    Raises
    ------
    DatasetError
        If fewer than two parcels are common to all sessions.
    """
    series, labels, kept = [], [], []
    for session in sessions:
        arrays = dataset.read(session, ("roi", "roi_number", "start"))
        series.append(arrays["roi"])
        labels.append(arrays["roi_number"])
        kept.append(np.unique(arrays["start"][:, None] + np.arange(dataset.frames)))
        if advance:
            advance(1)
    common = reduce(np.intersect1d, labels)
    if len(common) < 2:
        raise DatasetError(dataset.folder, "roi", f"{len(common)} parcels that all sessions have", "at least 2")
    whole = [roi_RT[rows_of(label_R, common)].T for roi_RT, label_R in zip(series, labels, strict=True)]
    return _correlations(whole), _correlations([x_TR[rows] for x_TR, rows in zip(whole, kept, strict=True)])


def _correlations(series: list[np.ndarray]) -> np.ndarray:
    """Correlations of the columns of each (T, R)."""
    from nilearn.connectome import ConnectivityMeasure  # takes seconds to import

    # Parcels are z-scored first; otherwise the shrinkage of the covariance depends on the brightest parcels.
    runs = []
    for series_TR in series:
        x_TR = series_TR.astype(np.float64)
        x_TR -= x_TR.mean(axis=0)
        runs.append(x_TR / np.maximum(x_TR.std(axis=0), 1e-12))
    measure = ConnectivityMeasure(kind="correlation", vectorize=True, discard_diagonal=True, standardize=False)
    return np.asarray(measure.fit_transform(runs), np.float32)


def mean_image(
    dataset: Dataset, sessions: list[SessionRecord], advance: Callable[[int], None] | None = None
) -> np.ndarray:
    """Mean image (global z) of each scan, on the voxels that are brain in all sessions, float32 (N, W).

    Raises
    ------
    DatasetError
        If no voxel is brain in all sessions.
    """
    values, numbers = [], []
    for session in sessions:
        arrays = dataset.read(session, ("baseline", "brain", "patch"))
        values.append(arrays["baseline"][arrays["brain"] > 0])
        numbers.append(voxel_numbers(dataset, arrays))
        if advance:
            advance(1)
    common = common_voxels(dataset, numbers)
    return np.stack([value[rows_of(number, common)] for value, number in zip(values, numbers, strict=True)])


def voxel_numbers(dataset: Dataset, arrays: Mapping[str, np.ndarray]) -> np.ndarray:
    """The number on the grid of each voxel that is brain, in the order of `arrays["brain"] > 0`; int (W,).

    Parameters
    ----------
    dataset : Dataset
    arrays : mapping
        `brain` and `patch` of a session.
    """
    place_P = np.ravel_multi_index(tuple(arrays["patch"].T.astype(np.intp)), dataset.grid.patch_shape)
    number_PV = place_P[:, None] * dataset.grid.voxels + np.arange(dataset.grid.voxels)
    return number_PV[arrays["brain"] > 0]


def common_voxels(dataset: Dataset, numbers: Sequence[np.ndarray]) -> np.ndarray:
    """The voxels that are brain in all sessions, int (W,).

    Raises
    ------
    DatasetError
        If there is none.
    """
    common = reduce(np.intersect1d, numbers)
    if not len(common):
        raise DatasetError(dataset.folder, "brain", "no voxel that is brain in all sessions", "overlapping brain masks")
    return common


def parcel_means(
    dataset: Dataset, sessions: list[SessionRecord], window_N: np.ndarray, advance: Callable[[int], None] | None = None
) -> np.ndarray:
    """Mean of each parcel's z-scored series over a window, float32 (N, R), for parcels that all sessions have.

    Parameters
    ----------
    dataset : Dataset
    sessions : list of dict
        Session of each window.
    window_N : float array
        Start of each window, in s.

    Raises
    ------
    DatasetError
        If no parcel is common to all sessions.
    """
    series: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for session in sessions:
        if session.key not in series:
            arrays = dataset.read(session, ("roi", "roi_number"))
            series[session.key] = arrays["roi"], arrays["roi_number"]
            if advance:
                advance(1)
    common = reduce(np.intersect1d, [label for _, label in series.values()])
    if not len(common):
        raise DatasetError(dataset.folder, "roi", "no parcel that all sessions have", "at least 1")
    rows = []
    for session, start in zip(sessions, window_N, strict=True):
        roi_RT, label_R = series[session.key]
        x_RT = roi_RT[rows_of(label_R, common)].astype(np.float64)
        first = round(start / session.tr)
        z_RT = (x_RT - x_RT.mean(axis=1, keepdims=True)) / np.maximum(x_RT.std(axis=1, keepdims=True), 1e-12)
        rows.append(z_RT[:, first : first + dataset.frames].mean(axis=1))
    return np.stack(rows).astype(np.float32)


def confounds(sessions: list[SessionRecord], names: Sequence[str]) -> np.ndarray:
    """Columns such as age, sex or site as features, float32 (N, F): numbers unchanged, text as one-hot vectors.

    Parameters
    ----------
    sessions : list of dict
    names : sequence of str
        Columns of the participants table, or facts of a session, without missing values.
    """
    columns: list[np.ndarray] = []
    for name in names:
        values = [session.fact(name) for session in sessions]
        numbers = [number(value) for value in values]
        if None not in numbers:
            columns.append(np.array(numbers, np.float32)[:, None])
        else:
            word_N = np.array([word(value) for value in values])
            columns.append((word_N[:, None] == np.unique(word_N)).astype(np.float32))
    return np.concatenate(columns, axis=1)


def rows_of(label: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Rows of `label` with the values `wanted`, in the order of `wanted`. All must exist."""
    order = np.argsort(label, kind="stable")
    return order[np.searchsorted(label[order], wanted)]
