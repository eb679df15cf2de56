"""Anatomy of the synthetic cohort: a brain in MNI space, its tissue and its networks."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from nibabel.affines import apply_affine
from nilearn.datasets import load_mni152_brain_mask, load_mni152_gm_template
from scipy.ndimage import gaussian_filter, map_coordinates
from scipy.sparse import csr_array

from shards.format.grid import MNI_CENTRE_MM
from shards.synthetic.truth import NETWORKS, both_sides, rng_of

FOCUS_SD_MM = 13.0
BASELINE = 10_000.0
NETWORK_PERCENT, GLOBAL_PERCENT, DRIFT_PERCENT = 1.0, 0.3, 0.3  # SD of a voxel, percent of its baseline
FINE_PERCENT, FINE_WAVES_MM = 0.7, (16.0, 21.0)  # of fine patterns: percent as above, and wavelengths along an axis
CUBE_MM = 24.0  # edge of the cubes in which fine patterns have mean 0, as that of the cubes of a dataset
PARCELS, LEAST_GREY = 200, 0.3  # parcels of a hemisphere, and the share of grey matter from which a voxel is in one
NOISE_FWHM_MM, NOISE_TIME_S = 6.0, 0.8


@dataclass(frozen=True)
class Anatomy:
    """The anatomy shared by all subjects: the grid, the mask, a template and the maps of the networks.

    `template_V` is the mean image in scanner units and `grey_V` the share of grey matter (0-1). `map_NV` is the change
    of a voxel, in percent of its baseline, per SD of a network's activity. Of recipe 3 alone (see `fine`): `fine_NV` is
    the change of a voxel in scanner units per SD of the activity of a network's fine pattern, and `parcel_V` the number
    of its parcel, 0 for none.
    """

    affine: np.ndarray
    mask_XYZ: np.ndarray
    mm_V3: np.ndarray
    grey_V: np.ndarray
    template_V: np.ndarray
    map_NV: np.ndarray
    fine_NV: np.ndarray | None = None
    parcel_V: np.ndarray | None = None


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
def anatomy(voxel_mm: float, recipe: int = 2) -> Anatomy:
    """The MNI152 brain on an RAS+ grid with voxels of `voxel_mm` and a margin of at least one voxel.

    A voxel centre lies on the midline. With recipe 3, the voxels are those of the common grid of datasets, so that
    conversion at `voxel_mm` does not interpolate, and no voxel mixes what is fine.
    """
    resolution = 1 if voxel_mm < 2 else 2
    brain, grey = load_mni152_brain_mask(resolution), load_mni152_gm_template(resolution)
    inside = np.asarray(brain.dataobj) > 0
    brain_mm = apply_affine(brain.affine, np.argwhere(inside))
    origin_mm = np.zeros(3) if recipe == 2 else np.asarray(MNI_CENTRE_MM) + voxel_mm / 2
    low = np.floor((brain_mm.min(0) - origin_mm) / voxel_mm).astype(int) - 1
    high = np.ceil((brain_mm.max(0) - origin_mm) / voxel_mm).astype(int) + 1
    shape = tuple(int(n) for n in high - low + 1)
    affine = np.diag([voxel_mm, voxel_mm, voxel_mm, 1.0])
    affine[:3, 3] = origin_mm + low * voxel_mm

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
    template_V = (BASELINE * (0.8 + 0.35 * grey_V) * (1 - loss_V)).astype(np.float32)
    map_NV = np.stack([blobs(foci, mm_V3) for foci in NETWORKS.values()]) * (0.25 + 0.75 * grey_V)
    map_NV *= NETWORK_PERCENT / np.sqrt((map_NV**2).sum(0).mean())
    coarse = Anatomy(affine, mask_XYZ, mm_V3, grey_V, template_V, map_NV.astype(np.float32))
    return coarse if recipe == 2 else with_fine_patterns(coarse)


def blobs(foci: list[tuple[int, int, int]], mm_V3: np.ndarray) -> np.ndarray:
    """The maximum (V,) of Gaussians around `foci`, with the value 1 at each focus."""
    nearest_V = np.min([((mm_V3 - np.asarray(focus, np.float32)) ** 2).sum(1) for focus in foci], axis=0)
    return np.exp(-nearest_V / (2 * FOCUS_SD_MM**2))


# ---------------------------------------------------------------- finer than parcels (recipe 3)


def with_fine_patterns(brain: Anatomy) -> Anatomy:
    """Add parcels, and for each network a fine pattern that vanishes in the mean of every parcel and cube.

    A fine pattern is a random field of short waves where the network is, so short that neighbouring voxels of 8 mm
    mostly differ in sign, and means over any compact parcel are small. From it, the mean of each 24 mm cube of the
    common grid and of each parcel is taken away at once: the least change of the pattern, by least squares. It is in
    scanner units and equal in all people, so that the mean over a parcel is 0 whatever their baseline is.
    """
    parcel_V = _parcels(brain)
    cube_V3 = np.floor((brain.mm_V3 - np.asarray(MNI_CENTRE_MM, np.float32)) / CUBE_MM).astype(int)
    cube_V = np.unique(cube_V3, axis=0, return_inverse=True)[1].ravel()
    in_a_parcel = np.flatnonzero(parcel_V)
    row_V = np.concatenate([cube_V, cube_V.max() + parcel_V[in_a_parcel]])
    column_V = np.concatenate([np.arange(len(cube_V)), in_a_parcel])
    belongs_GV = csr_array((np.ones(len(row_V)), (row_V, column_V)))
    inverse_GG = np.linalg.pinv((belongs_GV @ belongs_GV.T).toarray(), hermitian=True)

    fine_NV = np.empty((len(NETWORKS), len(cube_V)))
    for number, map_V in enumerate(brain.map_NV):
        fine_V = _short_waves(rng_of(0, "fine_pattern", number), brain.mm_V3) * map_V * brain.template_V
        fine_NV[number] = fine_V - belongs_GV.T @ (inverse_GG @ (belongs_GV @ fine_V))
    share_NV = fine_NV / brain.template_V
    fine_NV *= FINE_PERCENT / 100 / np.sqrt((share_NV**2).sum(0).mean())
    return replace(brain, fine_NV=fine_NV.astype(np.float32), parcel_V=parcel_V)


def _short_waves(rng: np.random.Generator, mm_V3: np.ndarray) -> np.ndarray:
    """A random field (V,) of waves that are short along each axis, independent of the voxel size."""
    field_V = np.zeros(len(mm_V3))
    for _ in range(32):
        per_mm_3 = rng.choice([-1, 1], 3) / rng.uniform(*FINE_WAVES_MM, 3)
        field_V += np.cos(mm_V3.astype(np.float64) @ (2 * np.pi * per_mm_3) + rng.uniform(0, 2 * np.pi))
    return field_V


def _parcels(brain: Anatomy) -> np.ndarray:
    """Compact parcels of the grey matter, `PARCELS` in each hemisphere, of similar size; int32 (V,), 0 outside.

    Each hemisphere is sampled by farthest points; a voxel belongs to the nearest. Their size is that of the 400 parcels
    of Schaefer et al. 2018. The voxels do not decide where parcels lie: each is as large in mm at any voxel size.
    """
    parcel_V = np.zeros(len(brain.mm_V3), np.int32)
    for number, side in enumerate((-1, 1)):
        here = np.flatnonzero((brain.grey_V > LEAST_GREY) & (np.sign(brain.mm_V3[:, 0]) == side))
        mm_H3 = brain.mm_V3[here].astype(np.float64)
        nearest_H, distance_H = np.zeros(len(here), np.int32), np.full(len(here), np.inf)
        point = int(np.lexsort(mm_H3.T)[0])
        for parcel in range(1, PARCELS + 1):
            closer_H = (away_H := ((mm_H3 - mm_H3[point]) ** 2).sum(1)) < distance_H
            nearest_H[closer_H], distance_H[closer_H] = parcel, away_H[closer_H]
            point = int(distance_H.argmax())
        parcel_V[here] = nearest_H + number * PARCELS
    return parcel_V
