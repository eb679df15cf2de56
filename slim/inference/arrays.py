"""Scans given as arrays in memory: voxels of a mask, frame by frame.

Legend: T frames; V voxels of the mask; X, Y, Z voxels of the image.
"""

from __future__ import annotations

from typing import Any

import nibabel as nib
import numpy as np

from shards.core.errors import ArgumentError


def images_of(voxels_TV: Any, mask_XYZ: Any, affine: Any, tr: float) -> tuple[nib.Nifti1Image, nib.Nifti1Image]:
    """A scan and its mask as images.

    Parameters
    ----------
    voxels_TV : array-like, (T, V)
        Values of the voxels of the mask, in C order of (x, y, z).
    mask_XYZ : array-like of bool, (X, Y, Z)
    affine : array-like, (4, 4)
        From voxel indices to mm.
    tr : float
        Time from frame to frame, in s.

    Returns
    -------
    tuple of Nifti1Image
        The scan in float32, with 0 outside the mask; and the mask.

    Raises
    ------
    ArgumentError
        If a shape or type is wrong.
    """
    mask, to_mm = np.asarray(mask_XYZ), np.asarray(affine)
    if mask.ndim != 3 or mask.dtype != bool:
        got = f"{mask.dtype} {mask.shape}"
        raise ArgumentError("arguments", "mask", got, "bool (x, y, z)", "For numbers use mask > 0")
    if to_mm.shape != (4, 4) or to_mm.dtype.kind not in "iuf":
        raise ArgumentError("arguments", "affine", f"{to_mm.dtype} {to_mm.shape}", "numbers (4, 4), in mm")
    voxels = np.asarray(voxels_TV)
    count = int(mask.sum())
    if voxels.ndim != 2 or voxels.shape[1] != count or voxels.dtype.kind not in "iuf":
        expected = f"numbers (frames, {count}), a column for each voxel of the mask"
        hint = "Transpose it" if voxels.ndim == 2 and voxels.shape[0] == count else ""
        raise ArgumentError("arguments", "voxels", f"{voxels.dtype} {voxels.shape}", expected, hint)
    bold_XYZT = np.zeros((*mask.shape, len(voxels)), np.float32)
    bold_XYZT[mask] = voxels.T
    bold = nib.Nifti1Image(bold_XYZT, to_mm)
    bold.header.set_xyzt_units("mm", "sec")
    if isinstance(tr, int | float) and tr > 0:  # else `shards.cohorts.niimg.as_run` refuses it
        bold.header.set_zooms((*bold.header.get_zooms()[:3], tr))
    return bold, nib.Nifti1Image(mask.astype(np.uint8), to_mm)
