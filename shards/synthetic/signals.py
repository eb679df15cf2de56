"""Signals of the synthetic cohort: neural activity, BOLD and motion, computed frame by frame."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from nilearn.glm.first_level import glover_hrf
from scipy.ndimage import gaussian_filter, gaussian_filter1d
from scipy.signal import fftconvolve

from shards.synthetic.anatomy import (
    DRIFT_PERCENT,
    GLOBAL_PERCENT,
    NETWORK_PERCENT,
    NOISE_FWHM_MM,
    NOISE_TIME_S,
    Anatomy,
    anatomy,
    smooth_field,
)
from shards.synthetic.surrogates import surrogates
from shards.synthetic.truth import NETWORKS, SyntheticCohort, connectivity, fine_connectivity, planted, rng_of

STEP_S = 0.1  # time step of neural activity, independent of the TR
HRF_S = 32.0  # length of the haemodynamic response, and of the lead-in before frame 0
ANATOMY_SD, SESSION_SD = 0.08, 0.01  # of the baseline's logarithm
RESIDUAL_MOTION = 0.3  # share of a displacement that remains after realignment
HEAD_RADIUS_MM = 50.0  # Power et al. 2012: rotations as arc length on a sphere


def network_activity(cohort: SyntheticCohort, subject: int, session: int) -> np.ndarray:
    """BOLD activity of the networks, (T, N) float32: ongoing activity (SD 1) plus the simulated events."""
    hrf = glover_hrf(STEP_S, 1, HRF_S)
    corr_NN = connectivity(cohort.seed, subject, session if cohort.recipe == 3 else None)
    ongoing_DN = _ongoing(cohort, rng_of(cohort.seed, "ongoing", subject, session), corr_NN)
    steps = len(ongoing_DN)
    for event in planted(cohort, subject, session)["events"]:
        onset, length = round(event["onset_s"] / STEP_S), round(event["length_s"] / STEP_S)
        response = np.convolve(np.ones(length), hrf)
        response *= event["amplitude"] / response.max()
        columns = [list(NETWORKS).index(name) for name in event["networks"]]
        end = min(onset + len(response), steps)
        ongoing_DN[onset:end, columns] += response[: end - onset, None]
    return _at_frames(cohort, ongoing_DN)


def fine_activity(cohort: SyntheticCohort, subject: int, session: int) -> np.ndarray:
    """BOLD activity of the networks' fine patterns (recipe 3), (T, N) float32, SD 1; it has no events."""
    corr_NN = fine_connectivity(cohort.seed, subject)
    return _at_frames(cohort, _ongoing(cohort, rng_of(cohort.seed, "fine_ongoing", subject, session), corr_NN))


def _ongoing(cohort: SyntheticCohort, rng: np.random.Generator, corr_NN: np.ndarray) -> np.ndarray:
    """Ongoing BOLD activity with these correlations, (D, N), SD 1."""
    # Neural activity is white noise; the haemodynamic response makes the BOLD signal slow.
    hrf = glover_hrf(STEP_S, 1, HRF_S)
    lead = len(hrf)
    steps = int(np.ceil(cohort.frames * cohort.tr / STEP_S)) + 1
    neural_DN = rng.standard_normal((lead + steps, len(corr_NN))) @ np.linalg.cholesky(corr_NN).T
    return fftconvolve(neural_DN, hrf[:, None], axes=0)[lead : lead + steps] / np.sqrt((hrf**2).sum())


def _at_frames(cohort: SyntheticCohort, activity_DN: np.ndarray) -> np.ndarray:
    seconds_T, seconds_D = np.arange(cohort.frames) * cohort.tr, np.arange(len(activity_DN)) * STEP_S
    return np.stack([np.interp(seconds_T, seconds_D, x_D) for x_D in activity_DN.T], axis=1).astype(np.float32)


def motion(cohort: SyntheticCohort, subject: int, session: int) -> np.ndarray:
    """Position of the head, (T, 6), in mm and rad: slow drift plus the simulated artefacts."""
    rng = rng_of(cohort.seed, "motion", subject, session)
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
    """Framewise displacement (T,) in mm after Power et al. 2012; NaN for the first frame."""
    moved_T6 = np.abs(np.diff(motion_T6, axis=0)) * np.repeat([1.0, HEAD_RADIUS_MM], 3)
    return np.concatenate([[np.nan], moved_T6.sum(1)])


def baseline(cohort: SyntheticCohort, subject: int, session: int) -> np.ndarray:
    """Mean image (V,) of a subject in a session, in scanner units. It identifies the subject, but no trait."""
    brain = anatomy(cohort.voxel_mm, cohort.recipe)
    person_V = ANATOMY_SD * smooth_field(rng_of(cohort.seed, "anatomy", subject), brain.mm_V3)
    day_V = SESSION_SD * smooth_field(rng_of(cohort.seed, "session", subject, session), brain.mm_V3)
    return brain.template_V * np.exp(person_V + day_V)


def _motion_patterns(brain: Anatomy, baseline_V: np.ndarray) -> np.ndarray:
    """Percent change of voxels per mm of translation and rad of rotation, (6, V); largest at the edge of the brain."""
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
    """The signal without noise: time courses (T, K), and their spatial patterns (K, V) in percent."""
    brain = anatomy(cohort.voxel_mm, cohort.recipe)
    rng = rng_of(cohort.seed, "nuisance", subject, session)
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
            [DRIFT_PERCENT * smooth_field(rng, brain.mm_V3) for _ in range(2)],
            _motion_patterns(brain, baseline_V),
        ]
    )
    return course_TK.astype(np.float32), pattern_KV.astype(np.float32)


def run_frames(cohort: SyntheticCohort, subject: int, session: int) -> Iterator[np.ndarray]:
    """Iterate over the frames of a scan, each (V,) float32 in scanner units, without holding a whole scan in memory.

    Raises
    ------
    ConfigError
        If the scan whose surrogates are the noise cannot be used.
    """
    brain, baseline_V = anatomy(cohort.voxel_mm, cohort.recipe), baseline(cohort, subject, session)
    course_TK, pattern_KV = _courses(cohort, subject, session, baseline_V)
    fine_TN = fine_activity(cohort, subject, session) if brain.fine_NV is not None else None
    noise = _noise(cohort, subject, session)
    for t, (course_K, noise_V) in enumerate(zip(course_TK, noise, strict=True)):
        percent_V = course_K @ pattern_KV + noise_V * (NETWORK_PERCENT / cohort.snr)
        frame_V = baseline_V * (1 + percent_V / 100)
        if fine_TN is not None:
            frame_V = frame_V + fine_TN[t] @ brain.fine_NV
        yield frame_V.astype(np.float32)


def _noise(cohort: SyntheticCohort, subject: int, session: int) -> Iterator[np.ndarray]:
    """Iterate over the frames of noise, each (V,) float32 with an RMS of 1 over voxels and frames."""
    if cohort.noise is not None:
        real = surrogates(cohort.noise, cohort.voxel_mm, cohort.recipe)
        yield from real.course(rng_of(cohort.seed, "surrogate", subject, session), cohort.frames, cohort.tr)
        return
    mask_XYZ = anatomy(cohort.voxel_mm, cohort.recipe).mask_XYZ
    rng = rng_of(cohort.seed, "noise", subject, session)
    sigma = NOISE_FWHM_MM / 2.355 / cohort.voxel_mm
    impulse = gaussian_filter1d(np.eye(1, 129, 64)[0], sigma)
    unit = (impulse**2).sum() ** 1.5  # SD of white noise after the three-dimensional filter
    lag = np.exp(-cohort.tr / NOISE_TIME_S)
    noise_V: np.ndarray | None = None
    for _ in range(cohort.frames):
        white_XYZ = rng.standard_normal(mask_XYZ.shape, np.float32)
        fresh_V = gaussian_filter(white_XYZ, sigma, mode="wrap")[mask_XYZ] / np.float32(unit)
        noise_V = fresh_V if noise_V is None else lag * noise_V + np.sqrt(1 - lag**2) * fresh_V
        yield noise_V
