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

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from scipy import linalg, ndimage

from shards.core.errors import ConfigError, RunRefused
from slim.ranking.extractor import Extractor, standardise

SPLITS, RHO = 4, 0.3
FOLDS, BLOCK, MARGIN = 6, 3, 3  # interleaved folds of blocks of windows; margin in frames
REACH, PENALTY = 3, 0.03  # frames each side and ridge penalty of the training-free time part
NEIGHBOUR = 1 / 6  # weight of each neighbouring window
LEAST_RANGE = 1e-3  # quartile range below which windows do not differ but by rounding
MEDIAN = 5  # frames of the median filter


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


def _joint(ranker: Ranker, z_VRT: np.ndarray, centre_R3: np.ndarray, frames: int) -> dict[str, np.ndarray]:
    joint_W, space_W, time_W = np.zeros((3, z_VRT.shape[2] // frames))
    for z_RT in z_VRT:
        if ranker.extractor is not None:
            rebuilt_RT = ranker.extractor.rebuild(z_RT, centre_R3)
        else:
            rebuilt_RT = rebuild_by_ridge(z_RT, frames)
        calm_W = calmness(z_RT, frames)
        by_space_W = standing(calm_W * space_energy(z_RT, frames, ranker.seed))
        by_time_W = standing(calm_W * time_energy(z_RT, rebuilt_RT, frames))
        joint_W += np.minimum(by_space_W, by_time_W)
        space_W += by_space_W
        time_W += by_time_W
    kernel = (NEIGHBOUR, 1 - 2 * NEIGHBOUR, NEIGHBOUR)
    parts = {"scores": joint_W, "scores_space": space_W, "scores_time": time_W}
    return {name: ndimage.correlate1d(value_W, kernel, mode="nearest") for name, value_W in parts.items()}


def _variance(ranker: Ranker, z_VRT: np.ndarray, centre_R3: np.ndarray, frames: int) -> dict[str, np.ndarray]:
    return {"scores": window_mean(z_VRT[0] ** 2, frames)}


def _median_variance(ranker: Ranker, z_VRT: np.ndarray, centre_R3: np.ndarray, frames: int) -> dict[str, np.ndarray]:
    return {"scores": window_mean(ndimage.median_filter(z_VRT[0], (1, MEDIAN)) ** 2, frames)}


def _leave_one_out(ranker: Ranker, z_VRT: np.ndarray, centre_R3: np.ndarray, frames: int) -> dict[str, np.ndarray]:
    return {"scores": window_mean((z_VRT[0] - rebuild_by_ridge(z_VRT[0], frames)) ** 2, frames)}


def _uniform(ranker: Ranker, z_VRT: np.ndarray, centre_R3: np.ndarray, frames: int) -> dict[str, np.ndarray]:
    # The bit-reversed index (van der Corput): the first k of it are spread over the run, whatever k.
    windows = z_VRT.shape[2] // frames
    bits = max(1, (windows - 1).bit_length())
    return {"scores": np.array([-int(f"{w:0{bits}b}"[::-1], 2) for w in range(windows)], dtype=np.float64)}


def _random(ranker: Ranker, z_VRT: np.ndarray, centre_R3: np.ndarray, frames: int) -> dict[str, np.ndarray]:
    # The frame of each parcel's largest deviation names the run, and knows neither its sign nor its scale.
    print_R = np.abs(z_VRT[0]).argmax(axis=1).astype("<i8")
    named = hashlib.sha256(f"{ranker.seed} {z_VRT.shape}".encode() + print_R.tobytes()).digest()
    return {"scores": np.random.default_rng(int.from_bytes(named[:16], "little")).random(z_VRT.shape[2] // frames)}


_SPACE = {"splits": SPLITS, "rho": RHO, "folds": FOLDS, "block": BLOCK, "margin": MARGIN}
_TIME = {"reach": REACH, "penalty": PENALTY}
_JOINT = {**_SPACE, "neighbour": NEIGHBOUR}
_Score = Callable[["Ranker", np.ndarray, np.ndarray, int], dict[str, np.ndarray]]
_RANKERS: dict[str, tuple[_Score, dict[str, Any]]] = {
    "mutual": (_joint, _JOINT),
    "ridge": (_joint, {**_JOINT, **_TIME}),
    "median-variance": (_median_variance, {"median": MEDIAN}),
    "variance": (_variance, {}),
    "leave-one-out": (_leave_one_out, _TIME),
    "uniform": (_uniform, {}),
    "random": (_random, {}),
}


class Ranker:
    """A way to score the windows of a run; small and picklable. Made by `make_ranker`.

    ``mutual``: joint predictable energy, space by ridge and time by the extractor. ``ridge``: both by ridge.
    ``variance``: mean z^2 of the window. ``median-variance``: the same after a median filter over 5 frames.
    ``leave-one-out``: mean squared error of the window rebuilt by ridge from its neighbours. ``uniform``:
    evenly spaced windows first. ``random``: drawn from the seed, the numbers of parcels and frames, and the
    frames of the parcels' largest deviations, so that runs of one length differ.
    """

    def __init__(self, name: str, extractor: Extractor | None, seed: int):
        self.name, self.extractor, self.seed = name, extractor, seed

    def identity(self) -> dict[str, Any]:
        """What decides the scores, for a manifest: name, parameters, and the extractor's checksum or None."""
        return {
            "name": self.name,
            "seed": self.seed,
            **_RANKERS[self.name][1],
            "extractor": self.extractor.checksum if self.extractor is not None else None,
        }

    def scores(self, roi_RT: np.ndarray, centre_R3: np.ndarray, frames: int) -> np.ndarray:
        """Score of every window, float32 (W,), higher = more salient: ``scores`` of `parts`."""
        return self.parts(roi_RT, centre_R3, frames)["scores"]

    def parts(self, roi_RT: np.ndarray, centre_R3: np.ndarray, frames: int) -> dict[str, np.ndarray]:
        """Score of every window and what limits it; independent of the sign and scale of `roi_RT`.

        Parameters
        ----------
        roi_RT : float array
            Raw parcel means in any unit. Constant parcels are left out, and so are frames after the last
            whole window.
        centre_R3 : float array
            Parcel centres in mm.
        frames : int
            Frames of a window.

        Returns
        -------
        dict of float32 arrays (W,), W = T // frames, in time order
            ``scores``: higher = more salient. ``mutual`` and ``ridge`` also ``scores_space`` and
            ``scores_time``: the same with S_w alone and with T_w alone in place of the smaller of both, in the
            units of the score, which exceeds neither.

        Raises
        ------
        RunRefused
            For a run of fewer than two windows, NaN or infinity, or fewer than two parcels that vary.
        ConfigError
            If the extractor was trained for windows of another length, or the centres are not one per parcel.
        """
        roi_RT, centre_R3 = np.asarray(roi_RT), np.asarray(centre_R3)
        where = f"ranker {self.name}"
        if self.extractor is not None and self.extractor.config.frames != frames:
            got = f"windows of {frames} frames"
            hint = "Train an extractor for this window length"
            raise ConfigError(where, "windows.frames", got, self.extractor.config.frames, hint)
        if roi_RT.ndim != 2 or roi_RT.shape[1] < 2 * frames:
            got = f"{roi_RT.shape} parcels x frames"
            raise RunRefused(where, "frames", got, f"at least 2 windows of {frames} frames")
        if centre_R3.shape != (len(roi_RT), 3):
            raise ConfigError(where, "centres", centre_R3.shape, (len(roi_RT), 3))
        z_VRT, kept_R = standardise(roi_RT[:, : roi_RT.shape[1] // frames * frames])
        score, _ = _RANKERS[self.name]
        found = score(self, z_VRT, centre_R3[kept_R], frames)
        return {name: value_W.astype(np.float32) for name, value_W in found.items()}


def make_ranker(name: str = "mutual", extractor: Path | str | Extractor | None = None, seed: int = 0) -> Ranker:
    """A ranker by name.

    Parameters
    ----------
    name : str
        mutual, ridge, median-variance, variance, leave-one-out, uniform or random.
    extractor : path or Extractor, optional
        The trained extractor, or its folder: required by ``mutual``, refused by the others.
    seed : int
        Seed of the half-splits (``mutual``, ``ridge``) or of the draw (``random``).

    Raises
    ------
    ConfigError
        For an unknown name, a missing or needless extractor, or one that cannot be read.
    """
    if name not in _RANKERS:
        raise ConfigError("ranker", "name", name, f"one of {', '.join(_RANKERS)}")
    if name == "mutual" and extractor is None:
        hint = "Train one, or take the training-free ranker ridge"
        raise ConfigError("ranker mutual", "extractor", "none", "a trained extractor's folder", hint)
    if name != "mutual" and extractor is not None:
        raise ConfigError(f"ranker {name}", "extractor", "one", "none", "Only mutual takes an extractor")
    if isinstance(extractor, (str, Path)):
        extractor = Extractor.load(extractor)
    return Ranker(name, extractor, seed)
