"""Ways to score the windows of a scan, by name.

Legend: R parcels; T frames; V views; W windows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

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
