"""The quality numbers of a run, written into its sample and shown on the dataset's page.

Legend: T frames, N brain voxels.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from shards.errors import RunRefused


def of_run(raw_TN: np.ndarray, brain_voxel_ml: float) -> dict[str, float | int]:
    """Quality of a harmonised run before normalisation.

    Parameters
    ----------
    raw_TN : float32 (T, N)
    brain_voxel_ml : float
        Volume of a voxel in ml.

    Returns
    -------
    dict
        `tsnr`, the median over voxels of mean / SD in time; `dvars_outliers`, the number of frames whose DVARS lies
        above the third quartile by more than 1.5 interquartile ranges (the box-plot rule of FSL's fsl_motion_outliers);
        `brain_ml`, the volume of the mask.
    """
    mean_N = raw_TN.mean(axis=0, dtype=np.float64)
    sd_N = raw_TN.std(axis=0, dtype=np.float64)
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


def mean_framewise_displacement(confounds: Path) -> float | None:
    """Mean framewise displacement (mm) in an fMRIPrep confounds table; None where it has no such column.

    Raises
    ------
    RunRefused
        If the table cannot be read.
    """
    try:
        table = pd.read_csv(confounds, sep="\t", na_values="n/a")
    except (OSError, ValueError) as error:
        raise RunRefused(confounds, "", f"an unreadable table ({error})", "tab-separated confounds") from None
    if "framewise_displacement" not in table:
        return None
    return round(float(table["framewise_displacement"].mean()), 4)
