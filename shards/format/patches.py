"""Divide volumes into brain patches, and reassemble them.

A patch is a cube with an edge of `edge` voxels. Only patches that contain brain are kept, in ascending flat order of
the patch grid. Voxels inside a patch are in C order: voxel (i, j, k) has the index (i * edge + j) * edge + k.

Legend: X, Y, Z voxels of the grid; P kept patches; V voxels of a patch; N brain voxels in C order of the grid;
R parcels; T frames; 3 the axes x, y, z.
"""

from __future__ import annotations

import numpy as np


def _blocks(volume_XYZ: np.ndarray, edge: int) -> np.ndarray:
    """View a volume as (all patches, V)."""
    x, y, z = (size // edge for size in volume_XYZ.shape)
    blocks = volume_XYZ.reshape(x, edge, y, edge, z, edge).transpose(0, 2, 4, 1, 3, 5)
    return blocks.reshape(x * y * z, edge**3)


def patch_places(brain_XYZ: np.ndarray, edge: int) -> np.ndarray:
    """Positions (patch_P3, int16) of the patches with at least one brain voxel, in ascending flat order."""
    shape = [size // edge for size in brain_XYZ.shape]
    flat = np.flatnonzero(_blocks(brain_XYZ, edge).any(axis=1))
    return np.stack(np.unravel_index(flat, shape), axis=1).astype(np.int16)


def gather(volume_XYZ: np.ndarray, patch_P3: np.ndarray, edge: int) -> np.ndarray:
    """The kept patches of a volume, (P, V), with the dtype of the volume."""
    shape = [size // edge for size in volume_XYZ.shape]
    flat = np.ravel_multi_index(tuple(patch_P3.T.astype(np.intp)), shape)
    return _blocks(volume_XYZ, edge)[flat]


def scatter(values_PV: np.ndarray, patch_P3: np.ndarray, shape: tuple[int, int, int], edge: int) -> np.ndarray:
    """Put patches back into a volume (X, Y, Z). Voxels outside the kept patches are 0."""
    x, y, z = (size // edge for size in shape)
    blocks = np.zeros((x * y * z, edge**3), values_PV.dtype)
    blocks[np.ravel_multi_index(tuple(patch_P3.T.astype(np.intp)), (x, y, z))] = values_PV
    return blocks.reshape(x, y, z, edge, edge, edge).transpose(0, 3, 1, 4, 2, 5).reshape(shape)


def voxel_slots(brain_XYZ: np.ndarray, patch_P3: np.ndarray, edge: int) -> np.ndarray:
    """Index of each brain voxel (N, in C order of the grid) in the flattened (P * V) patches; int64 (N,)."""
    number = np.full(brain_XYZ.shape, -1, np.int64)
    number[brain_XYZ] = np.arange(np.count_nonzero(brain_XYZ))
    number_PV = gather(number, patch_P3, edge).ravel()
    slots = np.empty(np.count_nonzero(brain_XYZ), np.int64)
    kept = np.flatnonzero(number_PV >= 0)
    slots[number_PV[kept]] = kept
    return slots


def parcel_means(
    values_TN: np.ndarray, labels_XYZ: np.ndarray, brain_XYZ: np.ndarray, affine: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean time series of each parcel over its brain voxels.

    Parameters
    ----------
    values_TN : ndarray, (T, N)
        Time series of the brain voxels, in C order of the grid.
    labels_XYZ : ndarray of int
        Parcel number of each voxel; 0 for no parcel.
    brain_XYZ : ndarray of bool
    affine : ndarray, (4, 4)
        From voxel indices to mm.

    Returns
    -------
    roi_RT : float32 array (R, T)
    centre_R3 : float32 array (R, 3)
        Mean position of the brain voxels of each parcel, in mm.
    number_R : int32 array (R,)
        Label of each parcel, in ascending order.
    """
    label_N = labels_XYZ[brain_XYZ]
    order = np.flatnonzero(label_N)
    order = order[np.argsort(label_N[order], kind="stable")]
    number_R, first, count_R = np.unique(label_N[order], return_index=True, return_counts=True)
    roi_RT = np.empty((len(number_R), len(values_TN)), np.float32)
    for frame, values_N in enumerate(values_TN):
        roi_RT[:, frame] = np.add.reduceat(values_N[order].astype(np.float64), first) / count_R
    place_N3 = np.argwhere(brain_XYZ)[order]
    centre_R3 = np.add.reduceat(place_N3.astype(np.float64), first) / count_R[:, None]
    centre_R3 = centre_R3 @ affine[:3, :3].T + affine[:3, 3]
    return roi_RT, centre_R3.astype(np.float32), number_R.astype(np.int32)
