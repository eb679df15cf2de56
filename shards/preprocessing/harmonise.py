"""Harmonise one scan: orientation, grid, TR, mask and normalisation.

The result depends only on the scan and its settings. The steps are: resampling in space (cubic B-spline, brain voxels
only); cleaning, if requested; resampling in time (cubic B-spline per voxel, inside the measured time span); and a
global z-score inside the mask. The z-score is stored as two parts, the baseline (mean of each voxel) and the
fluctuation around it: the fluctuation is a few per cent of the anatomical contrast, and their sum in half precision
would lose it.

Frames are read, and voxels resampled in time, in blocks and in place. Memory use is that of one copy of the scan at the
brain voxels, and of the interpolation weights.

Legend: X, Y, Z voxels of the target grid; S source voxels; N brain voxels (C order of the grid); T frames; P patches;
V voxels of a patch; K windows; F frames of a window; 3 the axes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any

import nibabel as nib
import numpy as np
import scipy  # its parts are imported when they are used
from pydantic import Field, model_validator

from shards.cohorts.scan import RunSource
from shards.core import nifti
from shards.core.errors import RunRefused
from shards.core.settings import Contradiction, Settings, Unit
from shards.format import patches
from shards.format.grid import Grid
from shards.preprocessing import confounds, quality
from shards.preprocessing.bold import LEAST_FRAMES, Bold, open_bold
from shards.preprocessing.confounds import CleanSettings
from shards.preprocessing.masks import BrainMaskSettings, find_mask
from shards.preprocessing.resampling import antialias, field_of_view, low_pass, resample_mask, spline_weights
from shards.preprocessing.space import check_space

VOXEL_BLOCK = 16384  # number of voxels resampled in time at once
# How values are stored, for the manifest.
NORMALISATION = "global z inside the mask; baseline = voxel mean, windows = fluctuation around it"

FRAME_BLOCK = 16  # number of frames resampled in space at once
ROUNDING = 1e-6  # relative rounding error of a constant signal after interpolation in float32


class GridSettings(Settings):
    """The common grid and TR."""

    mm: Annotated[float, Unit("mm")] = Field(2.0, gt=0, le=20, description="edge of a voxel")
    shape: Annotated[tuple[int, int, int], Unit("voxels")] = Field((96, 96, 96), description="voxels along x, y, z")
    patch: Annotated[int, Unit("voxels")] = Field(4, ge=1, le=16, description="edge of a patch")
    tr: Annotated[float, Unit("s")] = Field(
        0.72, gt=0.05, le=20, description="TR to which scans outside tr_range are resampled"
    )
    tr_range: Annotated[tuple[float, float], Unit("s")] = Field(
        (0.7, 0.8), description="scans with a TR inside this range are not resampled in time"
    )

    @model_validator(mode="after")
    def _consistent(self) -> GridSettings:
        for size in self.shape:
            if size < self.patch or size % self.patch:
                raise Contradiction("shape", list(self.shape), f"multiples of patch, {self.patch}")
        low, high = self.tr_range
        if not low <= self.tr <= high:
            raise Contradiction("tr", self.tr, f"between {low} and {high}, the tr_range", "Set tr_range, too")
        return self

    def grid(self) -> Grid:
        return Grid(self.mm, self.shape, self.patch)


@dataclass
class Harmonised:
    """A scan on the common grid and TR.

    Attributes
    ----------
    raw_TN : float32 array
        The harmonised scan before normalisation, brain voxels only.
    brain_XYZ : bool array
        Brain mask on the grid.
    edge : int
        Edge of a patch in voxels.
    tr, source_tr : float
        In s.
    facts : dict
        Quality measures, and what was done.
    repeated_T : bool array
        Frames made from volumes that are copies of an earlier volume.
    displacement_T : float64 array, optional
        Framewise displacement in mm, NaN where it is missing; None if it is in no confounds table. After resampling in
        time, the larger one of the two volumes that a frame lies between.
    """

    raw_TN: np.ndarray
    brain_XYZ: np.ndarray
    edge: int
    tr: float
    source_tr: float
    facts: dict[str, object]
    repeated_T: np.ndarray
    displacement_T: np.ndarray | None = None

    @cached_property
    def moments(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean and variance over time of every voxel, float64 (N,)."""
        return quality.mean_and_variance(self.raw_TN)

    @cached_property
    def global_mean(self) -> float:
        return float(self.moments[0].mean())

    @cached_property
    def global_sd(self) -> float:
        """SD over all brain voxels and frames, from the variance within and between voxels."""
        mean_N, variance_N = self.moments
        return float(np.sqrt(variance_N.mean() + mean_N.var()))

    @cached_property
    def patch_P3(self) -> np.ndarray:
        """Positions of the patches that contain brain, int16."""
        return patches.patch_places(self.brain_XYZ, self.edge)

    @cached_property
    def _slots_N(self) -> np.ndarray:
        return patches.voxel_slots(self.brain_XYZ, self.patch_P3, self.edge)

    @property
    def baseline_PV(self) -> np.ndarray:
        """Mean of each voxel over the scan in global z-scores, float32; 0 for background voxels."""
        return self._in_patches((self.moments[0] - self.global_mean) / self.global_sd)

    @property
    def spread_PV(self) -> np.ndarray:
        """SD of each voxel over the scan in units of the global SD, float32; 0 for background voxels."""
        return self._in_patches(np.sqrt(self.moments[1]) / self.global_sd)

    def windows(self, start_K: np.ndarray, frames: int) -> np.ndarray:
        """Fluctuation of each voxel around its mean in units of the global SD, float32 (K, F, P, V)."""
        mean_N = self.moments[0]
        shape = len(start_K), frames, len(self.patch_P3), self.edge**3
        out = np.zeros((shape[0], frames, shape[2] * shape[3]), np.float32)
        for window, start in enumerate(start_K):
            for frame in range(frames):
                out[window, frame, self._slots_N] = (self.raw_TN[start + frame] - mean_N) / self.global_sd
        return out.reshape(shape)

    def _in_patches(self, values_N: np.ndarray) -> np.ndarray:
        flat = np.zeros(len(self.patch_P3) * self.edge**3, np.float32)
        flat[self._slots_N] = values_N
        return flat.reshape(len(self.patch_P3), self.edge**3)


@dataclass(frozen=True)
class Placed:
    """A scan with valid header, mask and tables, and the position of its brain on the grid.

    Attributes
    ----------
    bold : Bold
    affine : float64 array (4, 4)
        From voxel indices of the scan to mm, after centring.
    brain_XYZ : bool array
        Brain mask on the grid.
    table : TableFile or None
        The confounds.
    displacement_T : float64 array or None
        Their framewise displacement, of every frame of the scan.
    facts : dict
        What was found.
    """

    bold: Bold
    affine: np.ndarray
    brain_XYZ: np.ndarray
    table: Any
    displacement_T: np.ndarray | None
    facts: dict[str, object]


def place(run: RunSource, settings: GridSettings, mask_settings: BrainMaskSettings, clean: CleanSettings) -> Placed:
    """Check a scan, and find its brain on the grid. Frames are only read if the mask must be computed from them.

    Raises
    ------
    RunRefused
        If the scan cannot be opened (see `shards.preprocessing.bold`), its tables do not fit, its mask is not a brain,
        or too much of its brain lies outside the grid or the scan.
    """
    bold = open_bold(run)
    table = read_confounds(bold, clean)
    mask = find_mask(bold, mask_settings)
    grid = settings.grid()
    mask_mm = nib.affines.apply_affine(mask.affine, np.argwhere(mask.brain))
    moved_mm = np.zeros(3)
    if bold.centred:
        moved_mm = np.asarray(grid.centre_mm) - (mask_mm.min(axis=0) + mask_mm.max(axis=0)) / 2
    move = nib.affines.from_matvec(np.eye(3), moved_mm)
    affine, mask_affine = move @ bold.affine, move @ mask.affine
    outside = _outside(mask_mm + moved_mm, grid.affine, grid.shape)
    if outside > mask_settings.outside:
        hint = f"If the scan is not in MNI space, give `space: native` {run.stated}; otherwise enlarge grid.shape"
        got, limit = f"{outside:.0%} of the brain outside the grid", f"at most {mask_settings.outside:.0%}"
        raise RunRefused(run.source, "mask", got, limit, hint)
    unscanned = _outside(mask_mm + moved_mm, affine, bold.shape)
    brain_XYZ = resample_mask(mask.brain, mask_affine, grid)
    dice, space_assumed = check_space(bold, brain_XYZ, grid, mask_settings.mni_dice)
    brain_XYZ &= field_of_view(bold.shape, affine, grid)
    if not brain_XYZ.any() or unscanned > 0.5:
        got = f"{unscanned:.0%} of the mask outside the scan" if unscanned > 0.5 else "no brain voxel on the grid"
        hint = "Give the mask that belongs to this scan"
        raise RunRefused(run.source, "mask", got, "a mask that overlaps scan and grid", hint)
    facts: dict[str, object] = {
        "mask_outside_grid": round(outside, 4),
        "mask_outside_scan": round(unscanned, 4),
        "mask_source": mask.source,
        "space": run.space or "MNI",
        "mni_dice": dice,
        "tr_source": bold.tr_source,
    }
    if mask.rule:
        facts["mask_rule"] = mask.rule
    if space_assumed:
        facts["space_assumed"] = space_assumed
    if not bold.assumed and (words := nifti.forms_disagree(bold.image)):
        facts["forms_disagree"] = words
    if bold.centred:
        facts["centred_by_mm"] = [round(float(value), 2) for value in moved_mm]
    if bold.assumed:
        facts["orientation_assumed"] = bold.assumed
    moved_T = None if table is None else confounds.framewise_displacement(table)
    if table is not None:
        facts["mean_fd_mm"] = None if moved_T is None else round(float(np.nanmean(moved_T)), 4)
    return Placed(bold, affine, brain_XYZ, table, moved_T, facts)


def harmonise(
    run: RunSource,
    settings: GridSettings,
    mask_settings: BrainMaskSettings | None = None,
    clean: CleanSettings | None = None,
) -> Harmonised:
    """Harmonise one scan to the common grid and TR.

    Raises
    ------
    RunRefused
        If the checks of `place` fail, or the values are not finite or do not vary.
    """
    clean = clean or CleanSettings()
    mask_settings = mask_settings or BrainMaskSettings()
    placed = place(run, settings, mask_settings, clean)
    bold, grid = placed.bold, settings.grid()
    # One array is used throughout: the frames of the scan are resampled in time in place.
    length = max(bold.frames, frames_at(settings, bold.tr, bold.frames))
    buffer_TN = np.empty((length, np.count_nonzero(placed.brain_XYZ)), np.float32)
    varies_N = _resample_space(placed, grid, buffer_TN)
    if not varies_N.any():
        got, expected = "the same volume in every frame", "a signal that varies in time"
        raise RunRefused(run.source, "data", got, expected, "Leave the scan out")
    dead_share = 1 - float(varies_N.mean())
    if dead_share > (limit := mask_settings.dead):
        got = f"{dead_share:.0%} of its voxels without signal (the same value in every frame)"
        hint = "Give a mask of the scanned region, or raise mask.dead"
        raise RunRefused(run.source, "mask", got, f"at most {limit:.0%}", hint)
    brain_XYZ = placed.brain_XYZ
    if dead_share:
        brain_XYZ, buffer_TN = brain_XYZ.copy(), _without(buffer_TN, varies_N)
        brain_XYZ[placed.brain_XYZ] = varies_N
    dropped = _dummy(placed, buffer_TN[: bold.frames])
    scan_TN = buffer_TN[dropped : bold.frames]
    repeated_T = quality.repeats(scan_TN)
    if clean.words:
        confounds_TC = None
        if clean.confounds:
            assert run.confounds is not None
            confounds_TC = confounds.columns(run.confounds, placed.table, clean.confounds)[dropped:]
        try:
            confounds.clean(scan_TN, bold.tr, clean, confounds_TC)
        except ValueError as error:  # raised by nilearn, for example with too few frames for the filter
            raise RunRefused(
                run.source, "clean", str(error), "a scan that can be cleaned with these settings", "Change `clean`"
            ) from None
    raw_TN, tr = _resample_time(scan_TN, bold.tr, settings, buffer_TN)

    of_frame_T = _frames_of(repeated_T, bold.tr, settings)
    moved_T = placed.displacement_T
    if moved_T is not None:
        moved_T = _frames_of(moved_T[dropped:], bold.tr, settings)
    result = Harmonised(raw_TN, brain_XYZ, grid.patch, tr, bold.tr, dict(placed.facts), of_frame_T, moved_T)
    mean_N, variance_N = result.moments
    if not float(np.sqrt(variance_N.mean())) > ROUNDING * np.abs(mean_N).max():
        got, expected = "the same volume in every frame", "a signal that varies in time"
        raise RunRefused(run.source, "data", got, expected, "Leave the scan out")
    result.facts.update(
        quality.of_run(raw_TN, mean_N, variance_N, brain_voxel_ml=grid.mm**3 / 1000),
        dropped_frames=dropped,
        dead_share=round(dead_share, 4),
        repeated_frames=int(repeated_T.sum()),
        global_mean=round(result.global_mean, 6),
        global_sd=round(result.global_sd, 6),
    )
    if clean.words:
        result.facts["cleaned"] = clean.words
    return result


def read_confounds(bold: Bold, clean: CleanSettings) -> Any:
    """The confounds table of a scan, or None. Raises RunRefused if it does not fit the scan or the cleaning."""
    path = bold.run.confounds
    table = None if path is None else confounds.read(path, bold.frames)
    _check_clean(bold, table, clean)
    return table


def _check_clean(bold: Bold, table: Any, clean: CleanSettings) -> None:
    source, nyquist = bold.run.source, 0.5 / bold.tr
    if clean.low_pass is not None and clean.low_pass >= nyquist:
        got, expected = (
            f"{clean.low_pass:g} Hz at TR {bold.tr:g} s",
            f"less than {nyquist:.4g} Hz, half the sampling rate",
        )
        raise RunRefused(source, "clean.low_pass", got, expected, "Lower clean.low_pass")
    if clean.confounds and table is None:
        hint = f"Give the tables as `confounds` {bold.run.stated}"
        raise RunRefused(source, "clean.confounds", "no confounds table", "a table for every scan", hint)


def _dummy(placed: Placed, scan_TN: np.ndarray) -> int:
    """Number of volumes to drop at the start: from the cohort file, else from fMRIPrep, else the bright ones."""
    bold, table = placed.bold, placed.table
    found = bold.run.dummy
    if found == "auto":
        found = (0 if table is None else confounds.non_steady_state(table)) or quality.dummy_frames(
            np.array([frame_N.mean(dtype=np.float64) for frame_N in scan_TN]), bold.tr
        )
    if bold.frames - found < LEAST_FRAMES:
        got = f"{found} of {bold.frames} volumes to drop"
        hint = "Set `dummy` to a smaller number"
        raise RunRefused(bold.run.source, "dummy", got, f"at least {LEAST_FRAMES} remaining volumes", hint)
    return found


def _outside(place_mm: np.ndarray, affine: np.ndarray, shape: tuple[int, int, int]) -> float:
    """Fraction of positions (n, 3) outside a box of voxels."""
    index = nib.affines.apply_affine(np.linalg.inv(affine), place_mm)
    return float(np.mean(((index < -0.5) | (index > np.array(shape) - 0.5)).any(axis=1)))


def _without(buffer_TN: np.ndarray, kept_N: np.ndarray) -> np.ndarray:
    """Move the kept voxels to the front of the same array, because there may be no memory for a second copy."""
    kept = np.flatnonzero(kept_N)
    for row_N in buffer_TN:
        row_N[: len(kept)] = row_N[kept]
    return buffer_TN[:, : len(kept)]


def _resample_space(placed: Placed, grid: Grid, out_TN: np.ndarray) -> np.ndarray:
    """Write cubic B-spline values at the brain voxels of the grid to the first rows of `out_TN`.

    Returns which of these voxels have a signal, bool (N,): those with a nearest voxel in the scan that varies in time.
    """
    bold = placed.bold
    matrix = np.linalg.inv(placed.affine) @ grid.affine
    place_3N = matrix[:3, :3] @ np.argwhere(placed.brain_XYZ).T + matrix[:3, 3:]
    sigma = antialias(matrix)
    rounded = np.rint(place_3N)
    aligned = not sigma.any() and bool(np.abs(place_3N - rounded).max() < 1e-3)
    if not aligned:
        weights_NS = spline_weights(place_3N, bold.shape)
        coefficients_SB = np.empty((math.prod(bold.shape), FRAME_BLOCK), np.float32)
    first_N = np.zeros(place_3N.shape[1], np.float32)
    nearest = tuple(np.clip(rounded, 0, np.array(bold.shape)[:, None] - 1).astype(np.intp))
    varies_N = np.zeros(place_3N.shape[1], bool)
    for frame, volume in enumerate(bold.volumes()):
        here_N = volume[nearest]
        first_N = here_N if frame == 0 else first_N
        varies_N |= here_N != first_N
        if sigma.any():
            volume = scipy.ndimage.gaussian_filter(volume, sigma, mode="nearest")
        if aligned:
            out_TN[frame] = here_N
            continue
        filled = frame % FRAME_BLOCK + 1
        coefficients_SB[:, filled - 1] = scipy.ndimage.spline_filter(volume, 3, np.float32, "mirror").ravel()
        if filled == FRAME_BLOCK or frame + 1 == bold.frames:
            out_TN[frame + 1 - filled : frame + 1] = (weights_NS @ coefficients_SB[:, :filled]).T
    return varies_N


def frames_at(settings: GridSettings, source_tr: float, frames: int) -> int:
    """Number of frames of a scan after resampling to the grid's TR. All lie inside the measured time span."""
    low, high = settings.tr_range
    if low <= source_tr <= high:
        return frames
    return int(np.floor((frames - 1) * source_tr / settings.tr + 1e-9)) + 1


def _resample_time(
    scan_TN: np.ndarray, source_tr: float, settings: GridSettings, buffer_TN: np.ndarray
) -> tuple[np.ndarray, float]:
    """Resample in time to `settings.tr` with cubic B-splines, into the first rows of `buffer_TN`.

    `scan_TN` is a part of `buffer_TN`. For a longer TR, frequencies above its Nyquist frequency are filtered out first.
    Returns (T, N) and its TR.
    """
    low, high = settings.tr_range
    if low <= source_tr <= high:
        return scan_TN, source_tr
    from scipy.interpolate import make_interp_spline  # takes half a second to import

    seconds = np.arange(len(scan_TN)) * source_tr
    wanted = np.arange(frames_at(settings, source_tr, len(scan_TN))) * settings.tr
    # Interpolation is linear in the series and equal for all voxels. The splines through unit impulses, which decrease
    # by a factor of 3.7 per frame, form a banded matrix.
    weights_TT = make_interp_spline(seconds, np.eye(len(seconds)), k=3)(wanted)
    if source_tr < settings.tr:
        weights_TT = weights_TT @ low_pass(len(seconds), source_tr, settings.tr)
    weights_TT = scipy.sparse.csr_array(np.where(np.abs(weights_TT) > 1e-9, weights_TT, 0).astype(np.float32))
    for first in range(0, scan_TN.shape[1], VOXEL_BLOCK):
        block = slice(first, first + VOXEL_BLOCK)
        mean_B = scan_TN[:, block].mean(axis=0)  # kept apart, so that the fluctuation keeps its digits
        buffer_TN[: len(wanted), block] = weights_TT @ (scan_TN[:, block] - mean_B) + mean_B
    return buffer_TN[: len(wanted)], settings.tr


def _frames_of(value_T: np.ndarray, source_tr: float, settings: GridSettings) -> np.ndarray:
    """For each frame after resampling, the larger value of the frames of the scan on both sides of it; NaN is ignored.

    With bool values: which frames are neighbours of a marked one.
    """
    low, high = settings.tr_range
    if low <= source_tr <= high:
        return value_T
    place_T = np.arange(frames_at(settings, source_tr, len(value_T))) * settings.tr / source_tr
    before_T = np.minimum(np.floor(place_T + 1e-9).astype(int), len(value_T) - 1)
    after_T = np.minimum(np.ceil(place_T - 1e-9).astype(int), len(value_T) - 1)
    return np.fmax(value_T[before_T], value_T[after_T])
