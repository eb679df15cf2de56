"""Quality measures of a scan. They are written to its sample and shown on the page of the dataset.

Legend: T frames, N brain voxels (C order of the grid), M voxels of the carpet; X, Y, Z voxels of the grid.
"""

from __future__ import annotations

import hashlib

import numpy as np
import scipy  # its parts are imported when they are used

from shards.format.layout import CARPET_STEPS

VOXEL_BLOCK = 16384  # number of voxels processed at once


def mean_and_variance(raw_TN: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and variance over time of every voxel, float64 (N,), without a second copy of the scan."""
    mean_N, variance_N = np.empty((2, raw_TN.shape[1]))
    for first in range(0, raw_TN.shape[1], VOXEL_BLOCK):
        block = slice(first, first + VOXEL_BLOCK)
        values_TB = raw_TN[:, block].astype(np.float64)
        mean_N[block], variance_N[block] = values_TB.mean(axis=0), values_TB.var(axis=0)
    return mean_N, variance_N


def of_run(
    raw_TN: np.ndarray, mean_N: np.ndarray, variance_N: np.ndarray, brain_voxel_ml: float
) -> dict[str, float | int]:
    """Quality measures of a harmonised scan before normalisation.

    Parameters
    ----------
    raw_TN : float32 (T, N)
    mean_N, variance_N : float64 (N,)
        Result of `mean_and_variance`.
    brain_voxel_ml : float
        Volume of a voxel in ml.

    Returns
    -------
    dict
        `tsnr`, the median over voxels of mean / SD in time; `dvars_outliers`, the number of frames with a DVARS more
        than 1.5 interquartile ranges above the third quartile (the box-plot rule of FSL's fsl_motion_outliers);
        `brain_ml`, the volume of the mask in ml.
    """
    sd_N = np.sqrt(variance_N)
    alive = sd_N > 0
    tsnr = float(np.median(np.abs(mean_N[alive]) / sd_N[alive])) if alive.any() else 0.0
    change_T = dvars(raw_TN)
    low, high = np.percentile(change_T, [25, 75])
    return {
        "tsnr": round(tsnr, 3),
        "dvars_outliers": int(np.count_nonzero(change_T > high + 1.5 * (high - low))),
        "brain_ml": round(raw_TN.shape[1] * brain_voxel_ml, 2),
    }


def dvars(raw_TN: np.ndarray) -> np.ndarray:
    """Root mean square over voxels of the change from frame to frame; float64 (T - 1,).

    Power et al., NeuroImage 2012.
    """
    out = np.empty(len(raw_TN) - 1)
    for frame in range(len(out)):
        out[frame] = np.sqrt(np.mean(np.square(raw_TN[frame + 1] - raw_TN[frame], dtype=np.float64)))
    return out


def carpet(raw_TN: np.ndarray, brain_XYZ: np.ndarray, voxels: int = 512) -> np.ndarray:
    """Brain voxels over the whole scan, for the carpet plot (Power, NeuroImage 2017); int8 (M, T).

    M = min(voxels, N) voxels are selected at equal steps from all brain voxels, sorted by their distance from the edge
    of the brain. The edge, where motion is visible first, comes first. Values are z-scores over the scan times
    `CARPET_STEPS`, clipped to the range of int8.
    """
    depth_N = scipy.ndimage.distance_transform_edt(np.pad(brain_XYZ, 1))[1:-1, 1:-1, 1:-1][brain_XYZ]
    order_N = np.argsort(depth_N, kind="stable")
    chosen_M = order_N[np.linspace(0, len(order_N) - 1, min(voxels, len(order_N))).astype(np.intp)]
    values_TM = raw_TN[:, chosen_M].astype(np.float64)
    sd_M = values_TM.std(axis=0)
    z_TM = (values_TM - values_TM.mean(axis=0)) / np.where(sd_M > 0, sd_M, 1)
    return np.clip(np.rint(z_TM * CARPET_STEPS), -127, 127).astype(np.int8).T


def repeats(raw_TN: np.ndarray) -> np.ndarray:
    """Which frames are exact copies of an earlier frame, bool (T,).

    Measured volumes are never exact copies. They come from a scanner that stopped, or replace censored frames.
    """
    seen: set[bytes] = set()
    repeated_T = np.zeros(len(raw_TN), bool)
    for frame, row_N in enumerate(raw_TN):
        content = hashlib.sha256(row_N.tobytes()).digest()
        repeated_T[frame] = content in seen
        seen.add(content)
    return repeated_T


def dummy_frames(mean_T: np.ndarray, tr: float) -> int:
    """Number of frames at the start that are brighter than the steady state, before T1 saturation is reached.

    A frame is brighter if its mean signal exceeds the median over the scan by more than 2 % and by more than five SDs
    (1.4826 times the median absolute deviation). Saturation takes seconds, so more than 15 s of bright frames have
    another cause, and 0 is returned. 0 is also returned if the mean of the signal was removed.

    Parameters
    ----------
    mean_T : ndarray, (T,)
        Mean of each frame over the brain.
    tr : float
        In s.
    """
    middle = float(np.median(mean_T))
    sd = 1.4826 * float(np.median(np.abs(mean_T - middle)))
    if middle <= 10 * sd:
        return 0
    steady = mean_T <= middle + max(0.02 * middle, 5 * sd)
    leading = int(np.argmax(steady))  # at least the median frame is steady
    return leading if leading * tr <= 15 else 0
