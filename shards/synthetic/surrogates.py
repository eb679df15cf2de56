"""Noise that is real: surrogates of a scan, by multivariate phase randomisation.

A surrogate has the spectrum of every voxel and all correlations between voxels of the scan, but none of its time
course: the phases of each frequency are moved by a random angle, the same for all voxels (Prichard and Theiler 1994,
Phys. Rev. Lett. 73, 951).

Shape suffixes: T frames of the scan, V voxels of the cohort's mask, XYZ the cohort's grid, K frequencies above 0, 3
coordinates.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import nibabel as nib
import numpy as np
from nibabel.affines import apply_affine
from nilearn.image import mean_img, resample_img
from nilearn.masking import compute_epi_mask
from scipy.ndimage import distance_transform_edt, label
from scipy.signal import detrend

from shards.core.errors import ConfigError
from shards.core.nifti import open_image
from shards.synthetic.anatomy import Anatomy, anatomy

LEAST_FRAMES = 20


class Surrogates:
    """Surrogates of a scan on the voxels of a cohort.

    Attributes
    ----------
    tr : float
        TR of the scan, s.
    frames : int
        Frames of the scan, T.
    spectrum_KV : complex64 array
        Fourier coefficients of the fluctuation; its RMS over voxels and frames is 1.
    """

    def __init__(self, series_TV: np.ndarray, tr: float):
        self.tr, self.frames = tr, len(series_TV)
        spectrum_KV = np.fft.rfft(series_TV, axis=0)[1:]
        spectrum_KV[: (self.frames - 1) // 2] *= 2  # of each pair of frequencies, one is stored
        spectrum_KV /= self.frames * np.sqrt(np.mean(np.square(series_TV)))
        self.spectrum_KV = spectrum_KV.astype(np.complex64)

    def course(self, rng: np.random.Generator, count: int, tr: float) -> Iterator[np.ndarray]:
        """Iterate over `count` frames of a new surrogate, each (V,) float32, at any TR.

        The series is periodic and band-limited, so it is evaluated between the frames of the scan, too, and goes on
        after its end.
        """
        bins_K = np.arange(1, len(self.spectrum_KV) + 1)
        phase_K = rng.uniform(0, 2 * np.pi, len(bins_K))
        for frame in range(count):
            turn_K = np.exp(1j * (phase_K + 2 * np.pi * bins_K * (frame * tr / self.tr) / self.frames))
            yield (turn_K.astype(np.complex64) @ self.spectrum_KV).real


@lru_cache(maxsize=2)
def surrogates(path: Path, voxel_mm: float, recipe: int) -> Surrogates:
    """Read a scan onto the voxels of a cohort.

    The scan is not registered: the centre of its brain is moved to the centre of the MNI152 brain. A voxel outside its
    brain takes the series of the nearest voxel inside. Each series is in percent of its mean, without linear trend.

    Raises
    ------
    ConfigError
        If it is not a scan of at least 20 frames with a brain.
    """
    opened = open_image(path, path, error=ConfigError)
    if len(opened.shape) != 4 or opened.shape[3] < LEAST_FRAMES:
        raise ConfigError(path, "dim", "x".join(map(str, opened.shape)), f"x, y, z and at least {LEAST_FRAMES} frames")
    tr = float(opened.header.get_zooms()[3])
    if not 0 < tr <= 10:
        raise ConfigError(path, "pixdim[4]", tr, "the TR: more than 0 and at most 10 s")
    brain = anatomy(voxel_mm, recipe)
    try:
        image = nib.Nifti1Image(np.asarray(opened.dataobj, dtype=np.float32), opened.affine)
        inside = compute_epi_mask(image)
        image = _moved(image, inside, brain)
        series_TV = _series(image, nib.Nifti1Image(inside.dataobj, image.affine), brain)
    except ConfigError:
        raise
    except Exception as error:  # gzip, nibabel and nilearn raise many types of exception for damaged files
        raise ConfigError(
            path, "", f"{type(error).__name__}: {error}", "a scan with a brain that can be read"
        ) from None
    if not np.isfinite(series_TV).all() or not series_TV.std():
        raise ConfigError(path, "data", "no finite fluctuation in the brain", "a scan with a signal")
    return Surrogates(series_TV, tr)


def _moved(image: nib.Nifti1Image, inside: nib.Nifti1Image, brain: Anatomy) -> nib.Nifti1Image:
    """The scan with the centre of its brain at the centre of the MNI152 brain."""
    centre_3 = apply_affine(image.affine, np.argwhere(np.asarray(inside.dataobj) > 0)).mean(axis=0)
    affine = image.affine.copy()
    affine[:3, 3] += brain.mm_V3.mean(axis=0) - centre_3
    return nib.Nifti1Image(image.dataobj, affine)


def _series(image: nib.Nifti1Image, inside: nib.Nifti1Image, brain: Anatomy) -> np.ndarray:
    """Percent of the mean of each voxel of the cohort's mask, (T, V), without linear trend."""
    shape = brain.mask_XYZ.shape
    to = {"target_affine": brain.affine, "target_shape": shape, "force_resample": True, "copy_header": True}
    found_XYZ = np.asarray(resample_img(inside, interpolation="nearest", **to).dataobj) > 0
    found_XYZ &= np.asarray(resample_img(mean_img(image, copy_header=True), **to).dataobj) > 0
    part_XYZ, count = label(found_XYZ)
    if not count:
        raise ValueError("no voxel of its brain is in the MNI152 brain")
    found_XYZ = part_XYZ == 1 + np.bincount(part_XYZ[part_XYZ > 0] - 1).argmax()
    nearest_3V = distance_transform_edt(~found_XYZ, return_distances=False, return_indices=True)[:, brain.mask_XYZ]
    frames = [resample_img(image.slicer[..., t], **to).get_fdata(dtype=np.float32) for t in range(image.shape[3])]
    value_TV = np.stack([frame_XYZ[tuple(nearest_3V)] for frame_XYZ in frames])
    mean_V = value_TV.mean(axis=0)
    return detrend(100 * (value_TV / mean_V - 1), axis=0)
