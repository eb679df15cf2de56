"""Parcels from a mask or a label image."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from nibabel.affines import apply_affine

from helpers.scans import oblique, save
from shards.conversion.session import ParcelSettings
from shards.core.errors import ConfigError
from shards.format.grid import Grid
from slim.ranking.parcels import make_parcels, parcels_from_labels, parcels_from_mask, read_labels

pytestmark = pytest.mark.fast


@settings(deadline=None, max_examples=40)
@given(
    brain_XYZ=hnp.arrays(bool, st.tuples(*[st.integers(1, 9)] * 3)),
    mm=st.sampled_from([2.0, 6.0, 8.0, 12.0, 60.0]),
    least=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
)
def test_parcels_are_the_cubes_that_hold_enough_brain(brain_XYZ, mm, least):
    labels_XYZ = parcels_from_mask(brain_XYZ, mm, least=least)
    edge = max(1, round(24 / mm))
    n = [-(-size // edge) for size in brain_XYZ.shape]
    expected = np.zeros(brain_XYZ.shape, dtype=np.int32)
    for label, (i, j, k) in enumerate(np.ndindex(*n), start=1):
        cube = tuple(slice(a * edge, (a + 1) * edge) for a in (i, j, k))
        inside = brain_XYZ[cube]
        if inside.any() and inside.sum() >= least * edge**3:
            expected[cube][inside] = label
    assert labels_XYZ.dtype == np.int32
    np.testing.assert_array_equal(labels_XYZ, expected)


def test_a_place_has_the_same_label_in_everyone():
    rng = np.random.default_rng(0)
    one, two = (parcels_from_mask(rng.random((40, 44, 36)) < share, 2.0) for share in (0.4, 0.9))
    both = (one > 0) & (two > 0)
    assert both.sum() > 1000
    np.testing.assert_array_equal(one[both], two[both])


@pytest.mark.parametrize("mm", [0.0, -2.0, float("nan")])
def test_an_impossible_voxel_size_is_refused(mm):
    with pytest.raises(ConfigError, match="positive"):
        parcels_from_mask(np.ones((4, 4, 4), dtype=bool), mm)


# ---- parcels of a label image

GRID = Grid(mm=6.0, shape=(24, 28, 24))


def label_image(path: Path, shape=(13, 15, 12), dtype=np.int16, degrees=20.0, mm=11.0, seed=0) -> np.ndarray:
    """A written image of three labels in coarse voxels near the grid's middle; returns its voxels."""
    labels = np.random.default_rng(seed).integers(0, 4, shape).astype(dtype)
    save(path, labels, oblique((-mm, mm, mm), degrees, np.add(GRID.centre_mm, (0.7, 0.4, -0.9)), shape))
    return labels


@settings(deadline=None, max_examples=25)
@given(
    seed=st.integers(0, 999),
    degrees=st.floats(-40, 40),
    mm=st.floats(3, 17),
    dtype=st.sampled_from([np.uint8, np.int16, np.int32, np.float32, np.float64]),
)
def test_a_voxel_takes_the_label_of_the_nearest_voxel_of_the_image(seed, degrees, mm, dtype, tmp_path_factory):
    path = tmp_path_factory.mktemp("labels") / "atlas.nii.gz"
    labels = label_image(path, dtype=dtype, degrees=degrees, mm=mm, seed=seed)
    found_XYZ = read_labels(path, GRID)
    assert found_XYZ.dtype == np.int32 and found_XYZ.shape == GRID.shape
    place = apply_affine(np.linalg.inv(nib.load(path).affine) @ GRID.affine, np.argwhere(np.ones(GRID.shape)))
    sure = (np.abs(place - np.floor(place) - 0.5) > 1e-4).all(axis=1)  # not half way between two voxels
    nearest = np.rint(place).astype(int)
    inside = ((nearest >= 0) & (nearest < labels.shape)).all(axis=1)
    expected = np.where(inside, labels[tuple(np.clip(nearest, 0, np.array(labels.shape) - 1).T)], 0)
    assume(sure.mean() > 0.9)
    assert inside.any()
    np.testing.assert_array_equal(found_XYZ.ravel()[sure], expected[sure])


def test_an_image_on_the_lattice_of_the_grid_is_copied_whichever_way_it_is_stored(tmp_path):
    rng = np.random.default_rng(0)
    labels = rng.choice(np.array([0, 7, 2**31 - 1], dtype=np.int32), GRID.shape)  # large numbers stay what they are
    flip = np.diag([-1.0, 1.0, 1.0, 1.0])
    flip[0, 3] = GRID.shape[0] - 1
    save(tmp_path / "ras.nii.gz", labels, GRID.affine)
    save(tmp_path / "las.nii", labels[::-1, ..., None], GRID.affine @ flip)  # with a fourth dimension of one volume
    for name in ("ras.nii.gz", "las.nii"):
        np.testing.assert_array_equal(read_labels(tmp_path / name, GRID), labels)


@settings(deadline=None, max_examples=40)
@given(
    labels_XYZ=hnp.arrays(np.int32, (6, 5, 4), elements=st.sampled_from([0, 1, 3, 2**31 - 1])),
    brain_XYZ=hnp.arrays(bool, (6, 5, 4)),
    least=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
)
def test_parcels_with_too_little_brain_are_left_out(labels_XYZ, brain_XYZ, least):
    expected_XYZ = np.zeros_like(labels_XYZ)
    for label in (1, 3, 2**31 - 1):
        whole_XYZ = labels_XYZ == label
        inside_XYZ = whole_XYZ & brain_XYZ
        if inside_XYZ.any() and inside_XYZ.sum() >= least * whole_XYZ.sum():
            expected_XYZ[inside_XYZ] = label
    found_XYZ = parcels_from_labels(brain_XYZ, labels_XYZ, least)
    assert found_XYZ.dtype == np.int32
    np.testing.assert_array_equal(found_XYZ, expected_XYZ)


def test_a_worker_process_gets_the_same_parcels(tmp_path):
    label_image(tmp_path / "atlas.nii.gz")
    brain_XYZ = np.random.default_rng(1).random(GRID.shape) < 0.5
    for image, expected_XYZ in (
        (None, parcels_from_mask(brain_XYZ, GRID.mm)),
        (tmp_path / "atlas.nii.gz", parcels_from_labels(brain_XYZ, read_labels(tmp_path / "atlas.nii.gz", GRID))),
    ):
        parcels = pickle.loads(pickle.dumps(make_parcels(GRID, ParcelSettings(image=image))))
        np.testing.assert_array_equal(parcels(brain_XYZ), expected_XYZ)
        assert len(np.unique(expected_XYZ)) > 3


LABELS = np.random.default_rng(0).integers(0, 4, (20, 20, 20)).astype(np.float32)
NEAR = oblique((6, 6, 6), 0, GRID.centre_mm, LABELS.shape)
BAD_IMAGES = {
    "4-D": (np.stack([LABELS, LABELS], axis=-1), NEAR, 4, "dim: got 20x20x20x2, expected x, y, z"),
    "2-D": (LABELS[:, :, 0], NEAR, 4, "dim: got 20x20, expected x, y, z"),
    "between labels": (LABELS + 0.25, NEAR, 4, "values: got .*25, expected 0 for no parcel, and whole numbers"),
    "negative": (LABELS - 1, NEAR, 4, "values: got -1, expected 0 for no parcel"),
    "not a number": (np.where(LABELS == 1, np.nan, LABELS), NEAR, 4, "values: got nan"),
    "too large": (LABELS * 1e12, NEAR, 4, r"values: got 1e\+12|values: got [23]e\+12"),
    "complex": (LABELS.astype(np.complex64), NEAR, 4, "datatype: got complex64, expected integers"),
    "no position": (LABELS, NEAR, 0, "qform_code, sform_code: got 0, 0 .unknown position., expected a code above 0"),
    "elsewhere": (LABELS, oblique((6, 6, 6), 0, (900, 0, 0), LABELS.shape), 4, "parcels: got 0 of 3 on the grid"),
    "a mask": ((LABELS > 0).astype(np.uint8), NEAR, 4, "parcels: got 1 of 1 on the grid, expected at least 2"),
    "empty": (0 * LABELS, NEAR, 4, "parcels: got 0 of 0 on the grid"),
}


@pytest.mark.parametrize("name", BAD_IMAGES)
def test_images_that_are_no_parcels_are_refused_in_one_line(name, tmp_path):
    data, affine, codes, message = BAD_IMAGES[name]
    path = save(tmp_path / "atlas.nii.gz", data, affine, codes=codes)
    with pytest.raises(ConfigError, match=message) as caught:
        read_labels(path, GRID)
    assert "\n" not in str(caught.value) and str(caught.value).startswith(str(path))


def test_files_that_are_no_images_are_refused_in_one_line(tmp_path):
    label_image(tmp_path / "atlas.nii.gz")
    (tmp_path / "half.nii.gz").write_bytes((tmp_path / "atlas.nii.gz").read_bytes()[:400])
    (tmp_path / "text.nii.gz").write_text("index,name")
    nib.save(nib.MGHImage(LABELS, NEAR), tmp_path / "atlas.mgz")
    for name, message in (
        ("half.nii.gz", "unreadable"),
        ("text.nii.gz", "not compressed with gzip"),
        ("atlas.mgz", "format: got MGHImage, expected NIfTI"),
    ):
        with pytest.raises(ConfigError, match=message) as caught:
            read_labels(tmp_path / name, GRID)
        assert "\n" not in str(caught.value) and name in str(caught.value)


@pytest.mark.real
@pytest.mark.parametrize("parcels", [100, 400])
def test_schaefer_parcels_lie_where_they_should(parcels):
    """On the published grid no parcel of the cortex is lost, and the first half of them is the left hemisphere."""
    folder = os.environ.get("SLIM_REAL_DATA")
    if not folder:
        pytest.skip("SLIM_REAL_DATA is not set: no folder with a label image")
    path = Path(folder) / "templates" / "schaefer2018" / f"schaefer_{parcels}_7net" / "atlas.nii.gz"
    image = nib.load(path)
    labels_XYZ = make_parcels(Grid(), ParcelSettings(image=path))(np.ones(Grid().shape, dtype=bool))
    stored = np.asarray(image.dataobj).astype(int)
    np.testing.assert_array_equal(np.bincount(labels_XYZ.ravel())[1:], np.bincount(stored.ravel())[1:])
    for label in range(1, parcels + 1):
        middle_mm = apply_affine(Grid().affine, np.argwhere(labels_XYZ == label)).mean(axis=0)
        np.testing.assert_allclose(middle_mm, apply_affine(image.affine, np.argwhere(stored == label)).mean(axis=0))
        assert (middle_mm[0] < 0) == (label <= parcels // 2)


def test_cubes_have_24_mm_unless_told_otherwise():
    brain_XYZ = np.ones((24, 12, 30), dtype=bool)
    grid = Grid(2.0, (24, 12, 32), 4)
    labels_XYZ = make_parcels(grid, ParcelSettings())(brain_XYZ)
    assert labels_XYZ[0, 0, 0] == 1 and labels_XYZ[23, 11, 29] == 6
    np.testing.assert_array_equal(np.unique(labels_XYZ), [1, 2, 3, 4, 5, 6])
    assert len(np.unique(make_parcels(grid, ParcelSettings(cube_mm=12))(brain_XYZ))) == 4 * 2 * 5
