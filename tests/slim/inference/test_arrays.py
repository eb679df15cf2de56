"""Scans given as arrays are encoded as the same scans given as NIfTI."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from helpers.pretrained import ALIGNED, write_run
from shards.cohorts.cohort_file import find_runs
from shards.core.errors import UserError
from slim.inference.arrays import images_of
from slim.inference.slim_brain import SlimBrain

pytestmark = pytest.mark.fast


@pytest.fixture(scope="module")
def model(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> SlimBrain:
    return SlimBrain.from_pretrained(write_run(tmp_path_factory.mktemp("arrays") / "run", dataset, ALIGNED))


def test_an_array_gives_the_vectors_of_its_nifti(model: SlimBrain, cohort: Path) -> None:
    run = find_runs(cohort / "cohort.yaml")[0]
    image, mask = nib.load(run.bold), nib.load(run.mask)
    inside, tr = np.asarray(mask.dataobj) > 0, float(image.header.get_zooms()[3])
    voxels = image.get_fdata(dtype=np.float32)[inside].T
    expected = model.encode_windows(run.bold, mask=run.mask, confounds=run.confounds, space="MNI")
    found = model.encode_array(voxels, inside, image.affine, tr, confounds=run.confounds, space="MNI")
    np.testing.assert_array_equal(found, expected)
    per_scan = model.encode_array(voxels, inside, image.affine, tr, "location", confounds=run.confounds, space="MNI")
    assert per_scan.shape[0] == expected.shape[0] and per_scan.shape[1] > expected.shape[1]


def test_voxels_are_in_the_order_of_the_mask() -> None:
    mask = np.zeros((2, 3, 4), bool)
    mask[0, 1, 2] = mask[1, 0, 3] = mask[1, 2, 0] = True
    voxels = np.arange(6).reshape(2, 3)
    image, mask_image = images_of(voxels, mask, np.diag([2.0, 2, 2, 1]), 0.8)
    data = image.get_fdata()
    assert data[0, 1, 2].tolist() == [0, 3] and data[1, 0, 3].tolist() == [1, 4] and data[1, 2, 0].tolist() == [2, 5]
    assert data.sum() == voxels.sum() and image.header.get_zooms() == pytest.approx((2, 2, 2, 0.8))
    assert np.array_equal(mask_image.get_fdata() > 0, mask)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"mask": np.ones((2, 2, 2))}, r"mask: got float64 \(2, 2, 2\), expected bool.*For numbers use mask > 0"),
        ({"affine": np.eye(3)}, r"affine: got float64 \(3, 3\)"),
        ({"voxels": np.zeros((8, 5))}, r"voxels: got float64 \(8, 5\), expected numbers \(frames, 8\).*Transpose it"),
        ({"voxels": np.zeros((5, 7))}, r"voxels: got float64 \(5, 7\), expected numbers \(frames, 8\)"),
        ({"voxels": np.zeros((5, 8), complex)}, "voxels: got complex128"),
        ({"tr": "2"}, "tr: got '2'"),
        ({"tr": -1.0}, "tr: got -1"),
    ],
)
def test_what_is_wrong_is_named(model: SlimBrain, arguments: dict, match: str) -> None:
    right = {"voxels": np.zeros((5, 8)), "mask": np.ones((2, 2, 2), bool), "affine": np.eye(4), "tr": 0.8}
    with pytest.raises(UserError, match=match):
        model.encode_array(**{**right, **arguments})
