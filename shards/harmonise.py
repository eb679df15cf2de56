"""One run in, one harmonised run out: orientation, grid, TR, mask and normalisation.

A pure function of the run and its settings. Space first (cubic B-spline at the brain voxels alone), then time (cubic
B-spline per voxel, inside the measured span), then a global z-score inside the mask, kept as two parts: the baseline
(each voxel's mean) and the fluctuation around it, because the fluctuation is a few per cent of the anatomical contrast
and would be lost in half precision beside it.

Legend: X, Y, Z voxels of the target grid; S source voxels; N brain voxels (C order of the grid); T frames; P patches;
V voxels of a patch; 3 the axes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import nibabel as nib
import numpy as np
from nilearn.masking import compute_epi_mask
from pydantic import Field, model_validator
from scipy import ndimage
from scipy.interpolate import make_interp_spline

from shards import patches, quality
from shards.cohort import RunSource, header_tr
from shards.errors import RunRefused
from shards.grid import Grid
from shards.settings import Settings

VOXEL_BLOCK = 16384  # voxels resampled in time at once


class GridSettings(Settings):
    """The common grid and TR."""

    mm: float = Field(2.0, gt=0, le=20, description="voxel edge, mm")
    shape: tuple[int, int, int] = Field((96, 96, 96), description="voxels along x, y, z")
    patch: int = Field(4, ge=1, le=16, description="patch edge, voxels")
    tr: float = Field(0.72, gt=0.05, le=20, description="target TR, s")
    tr_range: tuple[float, float] = Field((0.7, 0.8), description="TRs (s) inside are left as they are")
    outside: float = Field(0.1, ge=0, le=1, description="largest fraction of a mask that may lie outside the grid")

    @model_validator(mode="after")
    def _consistent(self) -> GridSettings:
        for size in self.shape:
            if size < self.patch or size % self.patch:
                raise ValueError(f"a shape divisible by patch: {size} is no multiple of {self.patch}")
        low, high = self.tr_range
        if not low <= self.tr <= high:
            raise ValueError(f"tr_range around tr: {low} <= {self.tr} <= {high} does not hold; set both")
        return self

    def grid(self) -> Grid:
        return Grid(self.mm, self.shape, self.patch)


@dataclass
class Harmonised:
    """A run on the common grid and TR.

    Attributes
    ----------
    fluctuation_TPV : float32, deviation of each voxel from its run mean, in units of the run's global SD
    baseline_PV, spread_PV : float32, each voxel's run mean (global z) and SD (same units); background voxels 0
    patch_P3 : int16, places of the patches
    brain_XYZ : bool, the mask on the grid
    raw_TN : float32, the harmonised run before normalisation, brain voxels only
    tr, source_tr : float, s
    facts : dict, quality numbers and what was done
    """

    fluctuation_TPV: np.ndarray
    baseline_PV: np.ndarray
    spread_PV: np.ndarray
    patch_P3: np.ndarray
    brain_XYZ: np.ndarray
    raw_TN: np.ndarray
    tr: float
    source_tr: float
    facts: dict[str, Any]


def harmonise(run: RunSource, settings: GridSettings) -> Harmonised:
    """Bring one run to the common grid and TR.

    Raises
    ------
    RunRefused
        If the run is no 4-D NIfTI, its position is unknown, its TR impossible, its values not finite, its mask missing
        or empty, or too much of its brain lies outside the grid.
    """
    image = _open(run)
    grid = settings.grid()
    source_tr = header_tr(run, float(image.header.get_zooms()[3]), image.header.get_xyzt_units()[1])
    if not 0.05 < source_tr <= 20:
        raise RunRefused(run.source, "TR", f"{source_tr:g} s", "0.05-20 s", "Set `tr` in the cohort file")

    mask, mask_source = _mask(run, image)
    mask_voxels_3 = np.argwhere(mask.get_fdata() > 0.5)
    mask_mm = nib.affines.apply_affine(mask.affine, mask_voxels_3)
    moved_mm = np.zeros(3)
    if run.space == "native":
        moved_mm = np.asarray(grid.centre_mm) - (mask_mm.min(axis=0) + mask_mm.max(axis=0)) / 2
    affine = image.affine.copy()
    affine[:3, 3] += moved_mm
    mask_affine = mask.affine.copy()
    mask_affine[:3, 3] += moved_mm

    place_mm = nib.affines.apply_affine(np.linalg.inv(grid.affine), mask_mm + moved_mm)
    outside = float(np.mean(((place_mm < -0.5) | (place_mm > np.array(grid.shape) - 0.5)).any(axis=1)))
    if outside > settings.outside:
        hint = "If the run is not in MNI space, set `space: native`; else enlarge grid.shape"
        raise RunRefused(run.source, "mask", f"{outside:.0%} of the brain outside the grid",
                         f"at most {settings.outside:.0%}", hint)

    brain_XYZ = _resample_mask(mask.get_fdata() > 0.5, mask_affine, grid)
    brain_XYZ &= _field_of_view(image.shape[:3], affine, grid)
    if not brain_XYZ.any():
        raise RunRefused(run.source, "mask", "no brain voxel on the grid", "a mask that overlaps run and grid")

    source_TN = _resample_space(image, affine, brain_XYZ, grid, run)
    raw_TN, tr = _resample_time(source_TN, source_tr, settings)
    del source_TN

    facts: dict[str, Any] = {
        **quality.of_run(raw_TN, brain_voxel_ml=grid.mm**3 / 1000),
        "mask_outside_grid": round(outside, 4),
        "mask_source": mask_source,
        "space": run.space,
    }
    if run.space == "native":
        facts["centred_by_mm"] = [round(float(value), 2) for value in moved_mm]
    if run.confounds is not None:
        facts["mean_fd_mm"] = quality.mean_framewise_displacement(run.confounds)
    return _normalise(run, raw_TN, brain_XYZ, grid, tr, source_tr, facts)


def _open(run: RunSource) -> nib.Nifti1Image:
    try:
        image = nib.load(run.bold)
    except FileNotFoundError:
        raise RunRefused(run.source, "", "no such file", "a NIfTI run") from None
    except Exception as error:  # nibabel raises many types for files that are no image
        raise RunRefused(run.source, "", f"no readable image ({type(error).__name__})", "a NIfTI run") from None
    if not isinstance(image, nib.Nifti1Image):
        raise RunRefused(run.source, "format", type(image).__name__, "NIfTI-1 or NIfTI-2")
    if len(image.shape) != 4 or image.shape[3] < 4:
        raise RunRefused(run.source, "dim", "x".join(map(str, image.shape)), "x, y, z and at least 4 frames",
                         "Leave files that are no runs out of the pattern")
    if int(image.header["qform_code"]) == 0 and int(image.header["sform_code"]) == 0:
        raise RunRefused(run.source, "qform_code, sform_code", "0, 0: position and orientation unknown",
                         "a code above 0", "Restore the header from the original scan")
    if not np.isfinite(image.affine).all() or abs(np.linalg.det(image.affine[:3, :3])) < 1e-6:
        raise RunRefused(run.source, "affine", "singular or not finite", "an invertible affine")
    return image


def _mask(run: RunSource, image: nib.Nifti1Image) -> tuple[nib.Nifti1Image, str]:
    """The brain mask as a 3-D image on any grid, and where it came from."""
    if run.mask is None:
        # nilearn's EPI mask of the mean of at most 100 frames spread over the run: enough for a stable mean image
        frames = np.unique(np.linspace(0, image.shape[3] - 1, min(100, image.shape[3])).astype(int))
        data = _frames(image, run, frames)
        try:
            mask = compute_epi_mask(nib.Nifti1Image(data.mean(axis=3), image.affine))
        except Exception as error:
            raise RunRefused(run.source, "mask", f"none could be computed ({error})", "a brain in the image",
                             "Give a `mask` in the cohort file") from None
        source = "computed"
    else:
        if not run.mask.is_file():
            raise RunRefused(run.source, "mask", f"no file {run.mask}", "the mask the cohort file names")
        try:
            mask = nib.load(run.mask)
            values = np.asarray(mask.dataobj, np.float32)
        except Exception as error:
            raise RunRefused(run.source, "mask", f"{run.mask}: {type(error).__name__}", "a NIfTI mask") from None
        if values.ndim == 4 and values.shape[3] == 1:
            values = values[..., 0]
        if values.ndim != 3:
            raise RunRefused(run.source, "mask", f"{run.mask} with {values.ndim} dimensions", "three dimensions")
        mask = nib.Nifti1Image((values > 0.5).astype(np.uint8), mask.affine)
        source = run.mask.name
    if not (mask.get_fdata() > 0.5).any():
        raise RunRefused(run.source, "mask", f"an empty mask ({source})", "a mask with brain voxels")
    return mask, source


def _frames(image: nib.Nifti1Image, run: RunSource, frames: np.ndarray) -> np.ndarray:
    """Some frames of a run, float32, (x, y, z, len(frames))."""
    try:
        return np.asarray(image.dataobj[..., frames], np.float32)
    except Exception as error:
        raise RunRefused(run.source, "data", f"unreadable ({error})", "a complete file", "Copy it again") from None


def _resample_mask(mask: np.ndarray, affine: np.ndarray, grid: Grid) -> np.ndarray:
    """A mask on the grid: linear interpolation of the fraction of brain, then half; bool (X, Y, Z)."""
    matrix = np.linalg.inv(affine) @ grid.affine
    values = mask.astype(np.float32)
    sigma = _antialias(matrix)
    if sigma.any():
        values = ndimage.gaussian_filter(values, sigma, mode="nearest")
    resampled = ndimage.affine_transform(values, matrix[:3, :3], matrix[:3, 3], output_shape=grid.shape, order=1)
    return resampled >= 0.5


def _field_of_view(shape: tuple[int, ...], affine: np.ndarray, grid: Grid) -> np.ndarray:
    """Which voxels of the grid lie inside the scanned box; bool (X, Y, Z)."""
    matrix = np.linalg.inv(affine) @ grid.affine
    indices = np.indices(grid.shape, np.float32).reshape(3, -1)
    place = matrix[:3, :3] @ indices + matrix[:3, 3:]
    inside = ((place >= -0.5) & (place <= np.array(shape)[:, None] - 0.5)).all(axis=0)
    return inside.reshape(grid.shape)


def _antialias(matrix: np.ndarray) -> np.ndarray:
    """SD (source voxels) of the Gaussian that makes source voxels as wide as target voxels; 0 where they are finer.

    The full width at half maximum is sqrt(target^2 - source^2), the difference of the two point-spread functions
    (Cardoso et al., "Scale factor point spread function matching", MICCAI 2015).
    """
    # `matrix` maps target to source voxels: along each source axis, the target step measured in source voxels.
    step = np.sqrt((matrix[:3, :3] ** 2).sum(axis=1))
    return np.sqrt(np.maximum(step**2 - 1, 0)) / np.sqrt(8 * np.log(2)) * (step > 1.01)


def _resample_space(
    image: nib.Nifti1Image, affine: np.ndarray, brain_XYZ: np.ndarray, grid: Grid, run: RunSource
) -> np.ndarray:
    """Cubic B-spline values at the brain voxels of the grid; float32 (T, N)."""
    matrix = np.linalg.inv(affine) @ grid.affine
    place_3N = matrix[:3, :3] @ np.argwhere(brain_XYZ).T + matrix[:3, 3:]
    sigma = _antialias(matrix)
    rounded = np.rint(place_3N)
    aligned = not sigma.any() and bool(np.abs(place_3N - rounded).max() < 1e-3)
    if aligned:
        index = tuple(np.clip(rounded, 0, np.array(image.shape[:3])[:, None] - 1).astype(np.intp))
    out_TN = np.empty((image.shape[3], place_3N.shape[1]), np.float32)
    # A gzipped file is decompressed once, into its stored type (mostly int16); a plain one is read frame by frame.
    proxy: Any = image.dataobj
    whole = None
    slope, inter = 1.0, 0.0
    if str(run.bold).endswith((".gz", ".bz2")):
        try:
            whole = np.asanyarray(proxy.get_unscaled())
        except Exception as error:
            raise RunRefused(run.source, "data", f"unreadable ({error})", "a complete file", "Copy it again") from None
        slope, inter = float(proxy.slope), float(proxy.inter)
    for frame in range(image.shape[3]):
        if whole is not None:
            volume = whole[..., frame].astype(np.float32) * np.float32(slope) + np.float32(inter)
        else:
            volume = _frames(image, run, np.array([frame]))[..., 0]
        if not np.isfinite(volume).all():
            raise RunRefused(run.source, "data", f"NaN or Inf in frame {frame}", "finite values",
                             "Repair the preprocessing, or leave the run out")
        if sigma.any():
            volume = ndimage.gaussian_filter(volume, sigma, mode="nearest")
        if aligned:
            out_TN[frame] = volume[index]
        else:
            spline = ndimage.spline_filter(volume, order=3, output=np.float32, mode="nearest")
            ndimage.map_coordinates(spline, place_3N, out_TN[frame], order=3, mode="nearest", prefilter=False)
    return out_TN


def _resample_time(source_TN: np.ndarray, source_tr: float, settings: GridSettings) -> tuple[np.ndarray, float]:
    """Cubic B-spline in time to `settings.tr`; no frame lies outside the measured span. Returns (T, N) and the TR."""
    low, high = settings.tr_range
    if low <= source_tr <= high:
        return source_TN, source_tr
    seconds = np.arange(len(source_TN)) * source_tr
    wanted = np.arange(int(np.floor(seconds[-1] / settings.tr + 1e-9)) + 1) * settings.tr
    out_TN = np.empty((len(wanted), source_TN.shape[1]), np.float32)
    for first in range(0, source_TN.shape[1], VOXEL_BLOCK):
        block = slice(first, first + VOXEL_BLOCK)
        out_TN[:, block] = make_interp_spline(seconds, source_TN[:, block], k=3)(wanted)
    return out_TN, settings.tr


def _normalise(
    run: RunSource, raw_TN: np.ndarray, brain_XYZ: np.ndarray, grid: Grid, tr: float, source_tr: float,
    facts: dict[str, Any],
) -> Harmonised:
    """Global z-score inside the mask, split into baseline and fluctuation, gathered into patches."""
    mean_N = raw_TN.mean(axis=0, dtype=np.float64)
    variance_N = raw_TN.var(axis=0, dtype=np.float64)
    mean = float(mean_N.mean())
    # the run's SD over all brain voxels and frames: within-voxel plus between-voxel variance
    sd = float(np.sqrt(variance_N.mean() + mean_N.var()))
    if not sd > 1e-12 * max(abs(mean), 1e-30) or not variance_N.max() > 0:
        raise RunRefused(run.source, "data", "the same value everywhere", "a signal that varies")
    patch_P3 = patches.patch_places(brain_XYZ, grid.patch)
    slots_N = patches.voxel_slots(brain_XYZ, patch_P3, grid.patch)
    size = len(patch_P3) * grid.voxels

    def to_patches(values_N: np.ndarray) -> np.ndarray:
        flat = np.zeros(size, np.float32)
        flat[slots_N] = values_N
        return flat.reshape(len(patch_P3), grid.voxels)

    fluctuation = np.zeros((len(raw_TN), size), np.float32)
    for frame, values_N in enumerate(raw_TN):
        fluctuation[frame, slots_N] = (values_N - mean_N) / sd
    facts["global_mean"], facts["global_sd"] = round(mean, 6), round(sd, 6)
    return Harmonised(
        fluctuation_TPV=fluctuation.reshape(len(raw_TN), len(patch_P3), grid.voxels),
        baseline_PV=to_patches((mean_N - mean) / sd), spread_PV=to_patches(np.sqrt(variance_N) / sd),
        patch_P3=patch_P3, brain_XYZ=brain_XYZ, raw_TN=raw_TN, tr=tr, source_tr=source_tr, facts=facts,
    )
