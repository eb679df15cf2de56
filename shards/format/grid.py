"""The common grid to which scans are resampled: isotropic RAS+ voxels around the MNI brain.

Legend of shape suffixes: X, Y, Z voxels of the grid.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

# Centre of the grid in MNI mm: the centre of the bounding box of the MNI152 brain mask, shifted by 1 mm in x. At 2 mm,
# the voxel centres are then at even millimetres, as in the FSL/HCP 2 mm templates, and scans on that grid are cropped
# without interpolation.
MNI_CENTRE_MM = (-1.0, -17.0, 5.0)


@dataclass(frozen=True)
class Grid:
    """An isotropic RAS+ grid.

    Parameters
    ----------
    mm : float
        Voxel edge in mm.
    shape : tuple of int
        Number of voxels along x, y, z.
    patch : int
        Edge of a cubic patch in voxels; must divide every entry of `shape`.
    centre_mm : tuple of float
        World position of the centre of the grid, in mm.
    """

    mm: float = 2.0
    shape: tuple[int, int, int] = (96, 96, 96)
    patch: int = 4
    centre_mm: tuple[float, float, float] = MNI_CENTRE_MM

    @property
    def affine(self) -> np.ndarray:
        """Affine from voxel indices to mm, float64 (4, 4)."""
        affine = np.diag([self.mm, self.mm, self.mm, 1.0])
        affine[:3, 3] = np.asarray(self.centre_mm) - self.mm * (np.asarray(self.shape) - 1) / 2
        return affine

    @property
    def patch_shape(self) -> tuple[int, int, int]:
        """Number of patches along x, y, z."""
        x, y, z = self.shape
        return x // self.patch, y // self.patch, z // self.patch

    @property
    def voxels(self) -> int:
        """V, the number of voxels in a patch."""
        return self.patch**3
