"""Rankers: methods that score the windows of a scan, by name.

Legend: R parcels; T frames; V views; W windows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from scipy import ndimage

from shards.core.errors import ConfigError, RunRefused
from slim.ranking.extractor import Extractor, standardise
from slim.ranking.saliency import (
    BLOCK,
    FOLDS,
    MARGIN,
    PENALTY,
    REACH,
    RHO,
    SPLITS,
    calmness,
    rebuild_by_ridge,
    space_energy,
    standing,
    time_energy,
    window_mean,
)

NEIGHBOUR = 1 / 6  # weight of each neighbouring window

MEDIAN = 5  # frames of the median filter


def _joint(ranker: Ranker, z_VRT: np.ndarray, centre_R3: np.ndarray, frames: int) -> dict[str, np.ndarray]:
    joint_W, space_W, time_W = np.zeros((3, z_VRT.shape[2] // frames))
    for z_RT in z_VRT if len(joint_W) > 1 else ():  # a window is compared with the others
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
    # Bit-reversed index (van der Corput sequence): for every k, the first k windows are spread over the scan.
    windows = z_VRT.shape[2] // frames
    bits = max(1, (windows - 1).bit_length())
    return {"scores": np.array([-int(f"{w:0{bits}b}"[::-1], 2) for w in range(windows)], dtype=np.float64)}


def _random(ranker: Ranker, z_VRT: np.ndarray, centre_R3: np.ndarray, frames: int) -> dict[str, np.ndarray]:
    # The frames of the parcels' largest deviations identify the scan, independent of sign and scale.
    print_R = np.abs(z_VRT[0]).argmax(axis=1).astype("<i8")
    named = hashlib.sha256(f"{ranker.seed} {z_VRT.shape}".encode() + print_R.tobytes()).digest()
    return {"scores": np.random.default_rng(int.from_bytes(named[:16], "little")).random(z_VRT.shape[2] // frames)}


_SPACE = {"splits": SPLITS, "rho": RHO, "folds": FOLDS, "block": BLOCK, "margin": MARGIN}

_TIME = {"reach": REACH, "penalty": PENALTY}

_JOINT = {**_SPACE, "neighbour": NEIGHBOUR}

_Score = Callable[["Ranker", np.ndarray, np.ndarray, int], dict[str, np.ndarray]]

_RANKERS: dict[str, tuple[_Score, dict[str, float]]] = {
    "mutual": (_joint, _JOINT),
    "ridge": (_joint, {**_JOINT, **_TIME}),
    "median-variance": (_median_variance, {"median": MEDIAN}),
    "variance": (_variance, {}),
    "leave-one-out": (_leave_one_out, _TIME),
    "uniform": (_uniform, {}),
    "random": (_random, {}),
}


class Ranker:
    """Scores the windows of a scan. It is picklable; use `make_ranker` to make one.

    ``mutual``: joint predictable energy, predicted in space by ridge regression and in time by the extractor.
    ``ridge``: the same, with ridge regression for both. ``variance``: mean z^2 of the window. ``median-variance``: the
    same after a median filter over 5 frames. ``leave-one-out``: mean squared error of the window reconstructed by ridge
    regression from its neighbours. ``uniform``: evenly spaced windows first. ``random``: drawn with the seed, the
    numbers of parcels and frames, and the frames of the parcels' largest deviations, so that scans of equal length
    differ.
    """

    def __init__(self, name: str, extractor: Extractor | None, seed: int):
        self.name, self.extractor, self.seed = name, extractor, seed

    def identity(self) -> dict[str, object]:
        """What determines the scores, for a manifest: name, parameters, and checksum of the extractor or None."""
        return {
            "name": self.name,
            "seed": self.seed,
            **_RANKERS[self.name][1],
            "extractor": self.extractor.checksum if self.extractor is not None else None,
        }

    def scores(self, roi_RT: np.ndarray, centre_R3: np.ndarray, frames: int) -> np.ndarray:
        """Score of every window, float32 (W,); higher is more salient. These are the ``scores`` of `parts`."""
        return self.parts(roi_RT, centre_R3, frames)["scores"]

    def parts(self, roi_RT: np.ndarray, centre_R3: np.ndarray, frames: int) -> dict[str, np.ndarray]:
        """Score of every window, and its parts in space and time. They do not depend on the sign and scale of `roi_RT`.

        Parameters
        ----------
        roi_RT : float array
            Raw parcel means in any unit. Constant parcels and frames after the last whole window are left out.
        centre_R3 : float array
            Parcel centres in mm.
        frames : int
            Number of frames of a window.

        Returns
        -------
        dict of float32 arrays (W,), W = T // frames, in time order
            ``scores``: higher is more salient. ``mutual`` and ``ridge`` also give ``scores_space`` and ``scores_time``:
            the score with only S_w, or only T_w, instead of the smaller of both. The score exceeds neither. Of the only
            window of a scan these three are 0.

        Raises
        ------
        RunRefused
            If the scan has no window, NaN or infinity, or fewer than two parcels that vary.
        ConfigError
            If the extractor was trained for another window length, or the number of centres and parcels differ.
        """
        roi_RT, centre_R3 = np.asarray(roi_RT), np.asarray(centre_R3)
        where = f"ranker {self.name}"
        if self.extractor is not None and self.extractor.config.frames != frames:
            got = f"windows of {frames} frames"
            hint = "Train an extractor for this window length"
            raise ConfigError(where, "windows.frames", got, self.extractor.config.frames, hint)
        if roi_RT.ndim != 2 or roi_RT.shape[1] < frames:
            got = f"{roi_RT.shape} parcels x frames"
            raise RunRefused(where, "frames", got, f"at least a window of {frames} frames")
        if centre_R3.shape != (len(roi_RT), 3):
            raise ConfigError(where, "centres", centre_R3.shape, (len(roi_RT), 3))
        z_VRT, kept_R = standardise(roi_RT[:, : roi_RT.shape[1] // frames * frames])
        score, _ = _RANKERS[self.name]
        found = score(self, z_VRT, centre_R3[kept_R], frames)
        return {name: value_W.astype(np.float32) for name, value_W in found.items()}


def make_ranker(name: str = "mutual", extractor: Path | str | Extractor | None = None, seed: int = 0) -> Ranker:
    """Make a ranker by name.

    Parameters
    ----------
    name : str
        mutual, ridge, median-variance, variance, leave-one-out, uniform or random.
    extractor : path or Extractor, optional
        The trained extractor or its folder. ``mutual`` needs it; the others do not accept it.
    seed : int
        Seed of the half-splits (``mutual``, ``ridge``) or of the draw (``random``).

    Raises
    ------
    ConfigError
        If the name is unknown, or the extractor is missing, not accepted or unreadable.
    """
    if name not in _RANKERS:
        raise ConfigError("ranker", "name", name, f"one of {', '.join(_RANKERS)}")
    if name == "mutual" and extractor is None:
        hint = "Train an extractor, or use the ranker ridge, which needs none"
        raise ConfigError("ranker mutual", "extractor", "none", "the folder of a trained extractor", hint)
    if name != "mutual" and extractor is not None:
        hint = "Only the ranker mutual uses an extractor"
        raise ConfigError(f"ranker {name}", "extractor", "an extractor", "none", hint)
    if isinstance(extractor, (str, Path)):
        extractor = Extractor.load(extractor)
    return Ranker(name, extractor, seed)
