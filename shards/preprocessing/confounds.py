"""The confounds table of a scan, and cleaning the signal with it.

Legend: T frames; N brain voxels; C confounds.
"""

from __future__ import annotations

from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated

import numpy as np
from pydantic import Field, model_validator

from shards.core import tables
from shards.core.errors import RunRefused
from shards.core.settings import Contradiction, Settings, Unit
from shards.core.tables import TableFile

VOXEL_BLOCK = 8192  # number of voxels cleaned at once


class CleanSettings(Settings):
    """Cleaning of every voxel's series at the TR of the scan with `nilearn.signal.clean`. By default, none."""

    confounds: tuple[str, ...] = Field((), description="columns of the confounds table to regress out; globs allowed")
    detrend: bool = Field(False, description="remove a linear trend")
    high_pass: Annotated[float | None, Unit("Hz")] = Field(
        None, gt=0, description="cutoff of a Butterworth high-pass filter; null: none"
    )
    low_pass: Annotated[float | None, Unit("Hz")] = Field(
        None, gt=0, description="cutoff of a Butterworth low-pass filter; null: none"
    )

    @model_validator(mode="after")
    def _band(self) -> CleanSettings:
        if self.high_pass and self.low_pass and self.high_pass >= self.low_pass:
            raise Contradiction("high_pass", self.high_pass, f"less than low_pass, {self.low_pass}")
        return self

    @property
    def words(self) -> str:
        """Description of the cleaning; empty if there is none."""
        parts = [f"regressed out {', '.join(self.confounds)}"] if self.confounds else []
        parts += ["detrended"] if self.detrend else []
        parts += [f"high-pass {self.high_pass:g} Hz"] if self.high_pass else []
        parts += [f"low-pass {self.low_pass:g} Hz"] if self.low_pass else []
        return "; ".join(parts)


def read(path: Path, frames: int) -> TableFile:
    """Read a confounds table with a header line, separated by tabs, commas or blanks, and one row per frame.

    Raises
    ------
    RunRefused
        If it cannot be read or has another number of rows.
    """
    table = tables.read(path, "named columns and one row per frame", RunRefused)
    if len(table) != frames:
        hint = "Give the table that belongs to this scan"
        raise RunRefused(path, "rows", len(table), f"{frames}, the number of frames of the scan", hint)
    return table


def framewise_displacement(table: TableFile) -> np.ndarray | None:
    """fMRIPrep's framewise displacement of each frame in mm, float64 (T,); None if the table has no value of it.

    NaN where it is missing, as for the first frame: it is the movement since the frame before.
    """
    if "framewise_displacement" not in table:
        return None
    value_T = table.numbers("framewise_displacement")
    known_T = np.isfinite(value_T)
    return np.where(known_T, value_T, np.nan) if known_T.any() else None


def non_steady_state(table: TableFile) -> int:
    """Number of volumes at the start that fMRIPrep marked as not steady (columns `non_steady_state_outlier*`)."""
    names = [name for name in table.columns if name.startswith("non_steady_state_outlier")]
    marked = [np.flatnonzero(np.nan_to_num(table.numbers(name))) for name in names]
    return max((int(frames[-1]) + 1 for frames in marked if len(frames)), default=0)


def columns(path: Path, table: TableFile, patterns: tuple[str, ...]) -> np.ndarray:
    """The columns that match the patterns, float64 (T, C), in the order of the table.

    The first value of derivatives is missing (n/a) and is replaced by the second, as in nilearn's `load_confounds`.

    Raises
    ------
    RunRefused
        If a pattern matches no column, or another value is missing.
    """
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in table.columns):
            known = ", ".join(table.columns[:8]) + (" ..." if len(table.columns) > 8 else "")
            raise RunRefused(path, "header", f"no column {pattern} among {known}", "every column of clean.confounds")
    chosen = [name for name in table.columns if any(fnmatchcase(name, pattern) for pattern in patterns)]
    values_TC = np.stack([table.numbers(name) for name in chosen], axis=1)
    values_TC[0] = np.where(np.isnan(values_TC[0]), values_TC[1], values_TC[0])
    rows, places = np.nonzero(~np.isfinite(values_TC))
    if len(rows):
        got = f"no number in line {table.lines[rows[0]]}"
        raise RunRefused(path, chosen[places[0]], got, "a number in every row after the first")
    return values_TC


def clean(series_TN: np.ndarray, tr: float, settings: CleanSettings, confounds_TC: np.ndarray | None) -> None:
    """Clean every voxel's series in place, without changing its mean.

    Parameters
    ----------
    series_TN : float32 array (T, N)
        Changed in place.
    tr : float
        In s.
    settings : CleanSettings
    confounds_TC : float64 array (T, C), or None
    """
    from nilearn.signal import clean as nilearn_clean  # takes seconds to import

    for first in range(0, series_TN.shape[1], VOXEL_BLOCK):
        block_TN = series_TN[:, first : first + VOXEL_BLOCK].astype(np.float64)
        mean_N = block_TN.mean(axis=0)
        cleaned_TN = nilearn_clean(
            block_TN - mean_N,
            confounds=confounds_TC,
            detrend=settings.detrend,
            standardize=False,
            high_pass=settings.high_pass,
            low_pass=settings.low_pass,
            t_r=tr,
        )
        series_TN[:, first : first + VOXEL_BLOCK] = cleaned_TN + mean_N
