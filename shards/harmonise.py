"""One run in, one harmonised run out: orientation, grid, TR, mask and normalisation.

A pure function of the run and its settings. Space first (cubic B-spline at the brain voxels alone), then time (cubic
B-spline per voxel, inside the measured span), then a global z-score inside the mask, kept as two parts: the baseline
(each voxel's mean) and the fluctuation around it, because the fluctuation is a few per cent of the anatomical contrast
and would be lost in half precision beside it.

Legend: X, Y, Z voxels of the target grid; S source voxels; N brain voxels (C order of the grid); T frames; P patches;
V voxels of a patch; 3 the axes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import nibabel as nib
import numpy as np
from nilearn.masking import compute_epi_mask
from pydantic import Field, model_validator
from scipy import ndimage, sparse
from scipy.interpolate import make_interp_spline

from shards import patches, quality
from shards.cohort import RunSource, header_tr
from shards.errors import RunRefused
from shards.grid import Grid
from shards.settings import Settings

VOXEL_BLOCK = 16384  # voxels resampled in time at once
FRAME_BLOCK = 16  # frames resampled in space at once
ROUNDING = 1e-6  # what interpolation in float32 adds to a constant signal, relative to it


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
        raise RunRefused(
            run.source, "mask", f"{outside:.0%} of the brain outside the grid", f"at most {settings.outside:.0%}", hint
        )

    brain_XYZ = _resample_mask(mask.get_fdata() > 0.5, mask_affine, grid)
    brain_XYZ &= _field_of_view(image.shape[:3], affine, grid)
    if not brain_XYZ.any():
        raise RunRefused(run.source, "mask", "no brain voxel on the grid", "a mask that overlaps run and grid")

    source_TN = _resample_space(image, affine, brain_XYZ, grid, run)
    raw_TN, tr = _resample_time(source_TN, source_tr, settings)
    del source_TN

    mean_N, variance_N = quality.mean_and_variance(raw_TN)
    facts: dict[str, Any] = {
        **quality.of_run(raw_TN, mean_N, variance_N, brain_voxel_ml=grid.mm**3 / 1000),
        "mask_outside_grid": round(outside, 4),
        "mask_source": mask_source,
        "space": run.space,
    }
    if run.space == "native":
        facts["centred_by_mm"] = [round(float(value), 2) for value in moved_mm]
    if run.confounds is not None:
        facts["mean_fd_mm"] = quality.mean_framewise_displacement(run.confounds)
    return _normalise(run, raw_TN, mean_N, variance_N, brain_XYZ, grid, tr, source_tr, facts)


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
        raise RunRefused(
            run.source,
            "dim",
            "x".join(map(str, image.shape)),
            "x, y, z and at least 4 frames",
            "Leave files that are no runs out of the pattern",
        )
    if image.get_data_dtype().kind not in "iuf":
        raise RunRefused(run.source, "datatype", f"complex or colour values ({image.get_data_dtype()})", "real numbers")
    if int(image.header["qform_code"]) == 0 and int(image.header["sform_code"]) == 0:
        raise RunRefused(
            run.source,
            "qform_code, sform_code",
            "0, 0: position and orientation unknown",
            "a code above 0",
            "Restore the header from the original scan",
        )
    if not np.isfinite(image.affine).all() or abs(np.linalg.det(image.affine[:3, :3])) < 1e-6:
        raise RunRefused(run.source, "affine", "singular or not finite", "an invertible affine")
    return image


def _mask(run: RunSource, image: nib.Nifti1Image) -> tuple[nib.Nifti1Image, str]:
    """The brain mask as a 3-D image on any grid, and where it came from."""
    if run.mask is None:
        # nilearn's EPI mask of the mean of at most 100 frames spread over the run: enough for a stable mean image
        frames = np.unique(np.linspace(0, image.shape[3] - 1, min(100, image.shape[3])).astype(int))
        mean = np.zeros(image.shape[:3])
        for volume in _volumes(image, run, frames):
            mean += volume / len(frames)
        try:
            mask = compute_epi_mask(nib.Nifti1Image(mean.astype(np.float32), image.affine))
        except Exception as error:
            raise RunRefused(
                run.source,
                "mask",
                f"none could be computed ({error})",
                "a brain in the image",
                "Give a `mask` in the cohort file",
            ) from None
        source = "computed"
    else:
        if not run.mask.is_file():
            raise RunRefused(run.source, "mask", f"no file {run.mask}", "the mask the cohort file names")
        try:
            loaded: Any = nib.load(run.mask)
            values = np.asarray(loaded.dataobj, np.float32)
        except Exception as error:
            raise RunRefused(run.source, "mask", f"{run.mask}: {type(error).__name__}", "a NIfTI mask") from None
        if values.ndim == 4 and values.shape[3] == 1:
            values = values[..., 0]
        if values.ndim != 3:
            raise RunRefused(run.source, "mask", f"{run.mask} with {values.ndim} dimensions", "three dimensions")
        if not isinstance(loaded, nib.Nifti1Image):
            raise RunRefused(run.source, "mask", f"{run.mask}: {type(loaded).__name__}", "a NIfTI mask")
        if not int(loaded.header["qform_code"]) and not int(loaded.header["sform_code"]):
            raise RunRefused(
                run.source,
                "mask",
                f"{run.mask} with qform_code and sform_code 0: position unknown",
                "a code above 0",
                "Restore the mask's header",
            )
        mask = nib.Nifti1Image((values > 0.5).astype(np.uint8), loaded.affine)
        source = run.mask.name
    if not (mask.get_fdata() > 0.5).any():
        raise RunRefused(run.source, "mask", f"an empty mask ({source})", "a mask with brain voxels")
    return mask, source


def _volumes(image: nib.Nifti1Image, run: RunSource, frames: Iterable[int]) -> Iterator[np.ndarray]:
    """Frames of a run one by one, float32 (x, y, z), checked to be finite.

    The file is read front to back, one frame in memory at a time, whether it is compressed or not.
    """
    proxy: Any = image.dataobj
    shape, dtype = image.shape[:3], proxy.dtype
    size = math.prod(shape) * dtype.itemsize
    wanted = set(map(int, frames))
    try:
        with image.file_map["image"].get_prepare_fileobj("rb") as file:
            file.seek(proxy.offset)
            for frame in range(image.shape[3]):
                data = file.read(size)
                if len(data) < size:
                    raise EOFError(f"it ends in frame {frame} of {image.shape[3]}")
                if frame not in wanted:
                    continue
                stored = np.frombuffer(data, dtype).reshape(shape, order="F")
                volume = stored * np.float64(proxy.slope) + np.float64(proxy.inter)
                with np.errstate(over="ignore"):
                    volume = volume.astype(np.float32)
                if not np.isfinite(volume).all():
                    raise RunRefused(
                        run.source,
                        "data",
                        f"NaN or Inf in frame {frame}",
                        "finite values",
                        "Repair the preprocessing, or leave the run out",
                    )
                yield volume
            file.read(1)  # the end of a gzip file, where its checksum is compared
    except RunRefused:
        raise
    except Exception as error:  # gzip, zlib and nibabel raise many types for damaged files
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
    else:
        weights_NS = _spline_weights(place_3N, image.shape[:3])
    out_TN = np.empty((image.shape[3], place_3N.shape[1]), np.float32)
    coefficients_SB = np.empty((math.prod(image.shape[:3]), FRAME_BLOCK), np.float32)
    for frame, volume in enumerate(_volumes(image, run, range(image.shape[3]))):
        if sigma.any():
            volume = ndimage.gaussian_filter(volume, sigma, mode="nearest")
        if aligned:
            out_TN[frame] = volume[index]
            continue
        filled = frame % FRAME_BLOCK + 1
        coefficients_SB[:, filled - 1] = ndimage.spline_filter(volume, 3, np.float32, "mirror").ravel()
        if filled == FRAME_BLOCK or frame + 1 == len(out_TN):
            out_TN[frame + 1 - filled : frame + 1] = (weights_NS @ coefficients_SB[:, :filled]).T
    return out_TN


def _spline_weights(place_3N: np.ndarray, shape: tuple[int, ...]) -> sparse.csr_array:
    """Cubic B-spline interpolation as a sparse matrix (N, S): times the coefficients, it gives the values.

    The weights are the same in every frame: computed once, they make interpolation several times faster than
    `ndimage.map_coordinates` frame by frame. Places outside the lattice take the value at its border.
    """
    flat_N444, weight_N444 = np.zeros((1, 1, 1, 1), np.int32), np.ones((1, 1, 1, 1), np.float32)
    for axis, size in enumerate(shape):
        place_N = np.clip(place_3N[axis], 0, size - 1)
        below_N = np.floor(place_N)
        t_N = place_N - below_N
        weight_N4 = (
            np.stack(
                [(1 - t_N) ** 3, 3 * t_N**3 - 6 * t_N**2 + 4, 3 * (1 - t_N) ** 3 - 6 * (1 - t_N) ** 2 + 4, t_N**3],
                axis=1,
            )
            / 6
        )
        # beyond the ends the coefficients are mirrored, as `ndimage.spline_filter` takes them to be
        period = max(1, 2 * (size - 1))
        index_N4 = (below_N[:, None].astype(np.int32) + np.arange(-1, 3, dtype=np.int32)) % period
        index_N4 = np.where(index_N4 >= size, period - index_N4, index_N4)
        taps = [len(place_N), 1, 1, 1]
        taps[1 + axis] = 4
        flat_N444 = flat_N444 * np.int32(size) + index_N4.reshape(taps)
        weight_N444 = weight_N444 * weight_N4.astype(np.float32).reshape(taps)
    rows = np.arange(0, weight_N444.size + 1, 64)
    return sparse.csr_array((weight_N444.ravel(), flat_N444.ravel(), rows), (place_3N.shape[1], math.prod(shape)))


def _resample_time(source_TN: np.ndarray, source_tr: float, settings: GridSettings) -> tuple[np.ndarray, float]:
    """Cubic B-spline in time to `settings.tr`; no frame lies outside the measured span. Returns (T, N) and the TR."""
    low, high = settings.tr_range
    if low <= source_tr <= high:
        return source_TN, source_tr
    seconds = np.arange(len(source_TN)) * source_tr
    wanted = np.arange(int(np.floor(seconds[-1] / settings.tr + 1e-9)) + 1) * settings.tr
    # Interpolation is linear in the series and the same for every voxel: the splines through unit impulses, whose
    # influence fades by a factor of 3.7 per frame, are a banded matrix.
    impulse_TT = make_interp_spline(seconds, np.eye(len(seconds)), k=3)(wanted)
    weights_TT = sparse.csr_array(np.where(np.abs(impulse_TT) > 1e-9, impulse_TT, 0).astype(np.float32))
    out_TN = np.empty((len(wanted), source_TN.shape[1]), np.float32)
    for first in range(0, source_TN.shape[1], VOXEL_BLOCK):
        block = slice(first, first + VOXEL_BLOCK)
        mean_B = source_TN[:, block].mean(axis=0)  # apart, or the fluctuation would lose digits beside it
        out_TN[:, block] = weights_TT @ (source_TN[:, block] - mean_B) + mean_B
    return out_TN, settings.tr


def _normalise(
    run: RunSource,
    raw_TN: np.ndarray,
    mean_N: np.ndarray,
    variance_N: np.ndarray,
    brain_XYZ: np.ndarray,
    grid: Grid,
    tr: float,
    source_tr: float,
    facts: dict[str, Any],
) -> Harmonised:
    """Global z-score inside the mask, split into baseline and fluctuation, gathered into patches."""
    mean = float(mean_N.mean())
    # the run's SD over all brain voxels and frames: within-voxel plus between-voxel variance
    sd = float(np.sqrt(variance_N.mean() + mean_N.var()))
    if not float(np.sqrt(variance_N.mean())) > ROUNDING * np.abs(mean_N).max():
        raise RunRefused(
            run.source, "data", "the same volume in every frame", "a signal that varies in time", "Leave the run out"
        )
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
        baseline_PV=to_patches((mean_N - mean) / sd),
        spread_PV=to_patches(np.sqrt(variance_N) / sd),
        patch_P3=patch_P3,
        brain_XYZ=brain_XYZ,
        raw_TN=raw_TN,
        tr=tr,
        source_tr=source_tr,
        facts=facts,
    )
