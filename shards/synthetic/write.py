"""A synthetic BIDS-derivative cohort in MNI space whose events, artefacts, traits and fingerprints are known.

    python tools/make_cohort.py --out cohort --subjects 24 --sessions 2

What is planted where, so that a method can be scored by what it finds:

- the *mean image* tells who a person is (smooth anatomical variation), and nothing about the traits;
- the *connectivity* among twelve overlapping networks tells who a person is (shared by a subject's sessions)
  and carries both traits, `group` and `score`; each network's variance is the same in everyone;
- *events* (a state of the brain, two networks for a few seconds, through a haemodynamic response) and *artefacts*
  (motion of a frame or two) are listed with their times in `truth.json`; events also as BIDS `events.tsv`.

Every random number is drawn from (seed, purpose, subject, session) alone, so a run's files do not depend on
how many other subjects there are. `cohort.yaml` is written last: where it exists, the cohort is complete.

    DIR/README  dataset_description.json  participants.tsv (and .json)  truth.json  cohort.yaml  .bidsignore
    DIR/sub-01/ses-1/func/
        sub-01_ses-1_task-rest_space-MNI152NLin2009cAsym_desc-preproc_bold.nii.gz (and .json)
        sub-01_ses-1_task-rest_space-MNI152NLin2009cAsym_desc-brain_mask.nii.gz
        sub-01_ses-1_task-rest_desc-confounds_timeseries.tsv
        sub-01_ses-1_task-rest_events.tsv

Shape suffixes: T frames, D steps of `STEP_S` seconds, V voxels inside the mask, XYZ the grid, N networks, K
spatial patterns (networks and nuisances), 3 coordinates in mm, 6 motion parameters (translations in mm,
rotations in rad).
"""

from __future__ import annotations

import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pandas as pd
import yaml
from nibabel.affines import apply_affine
from nilearn.datasets import load_mni152_brain_mask, load_mni152_gm_template
from nilearn.glm.first_level import glover_hrf
from scipy.ndimage import gaussian_filter, gaussian_filter1d, map_coordinates
from scipy.signal import fftconvolve

from shards.core.errors import ConfigError
from shards.format import layout

SPACE = "MNI152NLin2009cAsym"
GENERATOR = "SLIM-Brain synthetic cohort"
RECIPE = 2  # raise it when the same parameters no longer give the same bytes
_README = "A synthetic cohort of SLIM-Brain (tools/make_cohort.py): nobody was scanned. See truth.json.\n"
_COLUMNS = {
    "group": {"Description": "trait of the subject, in its connectivity", "Levels": {"A": "group A", "B": "group B"}},
    "score": {"Description": "trait of the subject, in its connectivity", "Units": "arbitrary"},
}
# What BIDS has no name for; fMRIPrep's .bidsignore names its confounds, too.
_NOT_BIDS = ("cohort.yaml", "truth.json", "*_timeseries.tsv")


def _both(x: int, y: int, z: int) -> list[tuple[int, int, int]]:
    """A focus in either hemisphere."""
    return [(-x, y, z), (x, y, z)]


# Foci of each network, MNI mm.
NETWORKS: dict[str, list[tuple[int, int, int]]] = {
    "visual": [*_both(10, -90, 2), *_both(40, -74, -2)],
    "somatomotor-hand": [*_both(38, -26, 56), (0, -18, 62)],
    "somatomotor-face": [*_both(54, -8, 32)],
    "auditory": [*_both(54, -22, 8)],
    "dorsal-attention": [*_both(26, -60, 54), *_both(26, -4, 54)],
    "salience": [(0, 18, 42), *_both(38, 18, -2), *_both(28, 46, 26)],
    "frontoparietal-left": [(-42, 26, 32), (-46, -52, 46), (-58, -44, -8)],
    "frontoparietal-right": [(42, 26, 32), (46, -52, 46), (58, -44, -8)],
    "default": [(0, -54, 28), (0, 52, 2), *_both(46, -66, 32)],
    "limbic": [*_both(24, -8, -22), *_both(38, 10, -34), (0, 34, -18)],
    "subcortical": [*_both(12, -18, 8), *_both(22, 4, 2)],
    "cerebellar": [*_both(28, -66, -38), (0, -58, -20)],
}
# Mean correlations in the population; pairs that are not named have `USUAL_CORRELATION`.
USUAL_CORRELATION = 0.05
CORRELATIONS = {
    ("visual", "somatomotor-hand"): 0.3,
    ("visual", "auditory"): 0.2,
    ("visual", "dorsal-attention"): 0.3,
    ("somatomotor-hand", "somatomotor-face"): 0.4,
    ("somatomotor-face", "auditory"): 0.4,
    ("dorsal-attention", "salience"): 0.2,
    ("frontoparietal-left", "frontoparietal-right"): 0.4,
    ("default", "limbic"): 0.2,
    ("default", "dorsal-attention"): -0.3,
    ("default", "salience"): -0.2,
    ("subcortical", "cerebellar"): 0.3,
}
# What an event is: networks that rise together. No pair of them carries a trait.
STATES = {
    "look": ("visual", "dorsal-attention"),
    "move": ("somatomotor-hand", "subcortical"),
    "listen": ("auditory", "somatomotor-face"),
    "think": ("frontoparietal-left", "frontoparietal-right"),
    "remember": ("default", "limbic"),
    "startle": ("salience", "cerebellar"),
}
# A trait raises three pairs and lowers three, and each network is in one pair only: so the matrix bears large
# effects and stays positive definite. The pairs lie apart in the brain, because where two maps overlap their
# correlation would show in a voxel's variance.
TRAIT_PAIRS: dict[str, list[tuple[str, str, int]]] = {
    "group": [
        ("visual", "salience", 1),
        ("somatomotor-hand", "cerebellar", -1),
        ("somatomotor-face", "default", 1),
        ("auditory", "dorsal-attention", -1),
        ("frontoparietal-left", "subcortical", 1),
        ("frontoparietal-right", "limbic", -1),
    ],
    "score": [
        ("visual", "somatomotor-face", 1),
        ("somatomotor-hand", "salience", -1),
        ("auditory", "default", 1),
        ("dorsal-attention", "cerebellar", -1),
        ("frontoparietal-left", "limbic", 1),
        ("frontoparietal-right", "subcortical", -1),
    ],
}
GROUP_EFFECT = 0.25  # on a pair's correlation, + in one group and - in the other
SCORE_EFFECT = 0.38  # the same per unit of the score
GROUPS = ("A", "B")
FINGERPRINT_SD = 0.22  # of a pair's correlation over subjects, traits apart

STEP_S = 0.1  # neural activity is drawn at this step, whatever the TR
HRF_S = 32.0  # length of the haemodynamic response, hence of the lead-in before frame 0
EVENT_EVERY_S, ARTEFACT_EVERY_FRAMES = 20.0, 40
FOCUS_SD_MM = 13.0
BASELINE = 10_000.0
ANATOMY_SD, SESSION_SD = 0.08, 0.01  # of the baseline's logarithm
NETWORK_PERCENT, GLOBAL_PERCENT, DRIFT_PERCENT = 1.0, 0.3, 0.3  # SD of a voxel, percent of its baseline
NOISE_FWHM_MM, NOISE_TIME_S = 6.0, 0.8
RESIDUAL_MOTION = 0.3  # share of a displacement that realignment leaves in the data
HEAD_RADIUS_MM = 50.0  # Power et al. 2012: rotations as arc length on a sphere
SLOPE, INTERCEPT = 0.5, 12_000.0  # exact in binary, so the background reads back as exactly 0


@dataclass(frozen=True)
class SyntheticCohort:
    """Size and sampling of a synthetic cohort.

    Parameters
    ----------
    subjects, sessions, frames : int
        Subjects, sessions of each, frames of each session (at least 20).
    voxel_mm : float
        Edge of a voxel, 1 to 20 mm.
    tr : float
        Repetition time, seconds, at most 10.
    snr : float
        RMS over the brain of network activity, over the SD of the noise, of a voxel.
    seed : int
        At least 0.

    Raises
    ------
    ConfigError
        If a value is out of range.
    """

    subjects: int = 24
    sessions: int = 2
    frames: int = 120
    voxel_mm: float = 8.0
    tr: float = 0.72
    snr: float = 0.9
    seed: int = 0

    def __post_init__(self) -> None:
        for name, good, expected in (
            ("subjects", self.subjects >= 1, "at least 1"),
            ("sessions", self.sessions >= 1, "at least 1"),
            ("frames", 20 <= self.frames <= 32_767, "20 to 32767, what a NIfTI-1 header can hold"),
            ("voxel-mm", 1 <= self.voxel_mm <= 20, "1 to 20 mm"),
            ("tr", 0 < self.tr <= 10, "more than 0 and at most 10 s"),
            ("snr", 0 < self.snr < float("inf"), "a number above 0"),
            ("seed", self.seed >= 0, "at least 0"),
        ):
            if not good:
                got = getattr(self, name.replace("-", "_"))
                raise ConfigError("command line", f"--{name}", got, expected)

    def runs(self) -> list[tuple[int, int]]:
        """(subject, session) of every run, both counted from 1."""
        return [(i, j) for i in range(1, self.subjects + 1) for j in range(1, self.sessions + 1)]


@dataclass(frozen=True)
class Anatomy:
    """What all subjects share: the grid, the mask, a template and the networks' maps.

    `template_V` is the mean image in scanner units, `grey_V` the share of grey matter (0-1), and `map_NV` the
    percent of its baseline by which a voxel moves per SD of a network's activity.
    """

    affine: np.ndarray
    mask_XYZ: np.ndarray
    mm_V3: np.ndarray
    grey_V: np.ndarray
    template_V: np.ndarray
    map_NV: np.ndarray


def _rng(seed: int, purpose: str, *indices: int) -> np.random.Generator:
    """A generator of its own for each purpose: drawing more for one changes no other."""
    return np.random.default_rng([seed, zlib.crc32(purpose.encode()), *indices])


def _smooth_field(rng: np.random.Generator, mm_V3: np.ndarray) -> np.ndarray:
    """A random field (V,) of unit SD with wavelengths of 50-120 mm, the same at any voxel size."""
    waves = 32
    field_V = np.zeros(len(mm_V3), np.float32)
    for _ in range(waves):
        direction = rng.standard_normal(3)
        wave = direction / np.linalg.norm(direction) * (2 * np.pi / rng.uniform(50, 120))
        field_V += np.cos(mm_V3 @ wave + rng.uniform(0, 2 * np.pi))
    return field_V * np.float32(np.sqrt(2 / waves))


@lru_cache(maxsize=2)
def anatomy(voxel_mm: float) -> Anatomy:
    """The MNI152 brain on an RAS+ grid of cubes of `voxel_mm`, with one voxel of margin at least."""
    resolution = 1 if voxel_mm < 2 else 2
    brain, grey = load_mni152_brain_mask(resolution), load_mni152_gm_template(resolution)
    inside = np.asarray(brain.dataobj) > 0
    brain_mm = apply_affine(brain.affine, np.argwhere(inside))
    low = np.floor(brain_mm.min(0) / voxel_mm).astype(int) - 1
    high = np.ceil(brain_mm.max(0) / voxel_mm).astype(int) + 1
    shape = tuple(int(n) for n in high - low + 1)
    affine = np.diag([voxel_mm, voxel_mm, voxel_mm, 1.0])
    affine[:3, 3] = low * voxel_mm  # voxel centres at multiples of the voxel size: one lies on the midline

    mm_3XYZ = np.moveaxis(apply_affine(affine, np.moveaxis(np.indices(shape), 0, -1)), -1, 0)
    source = apply_affine(np.linalg.inv(brain.affine), mm_3XYZ.reshape(3, -1).T).T.reshape(mm_3XYZ.shape)
    mask_XYZ = map_coordinates(inside.astype(np.float32), source, order=1) >= 0.5
    # Smoothed to the new voxel size first: a coarse grid averages the tissue instead of picking from it.
    sigma = max(NOISE_FWHM_MM, voxel_mm) / 2.355 / resolution
    blurred = gaussian_filter(np.asarray(grey.dataobj, dtype=np.float32), sigma)
    grey_V = np.clip(map_coordinates(blurred, source, order=1)[mask_XYZ], 0, 1)
    mm_V3 = mm_3XYZ[:, mask_XYZ].T.astype(np.float32)

    # Grey matter is brighter in EPI than white matter; signal is lost above the sinuses and the ear canals.
    loss_V = 0.4 * _blobs([(0, 40, -20), *_both(50, -10, -34)], mm_V3)
    template_V = BASELINE * (0.8 + 0.35 * grey_V) * (1 - loss_V)
    map_NV = np.stack([_blobs(foci, mm_V3) for foci in NETWORKS.values()]) * (0.25 + 0.75 * grey_V)
    map_NV *= NETWORK_PERCENT / np.sqrt((map_NV**2).sum(0).mean())
    return Anatomy(affine, mask_XYZ, mm_V3, grey_V, template_V.astype(np.float32), map_NV.astype(np.float32))


def _blobs(foci: list[tuple[int, int, int]], mm_V3: np.ndarray) -> np.ndarray:
    """The largest of the Gaussians (V,) around `foci`, 1 at each focus."""
    nearest_V = np.min([((mm_V3 - np.asarray(focus, np.float32)) ** 2).sum(1) for focus in foci], axis=0)
    return np.exp(-nearest_V / (2 * FOCUS_SD_MM**2))


def traits(seed: int, subject: int) -> tuple[str, float]:
    """A subject's `group` and `score`; subjects 1 and 2, 3 and 4 ... are of different groups."""
    flip = int(_rng(seed, "group", (subject - 1) // 2).integers(2))
    score = float(np.clip(_rng(seed, "score", subject).standard_normal(), -2, 2))
    return GROUPS[(subject + flip) % 2], round(score, 4)


def connectivity(seed: int, subject: int) -> np.ndarray:
    """A subject's correlations among the networks, (N, N): population, fingerprint and traits together."""
    index = {name: i for i, name in enumerate(NETWORKS)}
    count = len(index)
    corr_NN = np.full((count, count), USUAL_CORRELATION)
    for (a, b), value in CORRELATIONS.items():
        corr_NN[index[a], index[b]] = corr_NN[index[b], index[a]] = value
    upper = np.triu(_rng(seed, "fingerprint", subject).normal(0, FINGERPRINT_SD, (count, count)), 1)
    corr_NN += upper + upper.T
    group, score = traits(seed, subject)
    effects = {"group": GROUP_EFFECT if group == GROUPS[0] else -GROUP_EFFECT, "score": SCORE_EFFECT * score}
    for trait, effect in effects.items():
        for a, b, sign in TRAIT_PAIRS[trait]:
            corr_NN[index[a], index[b]] += sign * effect
            corr_NN[index[b], index[a]] += sign * effect
    np.fill_diagonal(corr_NN, 1.0)
    values, vectors = np.linalg.eigh(corr_NN)
    corr_NN = (vectors * np.maximum(values, 0.05)) @ vectors.T
    sd_N = np.sqrt(np.diag(corr_NN))
    return corr_NN / np.outer(sd_N, sd_N)


def planted(cohort: SyntheticCohort, subject: int, session: int) -> dict[str, list[dict[str, Any]]]:
    """The events and artefacts of a run, as they stand in `truth.json`.

    Returns
    -------
    dict
        `events`: state, its networks, onset_s after frame 0, length_s, amplitude (peak of the response in SDs of the
        networks' ongoing activity). `artefacts`: kind (`rim`: motion; `global`: motion and a drop of the
        whole brain's signal), frame (counted from 0), frames (1 or 2).
    """
    rng = _rng(cohort.seed, "events", subject, session)
    seconds = cohort.frames * cohort.tr
    usable = max(seconds - 8, seconds / 2)  # the response peaks some five seconds after the onset
    count = max(1, round(seconds / EVENT_EVERY_S))
    events = []
    for k in range(count):
        state = str(rng.choice(list(STATES)))
        events.append(
            {
                "state": state,
                "networks": list(STATES[state]),
                "onset_s": round(usable * (k + rng.uniform(0.05, 0.75)) / count, 2),
                "length_s": round(rng.uniform(1.5, 5), 2),
                "amplitude": round(rng.uniform(1.8, 3), 2),
            }
        )

    rng = _rng(cohort.seed, "artefacts", subject, session)
    count = max(1, round(cohort.frames / ARTEFACT_EVERY_FRAMES))
    artefacts = []
    for k in range(count):
        first, last = (cohort.frames * (k + share) / count for share in (0.15, 0.85))
        artefacts.append(
            {
                "kind": str(rng.choice(["rim", "global"])),
                "frame": int(rng.uniform(first, last)),
                "frames": int(rng.integers(1, 3)),
            }
        )
    return {"events": events, "artefacts": artefacts}


def network_activity(cohort: SyntheticCohort, subject: int, session: int) -> np.ndarray:
    """BOLD activity of the networks, (T, N) float32: ongoing (SD 1) plus the planted events."""
    hrf = glover_hrf(STEP_S, 1, HRF_S)
    lead = len(hrf)
    steps = int(np.ceil(cohort.frames * cohort.tr / STEP_S)) + 1
    # White neural activity: the haemodynamic response alone makes it slow.
    rng = _rng(cohort.seed, "ongoing", subject, session)
    white_DN = rng.standard_normal((lead + steps, len(NETWORKS)))
    neural_DN = white_DN @ np.linalg.cholesky(connectivity(cohort.seed, subject)).T
    ongoing_DN = fftconvolve(neural_DN, hrf[:, None], axes=0)[lead : lead + steps] / np.sqrt((hrf**2).sum())

    for event in planted(cohort, subject, session)["events"]:
        onset, length = round(event["onset_s"] / STEP_S), round(event["length_s"] / STEP_S)
        response = np.convolve(np.ones(length), hrf)
        response *= event["amplitude"] / response.max()
        columns = [list(NETWORKS).index(name) for name in event["networks"]]
        end = min(onset + len(response), steps)
        ongoing_DN[onset:end, columns] += response[: end - onset, None]
    seconds_T, seconds_D = np.arange(cohort.frames) * cohort.tr, np.arange(steps) * STEP_S
    return np.stack([np.interp(seconds_T, seconds_D, x_D) for x_D in ongoing_DN.T], axis=1).astype(np.float32)


def motion(cohort: SyntheticCohort, subject: int, session: int) -> np.ndarray:
    """Position of the head, (T, 6), in mm and rad: a slow wander plus the planted artefacts."""
    rng = _rng(cohort.seed, "motion", subject, session)
    step_6 = np.repeat([0.02, 0.0003], 3)
    motion_T6 = np.zeros((cohort.frames, 6))
    for t in range(1, cohort.frames):
        motion_T6[t] = 0.98 * motion_T6[t - 1] + step_6 * rng.standard_normal(6)
    for artefact in planted(cohort, subject, session)["artefacts"]:
        way_23 = rng.standard_normal((2, 3))
        way_23 *= rng.uniform(1, 2) / np.linalg.norm(way_23, axis=1, keepdims=True)  # 1-2 mm, 0.01-0.02 rad
        jolt_6 = np.concatenate([way_23[0], 0.01 * way_23[1]])
        motion_T6[artefact["frame"] : artefact["frame"] + artefact["frames"]] += jolt_6
    return motion_T6


def framewise_displacement(motion_T6: np.ndarray) -> np.ndarray:
    """Framewise displacement (T,) in mm of Power et al. 2012; the first frame has none and is NaN."""
    moved_T6 = np.abs(np.diff(motion_T6, axis=0)) * np.repeat([1.0, HEAD_RADIUS_MM], 3)
    return np.concatenate([[np.nan], moved_T6.sum(1)])


def baseline(cohort: SyntheticCohort, subject: int, session: int) -> np.ndarray:
    """Mean image (V,) of a subject in a session, scanner units: it tells the person, and no trait."""
    brain = anatomy(cohort.voxel_mm)
    person_V = ANATOMY_SD * _smooth_field(_rng(cohort.seed, "anatomy", subject), brain.mm_V3)
    day_V = SESSION_SD * _smooth_field(_rng(cohort.seed, "session", subject, session), brain.mm_V3)
    return brain.template_V * np.exp(person_V + day_V)


def _motion_patterns(brain: Anatomy, baseline_V: np.ndarray) -> np.ndarray:
    """Percent by which voxels change per mm of translation and rad of rotation, (6, V), most at the rim."""
    volume_XYZ = np.zeros(brain.mask_XYZ.shape, np.float32)
    volume_XYZ[brain.mask_XYZ] = baseline_V
    mm = float(brain.affine[0, 0])
    slope_XYZ = np.gradient(gaussian_filter(volume_XYZ, 4.0 / mm), mm)
    slope_V3 = np.stack([axis_XYZ[brain.mask_XYZ] for axis_XYZ in slope_XYZ], axis=1)
    ways_V3 = [np.broadcast_to(axis, brain.mm_V3.shape) for axis in np.eye(3)]
    ways_V3 += [np.cross(axis, brain.mm_V3) for axis in np.eye(3)]
    change_6V = np.stack([-(slope_V3 * way_V3).sum(1) for way_V3 in ways_V3])
    return (100 * RESIDUAL_MOTION * change_6V / baseline_V).astype(np.float32)


def _courses(
    cohort: SyntheticCohort, subject: int, session: int, baseline_V: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """All but the noise: time courses (T, K) and the patterns (K, V), in percent, that they drive."""
    brain = anatomy(cohort.voxel_mm)
    rng = _rng(cohort.seed, "nuisance", subject, session)
    global_T = gaussian_filter1d(rng.standard_normal(cohort.frames + 100), 4 / cohort.tr)[50:-50]
    global_T *= GLOBAL_PERCENT / global_T.std()
    for artefact in planted(cohort, subject, session)["artefacts"]:
        if artefact["kind"] == "global":
            global_T[artefact["frame"] : artefact["frame"] + artefact["frames"]] -= rng.uniform(2, 3.5)
    share_T = (np.arange(cohort.frames) + 0.5) / cohort.frames
    drift_T2 = np.cos(np.pi * np.outer(share_T, [1, 2]))

    course_TK = np.column_stack(
        [network_activity(cohort, subject, session), global_T, drift_T2, motion(cohort, subject, session)]
    )
    pattern_KV = np.concatenate(
        [
            brain.map_NV,
            (0.7 + 0.6 * brain.grey_V)[None],
            [DRIFT_PERCENT * _smooth_field(rng, brain.mm_V3) for _ in range(2)],
            _motion_patterns(brain, baseline_V),
        ]
    )
    return course_TK.astype(np.float32), pattern_KV.astype(np.float32)


def run_frames(cohort: SyntheticCohort, subject: int, session: int) -> Iterator[np.ndarray]:
    """The frames of a run, each (V,) float32 in scanner units, one by one: memory never holds a whole run."""
    brain, baseline_V = anatomy(cohort.voxel_mm), baseline(cohort, subject, session)
    course_TK, pattern_KV = _courses(cohort, subject, session, baseline_V)
    rng = _rng(cohort.seed, "noise", subject, session)
    sigma = NOISE_FWHM_MM / 2.355 / cohort.voxel_mm
    impulse = gaussian_filter1d(np.eye(1, 129, 64)[0], sigma)
    unit = (impulse**2).sum() ** 1.5  # SD of white noise after the three-dimensional filter
    lag = np.exp(-cohort.tr / NOISE_TIME_S)
    noise_V: np.ndarray | None = None
    for course_K in course_TK:
        white_XYZ = rng.standard_normal(brain.mask_XYZ.shape, np.float32)
        fresh_V = gaussian_filter(white_XYZ, sigma, mode="wrap")[brain.mask_XYZ] / np.float32(unit)
        noise_V = fresh_V if noise_V is None else lag * noise_V + np.sqrt(1 - lag**2) * fresh_V
        percent_V = course_K @ pattern_KV + noise_V * (NETWORK_PERCENT / cohort.snr)
        yield (baseline_V * (1 + percent_V / 100)).astype(np.float32)


@contextmanager
def _gzip(path: Path) -> Iterator[gzip.GzipFile]:
    """A gzip file without name and time of day in it: the same content is the same bytes."""
    with layout.atomically(path) as file, gzip.GzipFile("", "wb", compresslevel=1, fileobj=file, mtime=0) as packed:
        yield packed


def _write_table(path: Path, table: pd.DataFrame) -> None:
    text = table.to_csv(None, sep="\t", na_rep="n/a", index=False, float_format="%.8g", lineterminator="\n")
    layout.write_atomically(path, text)


def _header(brain: Anatomy, dtype: type, tr: float | None = None, count: int = 1) -> bytes:
    """A NIfTI-1 header in MNI152 space; with `tr`, of `count` frames of scaled integers."""
    header = nib.Nifti1Header()
    header.set_data_dtype(dtype)
    mm = float(brain.affine[0, 0])
    header.set_data_shape(brain.mask_XYZ.shape + ((count,) if tr else ()))
    header.set_zooms((mm, mm, mm) + ((tr,) if tr else ()))
    header.set_xyzt_units("mm", "sec" if tr else "unknown")
    header.set_sform(brain.affine, code="mni")
    header.set_qform(brain.affine, code="mni")
    if tr:
        header.set_slope_inter(SLOPE, INTERCEPT)
    header.set_data_offset(header.single_vox_offset)
    buffer = io.BytesIO()
    header.write_to(buffer)
    return buffer.getvalue()


def write_run(root: Path, cohort: SyntheticCohort, subject: int, session: int) -> None:
    """Write one run with its sidecar, mask and confounds, named as fMRIPrep does, below `root`."""
    brain = anatomy(cohort.voxel_mm)
    folder = root / f"sub-{subject:02d}" / f"ses-{session}" / "func"
    stem = f"sub-{subject:02d}_ses-{session}_task-rest"

    with _gzip(folder / f"{stem}_space-{SPACE}_desc-brain_mask.nii.gz") as file:
        file.write(_header(brain, np.uint8) + brain.mask_XYZ.astype(np.uint8).tobytes(order="F"))

    global_signal = []
    outside = round(-INTERCEPT / SLOPE)  # reads back as 0
    stored_XYZ = np.full(brain.mask_XYZ.shape, outside, np.int16)
    limits = np.iinfo(np.int16)
    with _gzip(folder / f"{stem}_space-{SPACE}_desc-preproc_bold.nii.gz") as file:
        file.write(_header(brain, np.int16, cohort.tr, cohort.frames))
        for y_V in run_frames(cohort, subject, session):
            stored_XYZ[brain.mask_XYZ] = np.clip(np.round((y_V - INTERCEPT) / SLOPE), limits.min, limits.max)
            file.write(stored_XYZ.tobytes(order="F"))
            global_signal.append(float(y_V.mean()))

    sidecar = {"RepetitionTime": cohort.tr, "SkullStripped": True, "TaskName": "rest"}
    layout.write_atomically(folder / f"{stem}_space-{SPACE}_desc-preproc_bold.json", _pretty(sidecar))
    motion_T6 = motion(cohort, subject, session)
    confounds = {"global_signal": global_signal, "framewise_displacement": framewise_displacement(motion_T6)}
    names = [f"{kind}_{axis}" for kind in ("trans", "rot") for axis in "xyz"]
    confounds |= dict(zip(names, motion_T6.T, strict=True))
    _write_table(folder / f"{stem}_desc-confounds_timeseries.tsv", pd.DataFrame(confounds))
    events = [
        {"onset": event["onset_s"], "duration": event["length_s"], "trial_type": event["state"]}
        for event in planted(cohort, subject, session)["events"]
    ]
    _write_table(folder / f"{stem}_events.tsv", pd.DataFrame(events))


def truth(cohort: SyntheticCohort) -> dict[str, Any]:
    """Everything that is planted in a cohort, as `truth.json` holds it."""
    subjects: dict[str, Any] = {}
    for subject in range(1, cohort.subjects + 1):
        group, score = traits(cohort.seed, subject)
        sessions = {f"ses-{j}": planted(cohort, subject, j) for j in range(1, cohort.sessions + 1)}
        subjects[f"sub-{subject:02d}"] = {"group": group, "score": score, "sessions": sessions}
    return {
        "generator": GENERATOR,
        "recipe": RECIPE,
        "parameters": asdict(cohort),
        "networks": [{"name": name, "centres_mm": foci} for name, foci in NETWORKS.items()],
        "trait_pairs": TRAIT_PAIRS,
        "subjects": subjects,
    }


def _pretty(tree: Any) -> str:
    return json.dumps(tree, indent=1) + "\n"


def _check_folder(root: Path, cohort: SyntheticCohort) -> None:
    """Refuse a folder that holds something else than (a part of) this cohort."""
    if all(path.name.endswith(".tmp") for path in root.iterdir()):
        return
    try:
        old = json.loads((root / "truth.json").read_text(encoding="utf-8"))
        was = old["parameters"] | {"recipe": old["recipe"]} if old["generator"] == GENERATOR else None
    except (OSError, ValueError, KeyError, TypeError):
        was = None
    hint = "Give another folder"
    if was is None:
        got = f"{root}, which holds other files"
        raise ConfigError("command line", "--out", got, "a new or empty folder", hint)
    # More subjects or sessions extend a cohort; fewer would leave runs behind that its table does not know.
    for key, value in (asdict(cohort) | {"recipe": RECIPE}).items():
        grows = key in ("subjects", "sessions") and key in was and value >= was[key]
        if not grows and value != was.get(key):
            got = f"{root}, a cohort of {key} {was.get(key)}"
            raise ConfigError("command line", "--out", got, f"{key} {value}", hint)


def write_cohort(
    root: str | Path, cohort: SyntheticCohort, advance: Callable[[int, str], None] = lambda count, note: None
) -> None:
    """Write a cohort below `root`; over the same cohort, whole or not, the same bytes again.

    Parameters
    ----------
    root : str or Path
        A new or empty folder, or one that holds this cohort or one of fewer subjects or sessions.
    cohort : SyntheticCohort
    advance : callable, optional
        Called with (1, name of the run) after each run.

    Raises
    ------
    ConfigError
        If `root` holds anything else, or cannot be made.
    """
    root = Path(root)
    facts = truth(cohort)
    try:
        root.mkdir(parents=True, exist_ok=True)
        _check_folder(root, cohort)
        (root / "cohort.yaml").unlink(missing_ok=True)
        layout.write_atomically(root / "truth.json", _pretty(facts))
    except OSError as error:
        got = f"{root} ({error.strerror})"
        raise ConfigError("command line", "--out", got, "a folder that can be written") from None
    description = {
        "Name": "synthetic",
        "BIDSVersion": "1.9.0",
        "DatasetType": "derivative",
        "GeneratedBy": [{"Name": GENERATOR, "Version": str(RECIPE)}],
    }
    layout.write_atomically(root / "dataset_description.json", _pretty(description))
    layout.write_atomically(root / "README", _README)
    layout.write_atomically(root / ".bidsignore", "".join(f"{name}\n" for name in _NOT_BIDS))
    layout.write_atomically(root / "participants.json", _pretty(_COLUMNS))
    people = pd.DataFrame.from_dict(facts["subjects"], orient="index")[["group", "score"]]
    _write_table(root / "participants.tsv", people.rename_axis("participant_id").reset_index())
    for subject, session in cohort.runs():
        write_run(root, cohort, subject, session)
        advance(1, f"sub-{subject:02d} ses-{session}")
    config = {"name": "synthetic", "root": ".", "layout": "bids", "space": "MNI", "participants": "participants.tsv"}
    layout.write_atomically(root / "cohort.yaml", yaml.safe_dump(config, sort_keys=False))
