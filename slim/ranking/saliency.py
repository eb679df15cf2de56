"""Saliency of the windows of a scan (stage 1).

The paper ranks windows by "mutual masked reconstruction" (SLIM-Brain, arXiv 2512.21881, stage 1) without a formula.
Here saliency is defined as *joint predictable energy*: a window is salient if it exceeds the other windows of its scan
in energy that can be predicted both from other parcels and from neighbouring windows. A spike cannot be predicted in
time, an incoherent slow burst not in space, and noise in neither:

    joint_w = sum over the two views of  min(S_w, T_w)
    saliency_w = (joint_w-1 + 4 joint_w + joint_w+1) / 6

The views are those of `slim.ranking.extractor.standardise`. S_w and T_w are the parts of the window's energy that can
be predicted in space (`space_energy`) and in time (with the extractor, or with `rebuild_by_ridge`). Each is multiplied
by the weight of the window's most outlying frame (`calmness`) and standardised over the windows of the scan
(`standing`). Without a common scale, the predictor with the smaller values alone would determine the minimum. The
neighbours are included because a haemodynamic response is longer than a window.

    ranker = make_ranker("mutual", Path("extractor/"))
    score_W = ranker.scores(roi_RT, centre_R3, frames=5)

Shape suffixes: X Y Z voxels of the grid; R parcels; A, B the visible and the hidden half of them; T frames;
V views; W windows; D fold; L lags.
"""

from __future__ import annotations

import numpy as np
from scipy import linalg, ndimage

SPLITS, RHO = 4, 0.3
FOLDS, BLOCK, MARGIN = 6, 3, 3  # interleaved folds of blocks of windows; margin in frames
REACH, PENALTY = 3, 0.03  # for `rebuild_by_ridge`: frames on each side, and ridge penalty
LEAST_RANGE = 1e-3  # below this interquartile range, windows differ by rounding only


def window_mean(value_RT: np.ndarray, frames: int) -> np.ndarray:
    """Mean over parcels and the frames of each window: (R, T) to (W,)."""
    return value_RT.mean(axis=0, dtype=np.float64).reshape(-1, frames).mean(axis=1)


def frame_weights(z_RT: np.ndarray) -> np.ndarray:
    """Weight of each frame in covariances, min(1, 1.5 median RMS / RMS_t)^2, which limits the effect of spikes."""
    rms_T = np.sqrt(np.mean(np.square(z_RT), axis=0, dtype=np.float64))
    return np.minimum(1.0, 1.5 * np.median(rms_T) / np.maximum(rms_T, 1e-12)) ** 2


def folds(windows: int, frames: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Interleaved folds of the frames of a scan: for each fold the frames to predict, and the training frames.

    Blocks of 3 windows are assigned to 6 folds in turn. Frames within 3 frames of a fold are not used to train its
    prediction. Scans of fewer than 6 windows are divided into blocks of 2 windows or 1, so that every fold has training
    frames.
    """
    fold_T = np.repeat(np.arange(windows) // max(1, min(BLOCK, windows // 2)) % FOLDS, frames)
    pairs = []
    for fold in range(fold_T.max() + 1):
        tested_T = fold_T == fold
        pairs.append((tested_T, ~ndimage.binary_dilation(tested_T, iterations=MARGIN)))
    return pairs


def space_energy(z_RT: np.ndarray, frames: int, seed: int) -> np.ndarray:
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

    Returns
    -------
    energy_W : float64 array
        In units of z^2; negative if the prediction is worse than predicting 0.
    """
    parcels, length = z_RT.shape
    weight_T = frame_weights(z_RT).astype(z_RT.dtype)
    rng = np.random.default_rng(seed)
    orders = [rng.permutation(parcels) for _ in range(SPLITS)]
    energy_T = np.zeros(length)
    for tested_T, known_T in folds(length // frames, frames):
        z_RD = z_RT[:, tested_T]
        known_RD = z_RT[:, known_T] * np.sqrt(weight_T[known_T] / weight_T[known_T].sum())
        cov_RR = known_RD @ known_RD.T
        for order in orders:
            hidden, seen = order[: parcels // 2], order[parcels // 2 :]
            inner_AA = cov_RR[np.ix_(seen, seen)] + RHO * np.eye(len(seen), dtype=cov_RR.dtype)
            guess_BD = cov_RR[np.ix_(hidden, seen)] @ linalg.solve(inner_AA, z_RD[seen], assume_a="pos")
            gained_BD = z_RD[hidden] ** 2 - (z_RD[hidden] - guess_BD) ** 2
            energy_T[tested_T] += gained_BD.mean(axis=0, dtype=np.float64) / SPLITS
    return energy_T.reshape(-1, frames).mean(axis=1)


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
    # Weighting both frames of each product, and dividing all lags by the same total, keeps the autocorrelation matrix
    # positive definite.
    tapered_RT = z_RT * np.sqrt(frame_weights(z_RT)).astype(z_RT.dtype)
    power = np.square(tapered_RT, dtype=np.float64).sum()
    corr_L = np.zeros(frames + 2 * REACH)
    for lag in range(min(len(corr_L), length)):
        corr_L[lag] = np.vdot(tapered_RT[:, lag:], tapered_RT[:, : length - lag]) / max(power, 1e-12)
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


def calmness(z_RT: np.ndarray, frames: int) -> np.ndarray:
    """The smallest square root of the `frame_weights` of each window; 1 without an outlying frame. (W,)"""
    return np.sqrt(frame_weights(z_RT)).reshape(-1, frames).min(axis=1)


def standing(value_W: np.ndarray) -> np.ndarray:
    """Difference of each window from the median over the scan, in units of the interquartile range."""
    low, middle, high = np.quantile(value_W, (0.25, 0.5, 0.75))
    return (value_W - middle) / max(high - low, LEAST_RANGE)
