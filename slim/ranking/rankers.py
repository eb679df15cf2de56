"""Rankers: methods that score the windows of a scan, by name.

Legend: R parcels; T frames; V views; W windows; 3 the axes.
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
    FRAME_PENALTY,
    GAP,
    MARGIN,
    PENALTY,
    REACH,
    RHO,
    SLACK,
    SPLITS,
    calmness,
    folds,
    frame_standing,
    mean_of_windows,
    rebuild_by_ridge,
    space_energy,
    space_energy_of_parcels,
    standing,
    time_energy,
    time_energy_of_parcels,
    window_mean,
)

NEIGHBOUR = 1 / 6  # weight of each neighbouring window

MEDIAN = 5  # frames of the median filter


def _joint(ranker: Ranker, z_VRT: np.ndarray, centre_R3: np.ndarray, frames: int) -> dict[str, np.ndarray]:
    space_VW, time_VW = np.zeros((2, len(z_VRT), z_VRT.shape[2] // frames))
    for view, z_RT in enumerate(z_VRT if space_VW.shape[1] > 1 else ()):  # a window is compared with the others
        calm_W = calmness(z_RT, frames)
        space_VW[view] = standing(calm_W * space_energy(z_RT, frames, ranker.seed))
        far_W = frame_standing(z_RT, frames, calm_W, GAP)
        if ranker.extractor is not None:
            rebuilt_RT = ranker.extractor.rebuild(z_RT, centre_R3)
            far_W = (far_W + standing(calm_W * time_energy(z_RT, rebuilt_RT, frames))) / 2
        time_VW[view] = np.minimum(frame_standing(z_RT, frames, calm_W), far_W + SLACK)
    # At either end, the only neighbour counts twice: with the window itself in its place, as in version 1, the scores
    # there would vary more than the others.
    return _smoothed(space_VW, time_VW, "mirror")


def _joint_1(ranker: Ranker, z_VRT: np.ndarray, centre_R3: np.ndarray, frames: int) -> dict[str, np.ndarray]:
    space_VW, time_VW = np.zeros((2, len(z_VRT), z_VRT.shape[2] // frames))
    for view, z_RT in enumerate(z_VRT if space_VW.shape[1] > 1 else ()):
        rebuilt_RT = _rebuilt(ranker, z_RT, centre_R3, frames)
        calm_W = calmness(z_RT, frames)
        space_VW[view] = standing(calm_W * space_energy(z_RT, frames, ranker.seed, folds))
        time_VW[view] = standing(calm_W * time_energy(z_RT, rebuilt_RT, frames))
    return _smoothed(space_VW, time_VW, "nearest")


def _smoothed(space_VW: np.ndarray, time_VW: np.ndarray, mode: str) -> dict[str, np.ndarray]:
    """The smaller of both, and each of them, summed over the views and smoothed over neighbouring windows."""
    kernel = (NEIGHBOUR, 1 - 2 * NEIGHBOUR, NEIGHBOUR)
    parts = {"scores": np.minimum(space_VW, time_VW), "scores_space": space_VW, "scores_time": time_VW}
    return {name: ndimage.correlate1d(value_VW.sum(axis=0), kernel, mode=mode) for name, value_VW in parts.items()}


def _energies(ranker: Ranker, z_VRT: np.ndarray, centre_R3: np.ndarray, frames: int) -> dict[str, np.ndarray]:
    """The energies of `_joint` before its means over parcels: of near_w, since far_w only limits it. (V, R, W) each."""
    space = [space_energy_of_parcels(z_RT, frames, ranker.seed) for z_RT in z_VRT]
    time = [time_energy_of_parcels(z_RT, frames) for z_RT in z_VRT]
    return {"scores_space": np.stack(space), "scores_time": np.stack(time)}


def _energies_1(ranker: Ranker, z_VRT: np.ndarray, centre_R3: np.ndarray, frames: int) -> dict[str, np.ndarray]:
    """The energies of `_joint_1` before its means over parcels, (V, R, W) each."""
    space, time = [], []
    for z_RT in z_VRT:
        space.append(space_energy_of_parcels(z_RT, frames, ranker.seed, folds))
        time.append(mean_of_windows(z_RT**2 - (z_RT - _rebuilt(ranker, z_RT, centre_R3, frames)) ** 2, frames))
    return {"scores_space": np.stack(space), "scores_time": np.stack(time)}


def _rebuilt(ranker: Ranker, z_RT: np.ndarray, centre_R3: np.ndarray, frames: int) -> np.ndarray:
    if ranker.extractor is not None:
        return ranker.extractor.rebuild(z_RT, centre_R3)
    return rebuild_by_ridge(z_RT, frames)


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

_JOINT_1 = {**_SPACE, "neighbour": NEIGHBOUR}

_JOINT = {**_JOINT_1, "reach": REACH, "penalty": FRAME_PENALTY, "gap": GAP, "slack": SLACK}

_Score = Callable[["Ranker", np.ndarray, np.ndarray, int], dict[str, np.ndarray]]

# Of each ranker, every version that artefacts in use were made with: its function and its parameters.
_RANKERS: dict[str, dict[int, tuple[_Score, dict[str, float]]]] = {
    "mutual": {1: (_joint_1, _JOINT_1), 2: (_joint, _JOINT)},
    "ridge": {1: (_joint_1, {**_JOINT_1, **_TIME}), 2: (_joint, _JOINT)},
    "median-variance": {1: (_median_variance, {"median": MEDIAN})},
    "variance": {1: (_variance, {})},
    "leave-one-out": {1: (_leave_one_out, _TIME)},
    "uniform": {1: (_uniform, {})},
    "random": {1: (_random, {})},
}

# The energies of single parcels, of the versions whose score has parts.
_ENERGIES: dict[str, dict[int, _Score]] = {name: {1: _energies_1, 2: _energies} for name in ("mutual", "ridge")}


def versions(name: str) -> tuple[int, ...]:
    """The versions of a ranker, the newest last. ConfigError if there is no ranker of that name."""
    if name not in _RANKERS:
        raise ConfigError("ranker", "name", name, f"one of {', '.join(_RANKERS)}")
    return tuple(_RANKERS[name])


class Ranker:
    """Scores the windows of a scan. It is picklable; use `make_ranker` to make one.

    ``mutual``: joint predictable energy, predicted in space by ridge regression and in time by the extractor.
    ``ridge``: the same, without the extractor. ``variance``: mean z^2 of the window. ``median-variance``: the
    same after a median filter over 5 frames. ``leave-one-out``: mean squared error of the window reconstructed by ridge
    regression from its neighbours. ``uniform``: evenly spaced windows first. ``random``: drawn with the seed, the
    numbers of parcels and frames, and the frames of the parcels' largest deviations, so that scans of equal length
    differ. ``mutual`` and ``ridge`` have two versions; datasets and exports made before there was a second keep the
    first.
    """

    def __init__(self, name: str, extractor: Extractor | None, seed: int, version: int):
        self.name, self.extractor, self.seed, self.version = name, extractor, seed, version

    def identity(self) -> dict[str, object]:
        """What determines the scores, for a manifest: name, parameters, and checksum of the extractor or None.

        Version 1 is not named, as in the artefacts made before there was a second.
        """
        return {
            "name": self.name,
            **({"version": self.version} if self.version > 1 else {}),
            "seed": self.seed,
            **_RANKERS[self.name][self.version][1],
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
        z_VRT, kept_R = self._checked(roi_RT, centre_R3, frames)
        score, _ = _RANKERS[self.name][self.version]
        found = score(self, z_VRT, np.asarray(centre_R3)[kept_R], frames)
        return {name: value_W.astype(np.float32) for name, value_W in found.items()}

    def energies(self, roi_RT: np.ndarray, centre_R3: np.ndarray, frames: int) -> dict[str, np.ndarray]:
        """Which parcels carry the parts of the score: their predictable energy in every window.

        Parameters and errors are those of `parts`.

        Returns
        -------
        dict of float32 arrays (R, W)
            ``scores_space`` and ``scores_time``: z^2 - (z - zhat)^2 of the parcel, with zhat from other parcels or from
            frames nearby, as a mean over the frames of the window and the views; negative if the prediction is worse
            than 0, and 0 for constant parcels. Empty for a ranker whose score has no parts.
        """
        z_VRT, kept_R = self._checked(roi_RT, centre_R3, frames)
        if self.name not in _ENERGIES or z_VRT.shape[2] == frames:  # the only window has nothing to be compared with
            return {}
        found = {}
        energies = _ENERGIES[self.name][self.version]
        for name, energy_VRW in energies(self, z_VRT, np.asarray(centre_R3)[kept_R], frames).items():
            found[name] = np.zeros((len(kept_R), energy_VRW.shape[2]), np.float32)
            found[name][kept_R] = energy_VRW.mean(axis=0)
        return found

    def _checked(self, roi_RT: np.ndarray, centre_R3: np.ndarray, frames: int) -> tuple[np.ndarray, np.ndarray]:
        """The two views of the parcels that vary, (V, R, T), and which these are, bool (R,)."""
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
        return standardise(roi_RT[:, : roi_RT.shape[1] // frames * frames])


def make_ranker(
    name: str = "mutual",
    extractor: Path | str | Extractor | None = None,
    seed: int = 0,
    version: int | None = None,
) -> Ranker:
    """Make a ranker by name.

    Parameters
    ----------
    name : str
        mutual, ridge, median-variance, variance, leave-one-out, uniform or random.
    extractor : path or Extractor, optional
        The trained extractor or its folder. ``mutual`` needs it; the others do not accept it.
    seed : int
        Seed of the half-splits (``mutual``, ``ridge``) or of the draw (``random``).
    version : int, optional
        Version of the scores; the newest by default.

    Raises
    ------
    ConfigError
        If the name or the version is unknown, or the extractor is missing, not accepted or unreadable.
    """
    known = versions(name)
    version = known[-1] if version is None else version
    if version not in known:
        hint = "A newer SLIM-Brain may have it" if version > known[-1] else ""
        raise ConfigError(f"ranker {name}", "version", version, " or ".join(map(str, known)), hint)
    if name == "mutual" and extractor is None:
        hint = "Train an extractor, or use the ranker ridge, which needs none"
        raise ConfigError("ranker mutual", "extractor", "none", "the folder of a trained extractor", hint)
    if name != "mutual" and extractor is not None:
        hint = "Only the ranker mutual uses an extractor"
        raise ConfigError(f"ranker {name}", "extractor", "an extractor", "none", hint)
    if isinstance(extractor, (str, Path)):
        extractor = Extractor.load(extractor)
    return Ranker(name, extractor, seed, version)
