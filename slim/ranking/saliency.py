"""Stage 1: which windows of a run deserve voxel-level compute.

The paper ranks windows by "mutual masked reconstruction" (SLIM-Brain, arXiv 2512.21881, stage 1) without a
formula. The definition here is *joint predictable energy*: a window matters if it stands out from its run by
energy that both the other parcels and the neighbouring windows can predict. A spike fails in time, an
incoherent slow burst in space, noise in both:

    joint_w = sum over the two views of  min(S_w, T_w)
    saliency_w = (joint_w-1 + 4 joint_w + joint_w+1) / 6

The views are those of `slim.ranking.extractor.standardise`. S_w and T_w are the parts of the window's energy that are
predictable in space (`space_energy`) and in time (rebuilt by the extractor, or by `rebuild_by_ridge` without
one). Each is multiplied by the weight of the window's most outlying frame (`calmness`) and then given as its
`standing` among the run's windows: the predictors are unlike, and without a common scale the smaller of them
alone decides. Neighbours count because a haemodynamic response outlasts a window.

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
REACH, PENALTY = 3, 0.03  # frames each side and ridge penalty of the training-free time part
LEAST_RANGE = 1e-3  # quartile range below which windows do not differ but by rounding


def window_mean(value_RT: np.ndarray, frames: int) -> np.ndarray:
    """Mean over parcels and the frames of each window: (R, T) to (W,)."""
    return value_RT.mean(axis=0, dtype=np.float64).reshape(-1, frames).mean(axis=1)


def frame_weights(z_RT: np.ndarray) -> np.ndarray:
    """Weight of each frame in covariances: min(1, 1.5 median RMS / RMS_t)^2, so spikes do not own them."""
    rms_T = np.sqrt(np.mean(np.square(z_RT), axis=0, dtype=np.float64))
    return np.minimum(1.0, 1.5 * np.median(rms_T) / np.maximum(rms_T, 1e-12)) ** 2


def folds(windows: int, frames: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Interleaved folds of a run's frames: the frames to predict, and those a prediction may learn from.

    Blocks of 3 windows are dealt to 6 folds in turn; what lies within 3 frames of a fold teaches it nothing.
    Runs of fewer than 6 windows are cut into blocks of 2 windows or 1, so that every fold has frames to
    learn from.
    """
    fold_T = np.repeat(np.arange(windows) // max(1, min(BLOCK, windows // 2)) % FOLDS, frames)
    pairs = []
    for fold in range(fold_T.max() + 1):
        tested_T = fold_T == fold
        pairs.append((tested_T, ~ndimage.binary_dilation(tested_T, iterations=MARGIN)))
    return pairs


def space_energy(z_RT: np.ndarray, frames: int, seed: int) -> np.ndarray:
    """Energy of each window that the other parcels predict (S_w).

    A random half B of the parcels is predicted from the other half A, zhat_B = C_BA (C_AA + rho I)^-1 z_A,
    with rho = 0.3 and the covariance C from other frames of the run only; mean of z^2 - (z - zhat)^2 over
    the hidden parcels, the window's frames and 4 random splits.

    Parameters
    ----------
    z_RT : float32 array
        Standardised parcels, T a whole number of windows.
    frames, seed : int
        Frames of a window; seed of the splits.

    Returns
    -------
    energy_W : float64 array
        In units of z^2; negative where the prediction is worse than none.
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
    """Every window rebuilt from 3 frames on each side of it, without training.

    One linear interpolation for all parcels of the run, from their mean autocorrelation (frames weighted as
    in `frame_weights`), penalty 0.03. At the ends of the run one side is missing and the other side predicts
    alone.

    Returns
    -------
    rebuilt_RT : float32 array
        In the units of `z_RT`.
    """
    length = z_RT.shape[1]
    # Weighting both frames of each product, and dividing every lag by the same total, keeps the matrix of
    # autocorrelations positive definite.
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
        gram = corr_L[np.abs(near[:, None] - near)] + PENALTY * np.eye(len(near))
        weights = linalg.solve(gram, corr_L[np.abs(near[:, None] - inside)], assume_a="pos")
        rebuilt_RT[:, first : first + frames] = z_RT[:, first + near] @ weights.astype(z_RT.dtype)
    return rebuilt_RT


def time_energy(z_RT: np.ndarray, rebuilt_RT: np.ndarray, frames: int) -> np.ndarray:
    """Energy of each window that its neighbours predict (T_w): mean of z^2 - (z - zhat)^2, float64 (W,)."""
    return window_mean(z_RT**2 - (z_RT - rebuilt_RT) ** 2, frames)


def calmness(z_RT: np.ndarray, frames: int) -> np.ndarray:
    """How calm each window is: the least root of its `frame_weights`, 1 without an outlying frame; (W,)."""
    return np.sqrt(frame_weights(z_RT)).reshape(-1, frames).min(axis=1)


def standing(value_W: np.ndarray) -> np.ndarray:
    """How far each window stands above the run's median window, in quartile ranges of the run's windows."""
    low, middle, high = np.quantile(value_W, (0.25, 0.5, 0.75))
    return (value_W - middle) / max(high - low, LEAST_RANGE)
