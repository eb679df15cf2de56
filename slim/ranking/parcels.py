"""The parcels of stage 1: cubes of the brain mask, or the parcels of a label image in MNI space.

Shape suffixes: X Y Z voxels of the grid; R parcels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
from scipy import ndimage

from shards.conversion.session import ParcelSettings
from shards.core.errors import ConfigError
from shards.core.nifti import affine_mm, code_of, open_image
from shards.format.grid import Grid


def parcels_from_mask(brain_XYZ: np.ndarray, mm: float, cube_mm: float = 24.0, least: float = 0.1) -> np.ndarray:
    """Cubic parcels of a brain mask. No atlas is needed, and labels are equal for all subjects on the same grid.

    Parameters
    ----------
    brain_XYZ : bool array
        The brain mask.
    mm : float
        Voxel edge in mm.
    cube_mm : float
        Cube edge in mm, rounded to whole voxels (at least one). The first cube starts at the first voxel of the grid.
    least : float
        Smallest share of a whole cube that must be brain.

    Returns
    -------
    labels_XYZ : int32 array
        0 for no parcel; otherwise 1 + the cube's flat index (C order) in the grid of cubes.

    Raises
    ------
    ConfigError
        If the mask does not have three dimensions, or an edge is not a positive number.
    """
    brain_XYZ = np.asarray(brain_XYZ, dtype=bool)
    if brain_XYZ.ndim != 3:
        raise ConfigError("parcels", "brain mask", f"{brain_XYZ.ndim} dimensions", "3 dimensions")
    if not (0 < mm < math.inf and 0 < cube_mm < math.inf):
        raise ConfigError("parcels", "mm, cube_mm", f"{mm}, {cube_mm}", "positive edges in mm")
    edge = max(1, round(cube_mm / mm))
    x, y, z = (np.arange(size) // edge for size in brain_XYZ.shape)
    _, n_y, n_z = (-(-size // edge) for size in brain_XYZ.shape)
    cube_XYZ = (x[:, None, None] * n_y + y[:, None]) * n_z + z
    counts = np.bincount(cube_XYZ[brain_XYZ], minlength=int(cube_XYZ.max(initial=0)) + 1)
    enough = (counts > 0) & (counts >= least * edge**3)
    return np.where(brain_XYZ & enough[cube_XYZ], cube_XYZ + 1, 0).astype(np.int32)


def read_labels(path: Path, grid: Grid) -> np.ndarray:
    """Read a label image in MNI space, and resample it to the grid by nearest neighbour.

    Parameters
    ----------
    path : Path
        A NIfTI image of integers, 0 for no parcel. It has three dimensions, or four with one volume.
    grid : Grid

    Returns
    -------
    labels_XYZ : int32 array
        Labels on the grid; 0 outside the image.

    Raises
    ------
    ConfigError
        If the file is not such an image, its header has no position, or fewer than two of its parcels lie on the grid.
    """
    image = open_image(path, path, error=ConfigError)
    try:
        value_XYZ = np.asarray(image.dataobj)
    except Exception as error:  # gzip and zlib raise many types of exception for damaged files
        raise ConfigError(path, "", f"unreadable ({type(error).__name__})", "a NIfTI label image") from None
    if value_XYZ.ndim == 4 and value_XYZ.shape[3] == 1:
        value_XYZ = value_XYZ[..., 0]
    if value_XYZ.ndim != 3:
        got, hint = "x".join(map(str, value_XYZ.shape)), "Convert a probabilistic atlas to labels first"
        raise ConfigError(path, "dim", got, "x, y, z", hint)
    if value_XYZ.dtype.kind not in "iuf":
        raise ConfigError(path, "datatype", value_XYZ.dtype, "integers")
    with np.errstate(invalid="ignore"):
        label_XYZ = value_XYZ.astype(np.int32)
    wrong_XYZ = (label_XYZ != value_XYZ) | (label_XYZ < 0)
    if wrong_XYZ.any():
        got, hint = f"{value_XYZ[wrong_XYZ][0]:g}", "Resample label images with nearest neighbour only"
        raise ConfigError(path, "values", got, "0 for no parcel, and whole numbers from 1 on", hint)
    affine = affine_mm(image)
    if not code_of(image):
        got, hint = "0, 0 (unknown position)", "Restore the header from the original image"
        raise ConfigError(path, "qform_code, sform_code", got, "a code above 0", hint)
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-6:
        raise ConfigError(path, "affine", "singular or not finite", "an invertible affine")
    matrix = np.linalg.inv(affine) @ grid.affine
    labels_XYZ = ndimage.affine_transform(
        label_XYZ, matrix[:3, :3], matrix[:3, 3], output_shape=grid.shape, order=0, mode="grid-constant"
    )
    on_grid, all_of_it = (np.count_nonzero(np.unique(labels)) for labels in (labels_XYZ, label_XYZ))
    if on_grid < 2:
        got, hint = f"{on_grid} of {all_of_it} on the grid", "Give a label image in MNI space that overlaps the grid"
        raise ConfigError(path, "parcels", got, "at least 2", hint)
    return labels_XYZ


def parcels_from_labels(brain_XYZ: np.ndarray, labels_XYZ: np.ndarray, least: float = 0.1) -> np.ndarray:
    """The parcels of a label image inside a brain mask.

    Parameters
    ----------
    brain_XYZ : bool array
        The brain mask of a scan.
    labels_XYZ : int32 array
        From `read_labels`.
    least : float
        Smallest share of a parcel's voxels on the grid that must be brain. Other parcels are left out.

    Returns
    -------
    labels_XYZ : int32 array
        The labels of the image; 0 for no parcel.
    """
    number_R, place_XYZ = np.unique(labels_XYZ, return_inverse=True)
    whole_R = np.bincount(place_XYZ.ravel(), minlength=len(number_R))
    inside_R = np.bincount(place_XYZ[brain_XYZ], minlength=len(number_R))
    enough_R = (number_R > 0) & (inside_R > 0) & (inside_R >= least * whole_R)
    return np.where(brain_XYZ & enough_R[place_XYZ], labels_XYZ, 0)


def make_parcels(grid: Grid, settings: ParcelSettings) -> Callable[[np.ndarray], np.ndarray]:
    """A function that returns the parcels of a brain mask on the grid: cubes, or those of a label image.

    Raises
    ------
    ConfigError
        See `read_labels`.
    """
    least = settings.least_brain
    if settings.image is None:
        return partial(parcels_from_mask, mm=grid.mm, cube_mm=settings.cube_mm, least=least)
    return partial(parcels_from_labels, labels_XYZ=read_labels(settings.image, grid), least=least)
