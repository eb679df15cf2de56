"""The common grid every run is brought to: an RAS+ lattice of isotropic voxels around the MNI brain.

Legend of shape suffixes: X, Y, Z voxels of the grid.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

# Centre (mm, MNI) of the grid: the centre of the bounding box of the MNI152 brain mask, moved by 1 mm in x so that at
# 2 mm the voxel centres fall on even millimetres, the lattice of the FSL/HCP 2 mm templates. Runs that are stored on
# that lattice are then cropped, not interpolated.
MNI_CENTRE_MM = (-1.0, -17.0, 5.0)


@dataclass(frozen=True)
class Grid:
    """An isotropic RAS+ grid.

    Parameters
    ----------
    mm : float
        Voxel edge in mm.
    shape : tuple of int
        Voxels along x, y, z.
    patch : int
        Edge of a cubic patch in voxels; divides every entry of `shape`.
    centre_mm : tuple of float
        World position (mm) of the middle of the grid.
    """

    mm: float = 2.0
    shape: tuple[int, int, int] = (96, 96, 96)
    patch: int = 4
    centre_mm: tuple[float, float, float] = MNI_CENTRE_MM

    @property
    def affine(self) -> np.ndarray:
        """Voxel index to mm, float64 (4, 4)."""
        affine = np.diag([self.mm, self.mm, self.mm, 1.0])
        affine[:3, 3] = np.asarray(self.centre_mm) - self.mm * (np.asarray(self.shape) - 1) / 2
        return affine

    @property
    def patch_shape(self) -> tuple[int, int, int]:
        """Patches along x, y, z."""
        x, y, z = self.shape
        return x // self.patch, y // self.patch, z // self.patch

    @property
    def voxels(self) -> int:
        """V, voxels in a patch."""
        return self.patch**3
