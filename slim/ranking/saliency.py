"""Saliency of the windows of a scan (stage 1).

The paper ranks windows by "mutual masked reconstruction" (SLIM-Brain, arXiv 2512.21881, stage 1) without a formula.
Here saliency is defined as *joint predictable energy*: a window is salient if it exceeds the other windows of its scan
in energy that can be predicted both from other parcels and from neighbouring frames. A spike cannot be predicted in
time, an incoherent slow burst not in space, and noise in neither:

    joint_w = sum over the two views of  min(S_w, T_w)
    saliency_w = (joint_w-1 + 4 joint_w + joint_w+1) / 6

The views are those of `slim.ranking.extractor.standardise`. S_w and T_w are the parts of the window's energy that can
be predicted in space (`space_energy`) and in time. Each is multiplied by the weight of the window's most outlying frame
(`calmness`) and standardised over the windows of the scan (`standing`). Without a common scale, the predictor with the
smaller values alone would determine the minimum. The neighbours are included because a haemodynamic response is longer
than a window.

In time, two predictions are compared (version 2 of the score):

    T_w = min(near_w, far_w + 1/2)

near_w is the standing of the energy that the three nearest frames on each side of a frame predict (`frame_standing`);
it finds events shorter than a window. far_w leaves out the nearest frame on each side, which a spike of two frames
would need; with an extractor, far_w is the mean with the standing of the window's reconstruction (`time_energy`).
The windows at the ends of a scan have neighbours on one side only; `frame_standing` compares them with the other
windows predicted from that side alone, so that every place in the scan has the same chance.

Version 1, of datasets made before, has T_w from the window's reconstruction alone, by the extractor or by
`rebuild_by_ridge`, other `folds`, and chooses the first and the last windows too rarely.

    ranker = make_ranker("mutual", Path("extractor/"))
    score_W = ranker.scores(roi_RT, centre_R3, frames=5)

Shape suffixes: X Y Z voxels of the grid; R parcels; A, B the visible and the hidden half of them; T frames;
V views; W windows; D fold; L lags.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from scipy import linalg, ndimage

SPLITS, RHO = 4, 0.3
FOLDS, BLOCK, MARGIN = 6, 3, 3  # interleaved folds of blocks of windows; margin in frames
REACH, PENALTY = 3, 0.03  # for `rebuild_by_ridge`: frames on each side, and ridge penalty
FRAME_PENALTY = 0.3  # ridge penalty of `frame_standing`
GAP, SLACK = 1, 0.5  # of version 2: frames left out on each side in far_w; how much lower far_w may stand
LEAST_RANGE = 1e-3  # below this interquartile range, windows differ by rounding only


Folds = Callable[[int, int], list[tuple[np.ndarray, np.ndarray]]]


def window_mean(value_RT: np.ndarray, frames: int) -> np.ndarray:
    """Mean over parcels and the frames of each window: (R, T) to (W,)."""
    return value_RT.mean(axis=0, dtype=np.float64).reshape(-1, frames).mean(axis=1)


def mean_of_windows(value_RT: np.ndarray, frames: int) -> np.ndarray:
    """Mean over the frames of each window: (R, T) to (R, W)."""
    return value_RT.reshape(len(value_RT), -1, frames).mean(axis=2)


def frame_weights(z_RT: np.ndarray) -> np.ndarray:
    """Weight of each frame in covariances, min(1, 1.5 median RMS / RMS_t)^2, which limits the effect of spikes."""
    rms_T = np.sqrt(np.mean(np.square(z_RT), axis=0, dtype=np.float64))
    return np.minimum(1.0, 1.5 * np.median(rms_T) / np.maximum(rms_T, 1e-12)) ** 2


def folds(windows: int, frames: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Interleaved folds of the frames of a scan: for each fold the frames to predict, and the training frames.

    Blocks of 3 windows are assigned to 6 folds in turn. Frames within 3 frames of a fold are not used to train its
    prediction. Scans of fewer than 6 windows are divided into blocks of 2 windows or 1, so that every fold has training
    frames. Used by version 1 of the scores.
    """
    return _folds(np.arange(windows) // max(1, min(BLOCK, windows // 2)) % FOLDS, frames)


def even_folds(windows: int, frames: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """As `folds`, but of equal size, so that no window is predicted from fewer training frames than another.

    Every fold has the same number of blocks. They are of about 3 windows, and differ by one window at most.
    """
    blocks = min(windows, FOLDS * max(1, round(windows / (BLOCK * FOLDS))))
    return _folds(np.arange(windows) * blocks // windows % FOLDS, frames)


def _folds(fold_W: np.ndarray, frames: int) -> list[tuple[np.ndarray, np.ndarray]]:
    fold_T = np.repeat(fold_W, frames)
    pairs = []
    for fold in range(fold_T.max() + 1):
        tested_T = fold_T == fold
        pairs.append((tested_T, ~ndimage.binary_dilation(tested_T, iterations=MARGIN)))
    return pairs


def space_energy(z_RT: np.ndarray, frames: int, seed: int, folds: Folds = even_folds) -> np.ndarray:
    """Energy of each window that can be predicted from other parcels (S_w).

    A random half B of the parcels is predicted from the other half A, zhat_B = C_BA (C_AA + rho I)^-1 z_A, with
    rho = 0.3 and the covariance C of other frames of the scan. The energy is the mean of z^2 - (z - zhat)^2 over the
    predicted parcels, the frames of the window and 4 random splits.

    Parameters
    ----------
    z_RT : float32 array
        Standardised parcel series; T is a multiple of the window length.
    frames, seed : int
        Number of frames of a window; seed of the splits.
    folds : callable
        `even_folds`, or `folds` for version 1.

    Returns
    -------
    energy_W : float64 array
        In units of z^2; negative if the prediction is worse than predicting 0.
    """
    energy_T = np.zeros(z_RT.shape[1])
    for tested_T, _, gained_BD in _gained_in_space(z_RT, frames, seed, folds):
        energy_T[tested_T] += gained_BD.mean(axis=0, dtype=np.float64) / SPLITS
    return energy_T.reshape(-1, frames).mean(axis=1)


def space_energy_of_parcels(z_RT: np.ndarray, frames: int, seed: int, folds: Folds = even_folds) -> np.ndarray:
    """The energy of each parcel in each window that can be predicted from other parcels, float64 (R, W).

    As in `space_energy`, of the splits in which the parcel is predicted; 0 if it is in none.
    """
    energy_RT = np.zeros(z_RT.shape)
    times_RT = np.zeros(z_RT.shape)
    for tested_T, hidden, gained_BD in _gained_in_space(z_RT, frames, seed, folds):
        energy_RT[np.ix_(hidden, np.flatnonzero(tested_T))] += gained_BD
        times_RT[np.ix_(hidden, np.flatnonzero(tested_T))] += 1
    return mean_of_windows(energy_RT / np.maximum(times_RT, 1), frames)


def _gained_in_space(
    z_RT: np.ndarray, frames: int, seed: int, folds: Folds
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """For each fold and split: its frames, bool (T,), the hidden parcels, (B,), their z^2 - (z - zhat)^2, (B, D)."""
    parcels, length = z_RT.shape
    weight_T = frame_weights(z_RT).astype(z_RT.dtype)
    rng = np.random.default_rng(seed)
    orders = [rng.permutation(parcels) for _ in range(SPLITS)]
    for tested_T, known_T in folds(length // frames, frames):
        z_RD = z_RT[:, tested_T]
        known_RD = z_RT[:, known_T] * np.sqrt(weight_T[known_T] / weight_T[known_T].sum())
        cov_RR = known_RD @ known_RD.T
        for order in orders:
            hidden, seen = order[: parcels // 2], order[parcels // 2 :]
            inner_AA = cov_RR[np.ix_(seen, seen)] + RHO * np.eye(len(seen), dtype=cov_RR.dtype)
            guess_BD = cov_RR[np.ix_(hidden, seen)] @ linalg.solve(inner_AA, z_RD[seen], assume_a="pos")
            yield tested_T, hidden, z_RD[hidden] ** 2 - (z_RD[hidden] - guess_BD) ** 2


def _autocorrelation(z_RT: np.ndarray, lags: int) -> np.ndarray:
    """Mean autocorrelation of the parcels, frames weighted as in `frame_weights`; 0 beyond the scan. (L,)"""
    # Weighting both frames of each product, and dividing all lags by the same total, keeps the autocorrelation matrix
    # positive definite.
    length = z_RT.shape[1]
    tapered_RT = z_RT * np.sqrt(frame_weights(z_RT)).astype(z_RT.dtype)
    power = np.square(tapered_RT, dtype=np.float64).sum()
    corr_L = np.zeros(lags)
    for lag in range(min(lags, length)):
        corr_L[lag] = np.vdot(tapered_RT[:, lag:], tapered_RT[:, : length - lag]) / max(power, 1e-12)
    return corr_L


def rebuild_by_ridge(z_RT: np.ndarray, frames: int) -> np.ndarray:
    """Reconstruct every window from 3 frames on each side, without a trained extractor.

    All parcels share one linear interpolation, computed from their mean autocorrelation (frames are weighted as in
    `frame_weights`) with the ridge penalty 0.03. At the ends of the scan, only the frames on one side are used.

    Returns
    -------
    rebuilt_RT : float32 array
        In the units of `z_RT`.
    """
    length = z_RT.shape[1]
    corr_L = _autocorrelation(z_RT, frames + 2 * REACH)
    side = np.concatenate([np.arange(-REACH, 0), np.arange(frames, frames + REACH)])
    inside = np.arange(frames)
    rebuilt_RT = np.zeros_like(z_RT)
    for first in range(0, length, frames):
        near = side[(first + side >= 0) & (first + side < length)]
        if not len(near):
            continue  # the only window has no frames from which it could be predicted
        gram = corr_L[np.abs(near[:, None] - near)] + PENALTY * np.eye(len(near))
        weights = linalg.solve(gram, corr_L[np.abs(near[:, None] - inside)], assume_a="pos")
        rebuilt_RT[:, first : first + frames] = z_RT[:, first + near] @ weights.astype(z_RT.dtype)
    return rebuilt_RT


def time_energy(z_RT: np.ndarray, rebuilt_RT: np.ndarray, frames: int) -> np.ndarray:
    """Energy of each window that can be predicted from its neighbours (T_w): mean z^2 - (z - zhat)^2, float64 (W,)."""
    return window_mean(z_RT**2 - (z_RT - rebuilt_RT) ** 2, frames)


def frame_standing(z_RT: np.ndarray, frames: int, calm_W: np.ndarray, gap: int = 0) -> np.ndarray:
    """Standing of each window by the energy of its frames that frames near them predict.

    Each frame is predicted from 3 frames on each side, after `gap` frames that are left out, by one linear
    interpolation of all parcels as in `rebuild_by_ridge`, with the ridge penalty 0.3. The energy of a window is the
    mean of z^2 - (z - zhat)^2 times its calmness.

    Frames at the ends of the scan lack some of these neighbours, so less of their energy can be predicted. A window
    there is compared with all windows that have the neighbours it has, each predicted from these alone.

    Parameters
    ----------
    z_RT : float32 array
        Standardised parcel series; T is a multiple of the window length.
    frames : int
        Number of frames of a window.
    calm_W : float array
        From `calmness`.
    gap : int
        Frames on each side that are left out.

    Returns
    -------
    standing_W : float64 array
        In interquartile ranges above the median of the windows a window is compared with.
    """
    need = gap + REACH
    corr_L = _autocorrelation(z_RT, 2 * need + 1)
    before_W, after_W = _neighbours(z_RT.shape[1] // frames, frames, need)
    standing_W = np.zeros(len(before_W))
    for before, after in _ways(before_W, after_W):
        compared = np.flatnonzero((before_W >= before) & (after_W >= after))
        energy_W = np.zeros(len(compared))
        for gained_RW in _gained_in_time(z_RT, frames, compared, (before, after), gap, corr_L):
            energy_W += np.mean(gained_RW, axis=0, dtype=np.float64) / frames
        own = (before_W[compared] == before) & (after_W[compared] == after)
        standing_W[compared[own]] = standing(calm_W[compared] * energy_W)[own]
    return standing_W


def time_energy_of_parcels(z_RT: np.ndarray, frames: int) -> np.ndarray:
    """The energy of each parcel in each window that can be predicted from frames near them, float64 (R, W).

    As in `frame_standing`; windows at the ends of the scan are predicted from the neighbours they have.
    """
    corr_L = _autocorrelation(z_RT, 2 * REACH + 1)
    before_W, after_W = _neighbours(z_RT.shape[1] // frames, frames, REACH)
    energy_RW = np.zeros((len(z_RT), len(before_W)))
    for before, after in _ways(before_W, after_W):
        own = np.flatnonzero((before_W == before) & (after_W == after))
        for gained_RW in _gained_in_time(z_RT, frames, own, (before, after), 0, corr_L):
            energy_RW[:, own] += gained_RW / frames
    return energy_RW


def _neighbours(windows: int, frames: int, need: int) -> tuple[np.ndarray, np.ndarray]:
    """How many frames lie before and after each window, at most as many as are needed, int (W,) each."""
    before_W = np.minimum(frames * np.arange(windows), need)
    return before_W, before_W[::-1]


def _ways(before_W: np.ndarray, after_W: np.ndarray) -> list[tuple[int, int]]:
    """The different numbers of frames before and after a window; the windows of each are consecutive."""
    return sorted(set(zip(before_W.tolist(), after_W.tolist(), strict=True)))


def _gained_in_time(
    z_RT: np.ndarray, frames: int, windows: np.ndarray, around: tuple[int, int], gap: int, corr_L: np.ndarray
) -> Iterator[np.ndarray]:
    """z^2 - (z - zhat)^2 of consecutive windows, (R, W), one frame of them after the other.

    Each frame is predicted from the window and the frames around it that are counted; one without any is left out.
    """
    before, after = around
    side = np.arange(gap + 1, gap + REACH + 1)
    offset = np.concatenate([-side[::-1], side])
    for inside in range(frames):
        near = offset[(inside + offset >= -before) & (inside + offset < frames + after)]
        if not len(near):
            continue
        first, last = frames * windows[0] + inside, frames * windows[-1] + inside + 1
        gram = corr_L[np.abs(near[:, None] - near)] + FRAME_PENALTY * np.eye(len(near))
        weights = linalg.solve(gram, corr_L[np.abs(near)], assume_a="pos").astype(z_RT.dtype)
        z_RW = z_RT[:, first:last:frames]
        guess_RW = np.zeros_like(z_RW)
        for weight, shift in zip(weights, near.tolist(), strict=True):
            guess_RW += weight * z_RT[:, first + shift : last + shift : frames]
        yield z_RW**2 - (z_RW - guess_RW) ** 2


def calmness(z_RT: np.ndarray, frames: int) -> np.ndarray:
    """The smallest square root of the `frame_weights` of each window; 1 without an outlying frame. (W,)"""
    return np.sqrt(frame_weights(z_RT)).reshape(-1, frames).min(axis=1)


def standing(value_W: np.ndarray) -> np.ndarray:
    """Difference of each window from the median over the scan, in units of the interquartile range."""
    low, middle, high = np.quantile(value_W, (0.25, 0.5, 0.75))
    return (value_W - middle) / max(high - low, LEAST_RANGE)
