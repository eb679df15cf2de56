"""The voxels of the suite on the grid of an encoder: only moved."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from helpers.brainmarks import FEW, VOXELS, flat, template, write_template
from shards.core.errors import ConfigError
from shards.format.grid import Grid
from slim.brainmarks.template import AFFINE, SHAPE, Template
from slim.config import PRESETS
from slim.model.geometry import geometry_of

pytestmark = pytest.mark.fast


def test_columns_are_those_of_the_suite() -> None:
    """Each voxel holds its own number, flattened by the suite's way and put in order again."""
    stub = template()
    volume_XYZT = np.arange(np.prod(SHAPE)).reshape(*SHAPE, 1)
    column_TV = flat(volume_XYZT, stub.mask_XYZ)
    assert column_TV.shape == (1, FEW)
    np.testing.assert_array_equal(column_TV[:, stub.number_N], volume_XYZT[stub.mask_XYZ].T)
    assert not np.array_equal(column_TV, volume_XYZT[stub.mask_XYZ].T)  # the orders differ


def test_the_grid_of_2_mm_is_the_lattice_of_the_template() -> None:
    """x is padded by 3 and 2 voxels, y cropped by 7 and 6, z padded by 9 and cropped by 4."""
    grid = Grid()
    first = nib.affines.apply_affine(np.linalg.inv(grid.affine) @ AFFINE, [0, 0, 0])
    last = nib.affines.apply_affine(np.linalg.inv(grid.affine) @ AFFINE, np.array(SHAPE) - 1)
    np.testing.assert_allclose(first, [3, -7, 9], atol=1e-9)
    np.testing.assert_allclose(95 - last, [2, -6, -4], atol=1e-9)


def test_places_are_the_cells_that_hold_brain() -> None:
    stub, grid = template(VOXELS), Grid()
    assert np.count_nonzero(stub.mask_XYZ) == VOXELS
    geometry = geometry_of(PRESETS["lean"], (40, *grid.patch_shape))
    cell_XYZ = np.zeros(geometry.cells[1:], bool)
    for x, y, z in np.argwhere(stub.mask_XYZ) + np.array([3, -7, 9]):
        cell_XYZ[x // 16, y // 16, z // 16] = True  # a cell of `lean` has 4 x 4 x 4 patches of 4 voxels
    np.testing.assert_array_equal(stub.places(grid, geometry), np.flatnonzero(cell_XYZ))


@pytest.mark.parametrize("flip", [False, True])
def test_the_mask_is_read_from_templateflow(tmp_path: Path, flip: bool) -> None:
    path = next(write_template(tmp_path / "home").rglob("*.nii.gz"))
    if flip:  # stored from right to left, as in FSL
        image = nib.load(path)
        turned = image.as_reoriented(np.array([[0, -1], [1, 1], [2, 1]]))
        nib.save(turned, path)
        assert nib.aff2axcodes(nib.load(path).affine) == ("L", "A", "S")
    np.testing.assert_array_equal(Template.read(path).mask_XYZ, template().mask_XYZ)


def test_another_image_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "mask.nii.gz"
    nib.save(nib.Nifti1Image(np.ones((10, 10, 10), np.uint8), AFFINE), path)
    expected = r"mask.nii.gz: voxels: got \(10, 10, 10\) from \(-90, -126, -72\) mm, expected \(91, 109, 91\) voxels"
    with pytest.raises(ConfigError, match=expected):
        Template.read(path)
