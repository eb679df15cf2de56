"""The voxels of Brainmarks' space `mni`: the brain mask of MNI152NLin6Asym at 2 mm.

The suite flattens volumes as (z, y, x). Images are (x, y, z) here, as everywhere else.

Legend: X, Y, Z voxels of the image; T frames; V voxels of the mask in the order of the suite; N the same voxels in C
order of the image; P patches; L places of cells.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import nibabel as nib
import numpy as np

from shards.core.errors import ConfigError
from shards.core.nifti import open_image
from shards.format.grid import Grid
from shards.format.patches import patch_places
from shards.preprocessing.resampling import resample_mask
from slim.model.geometry import Geometry

SHAPE = (91, 109, 91)
AFFINE = np.array([[2.0, 0, 0, -90], [0, 2, 0, -126], [0, 0, 2, -72], [0, 0, 0, 1]])
_NAME = "MNI152NLin6Asym"
_HINT = "On a machine without internet, copy the folder of templateflow from another one and set TEMPLATEFLOW_HOME"


@dataclass(frozen=True)
class Template:
    """The brain mask of the template.

    Attributes
    ----------
    mask_XYZ : bool array
        On the voxels of `SHAPE` and `AFFINE`.
    """

    mask_XYZ: np.ndarray

    @classmethod
    def fetch(cls) -> Template:
        """Read the mask from templateflow, which downloads it the first time.

        Raises
        ------
        ConfigError
            If it cannot be downloaded, or is another image.
        """
        from templateflow import api  # comes with brainmarks

        try:
            found = api.get(_NAME, desc="brain", resolution=2, suffix="mask", extension="nii.gz")
        except (OSError, RuntimeError) as error:
            got = f"no mask ({type(error).__name__}: {error})"
            raise ConfigError("templateflow", _NAME, got, "the brain mask at 2 mm", _HINT) from None
        if not isinstance(found, Path):
            raise ConfigError("templateflow", _NAME, f"{len(found)} masks", "one brain mask at 2 mm", _HINT)
        return cls.read(found)

    @classmethod
    def read(cls, path: Path) -> Template:
        """Read the mask from a file; every value above 0 is brain.

        Raises
        ------
        ConfigError
            If it is not an image of this shape and position.
        """
        image = nib.as_closest_canonical(open_image(path, path, error=ConfigError))
        if image.shape != SHAPE or not np.allclose(image.affine, AFFINE, atol=1e-3):
            origin = ", ".join(f"{value:g}" for value in image.affine[:3, 3])
            expected = f"{SHAPE} voxels of 2 mm from (-90, -126, -72) mm, the template {_NAME}"
            raise ConfigError(path, "voxels", f"{image.shape} from ({origin}) mm", expected)
        return cls(np.asarray(image.dataobj) > 0)

    @cached_property
    def number_N(self) -> np.ndarray:
        """Column of the suite for each voxel of the mask in C order of (x, y, z), int64 (N,)."""
        number_XYZ = np.zeros(SHAPE, np.int64)
        number_XYZ.T[self.mask_XYZ.T] = np.arange(np.count_nonzero(self.mask_XYZ))
        return number_XYZ[self.mask_XYZ]

    def places(self, grid: Grid, geometry: Geometry) -> np.ndarray:
        """The cells of a grid that hold brain of the template, flat and in ascending order, int64 (L,)."""
        patch_P3 = patch_places(resample_mask(self.mask_XYZ, AFFINE, grid), grid.patch)
        flat_P = np.ravel_multi_index(tuple(patch_P3.T.astype(np.intp)), grid.patch_shape)
        return np.unique(geometry.cell_of[flat_P])  # tokens of the first frame are in cells of the first slot
