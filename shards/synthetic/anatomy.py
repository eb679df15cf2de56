"""Anatomy of the synthetic cohort: a brain in MNI space, its tissue and its networks."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from nibabel.affines import apply_affine
from nilearn.datasets import load_mni152_brain_mask, load_mni152_gm_template
from scipy.ndimage import gaussian_filter, map_coordinates

from shards.synthetic.truth import NETWORKS, both_sides

FOCUS_SD_MM = 13.0
BASELINE = 10_000.0
NETWORK_PERCENT, GLOBAL_PERCENT, DRIFT_PERCENT = 1.0, 0.3, 0.3  # SD of a voxel, percent of its baseline
NOISE_FWHM_MM, NOISE_TIME_S = 6.0, 0.8


@dataclass(frozen=True)
class Anatomy:
    """The anatomy shared by all subjects: the grid, the mask, a template and the maps of the networks.

    `template_V` is the mean image in scanner units and `grey_V` the share of grey matter (0-1). `map_NV` is the change
    of a voxel, in percent of its baseline, per SD of a network's activity.
    """

    affine: np.ndarray
    mask_XYZ: np.ndarray
    mm_V3: np.ndarray
    grey_V: np.ndarray
    template_V: np.ndarray
    map_NV: np.ndarray


def smooth_field(rng: np.random.Generator, mm_V3: np.ndarray) -> np.ndarray:
    """A random field (V,) of unit SD with wavelengths of 50-120 mm, independent of the voxel size."""
    waves = 32
    field_V = np.zeros(len(mm_V3), np.float32)
    for _ in range(waves):
        direction = rng.standard_normal(3)
        wave = direction / np.linalg.norm(direction) * (2 * np.pi / rng.uniform(50, 120))
        field_V += np.cos(mm_V3 @ wave + rng.uniform(0, 2 * np.pi))
    return field_V * np.float32(np.sqrt(2 / waves))


@lru_cache(maxsize=2)
def anatomy(voxel_mm: float) -> Anatomy:
    """The MNI152 brain on an RAS+ grid with voxels of `voxel_mm` and a margin of at least one voxel."""
    resolution = 1 if voxel_mm < 2 else 2
    brain, grey = load_mni152_brain_mask(resolution), load_mni152_gm_template(resolution)
    inside = np.asarray(brain.dataobj) > 0
    brain_mm = apply_affine(brain.affine, np.argwhere(inside))
    low = np.floor(brain_mm.min(0) / voxel_mm).astype(int) - 1
    high = np.ceil(brain_mm.max(0) / voxel_mm).astype(int) + 1
    shape = tuple(int(n) for n in high - low + 1)
    affine = np.diag([voxel_mm, voxel_mm, voxel_mm, 1.0])
    affine[:3, 3] = low * voxel_mm  # voxel centres at multiples of the voxel size, so one lies on the midline

    mm_3XYZ = np.moveaxis(apply_affine(affine, np.moveaxis(np.indices(shape), 0, -1)), -1, 0)
    source = apply_affine(np.linalg.inv(brain.affine), mm_3XYZ.reshape(3, -1).T).T.reshape(mm_3XYZ.shape)
    mask_XYZ = map_coordinates(inside.astype(np.float32), source, order=1) >= 0.5
    # Smooth to the new voxel size first, so that a coarse grid averages the tissue instead of sampling it.
    sigma = max(NOISE_FWHM_MM, voxel_mm) / 2.355 / resolution
    blurred = gaussian_filter(np.asarray(grey.dataobj, dtype=np.float32), sigma)
    grey_V = np.clip(map_coordinates(blurred, source, order=1)[mask_XYZ], 0, 1)
    mm_V3 = mm_3XYZ[:, mask_XYZ].T.astype(np.float32)

    # In EPI, grey matter is brighter than white matter, and signal is lost above the sinuses and the ear canals.
    loss_V = 0.4 * blobs([(0, 40, -20), *both_sides(50, -10, -34)], mm_V3)
    template_V = BASELINE * (0.8 + 0.35 * grey_V) * (1 - loss_V)
    map_NV = np.stack([blobs(foci, mm_V3) for foci in NETWORKS.values()]) * (0.25 + 0.75 * grey_V)
    map_NV *= NETWORK_PERCENT / np.sqrt((map_NV**2).sum(0).mean())
    return Anatomy(affine, mask_XYZ, mm_V3, grey_V, template_V.astype(np.float32), map_NV.astype(np.float32))


def blobs(foci: list[tuple[int, int, int]], mm_V3: np.ndarray) -> np.ndarray:
    """The maximum (V,) of Gaussians around `foci`, with the value 1 at each focus."""
    nearest_V = np.min([((mm_V3 - np.asarray(focus, np.float32)) ** 2).sum(1) for focus in foci], axis=0)
    return np.exp(-nearest_V / (2 * FOCUS_SD_MM**2))
