"""One run to the common grid and TR, against nilearn, scipy and plain numpy."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from nibabel.affines import apply_affine
from nibabel.orientations import axcodes2ornt, inv_ornt_aff, io_orientation, ornt_transform
from nilearn.image import resample_img
from scipy import ndimage
from scipy.interpolate import CubicSpline
from scipy.ndimage import convolve1d
from scipy.signal import firwin, kaiserord

from helpers.scans import SMALL, brain, fluctuation, grid_image, oblique, save, saved, signal, source, whole, zscored
from shards.core.errors import RunRefused
from shards.preprocessing import quality
from shards.preprocessing.harmonise import GridSettings, harmonise
from shards.preprocessing.masks import BrainMaskSettings
from shards.preprocessing.resampling import spline_weights


@pytest.mark.filterwarnings("ignore:Resampling binary images")
@pytest.mark.parametrize(
    ("zooms", "degrees", "shape"),
    [
        ((6.5, 6.5, 7), 12, (26, 28, 24)),  # coarser than the grid, oblique
        ((3, 3, 5), -9, (50, 56, 32)),  # finer in plane, oblique, anisotropic
        ((6, 6, 6), 0, (26, 29, 25)),  # the same voxels, shifted by a fraction of one
    ],
)
def test_in_space_equals_nilearn(tmp_path, zooms, degrees, shape):
    centre = (-0.3, -16.1, 6.2)
    affine = oblique(zooms, degrees, centre, shape)
    mask, _ = brain(affine, shape)
    data = signal(affine, shape, np.arange(6) * 0.72).astype(np.float32)
    rng = np.random.default_rng(1)
    texture = ndimage.gaussian_filter(rng.standard_normal(shape), 2.0)
    data += (60 * texture / texture.std()).astype(np.float32)[..., None]
    result = harmonise(saved(tmp_path, data, mask, affine), SMALL)
    target, shape_XYZ = grid_image(SMALL)
    peer = resample_img(
        nib.Nifti1Image(data, affine),
        target,
        shape_XYZ,
        interpolation="continuous",
        force_resample=True,
        copy_header=True,
    )
    np.testing.assert_allclose(peer.affine, target)
    inner = ndimage.binary_erosion(result.brain_XYZ)[result.brain_XYZ]
    theirs_TN = peer.get_fdata()[result.brain_XYZ].T
    assert inner.sum() > 500
    for frame in (0, 5):
        assert np.corrcoef(result.raw_TN[frame][inner], theirs_TN[frame][inner])[0, 1] > 0.999
    peer_mask = (
        resample_img(
            nib.Nifti1Image(mask.astype("f4"), affine),
            target,
            shape_XYZ,
            interpolation="linear",
            force_resample=True,
            copy_header=True,
        ).get_fdata()
        >= 0.5
    )
    both, either = (result.brain_XYZ & peer_mask).sum(), (result.brain_XYZ | peer_mask).sum()
    assert both / either > 0.97
    if min(zooms) >= 6:  # nothing is smoothed here: the same numbers, not only alike
        np.testing.assert_allclose(result.raw_TN[:, inner], theirs_TN[:, inner], rtol=2e-3)
        assert both == either


def test_interpolation_is_exact_at_the_nodes_and_for_cubics(tmp_path):
    """Splines reproduce the samples themselves, and any cubic away from the border."""
    shape = (30, 32, 30)
    affine = oblique((6, 6, 6), 0, (2.0, -14.5, 6.0), shape)
    mm = apply_affine(affine, np.indices(shape).reshape(3, -1).T) / 60
    cubic = (1000 + 50 * mm[:, 0] ** 3 - 40 * mm[:, 1] ** 2 * mm[:, 2] + 30 * mm[:, 2]).reshape(shape)
    data = np.stack([cubic * (1 + 0.01 * np.sin(t)) for t in range(5)], axis=-1).astype(np.float32)
    mask, _ = brain(affine, shape)
    result = harmonise(saved(tmp_path, data, mask, affine), SMALL)
    target_mm = apply_affine(SMALL.grid().affine, np.argwhere(result.brain_XYZ)) / 60
    expected = 1000 + 50 * target_mm[:, 0] ** 3 - 40 * target_mm[:, 1] ** 2 * target_mm[:, 2] + 30 * target_mm[:, 2]
    np.testing.assert_allclose(result.raw_TN[0], expected, rtol=1e-4)


@settings(max_examples=40, deadline=None)
@given(shape=st.tuples(*[st.integers(1, 9)] * 3), seed=st.integers(0, 10**6))
def test_spline_weights_equal_scipys_up_to_the_border(shape, seed):
    rng = np.random.default_rng(seed)
    volume = rng.standard_normal(shape).astype(np.float32)
    place_3N = rng.uniform(0, 1, (3, 50)) * (np.array(shape)[:, None] - 1)
    place_3N[:, :10] = np.rint(place_3N[:, :10])
    coefficients = ndimage.spline_filter(volume, 3, np.float64, "mirror")
    got = spline_weights(place_3N, shape) @ coefficients.ravel()
    np.testing.assert_allclose(got, ndimage.map_coordinates(volume, place_3N, np.float64, 3, mode="mirror"), atol=2e-5)
    np.testing.assert_allclose(got[:10], volume[tuple(place_3N[:, :10].astype(int))], atol=2e-5)
    beyond_3N = place_3N + np.where(place_3N == 0, -0.5, 0)
    np.testing.assert_allclose(spline_weights(beyond_3N, shape) @ coefficients.ravel(), got, atol=2e-5)


ORIENTATIONS = ["LAS", "LPS", "LSP", "PIR"]


@pytest.mark.parametrize("codes", ORIENTATIONS)
@pytest.mark.parametrize("kind", ["int16.nii", "float32.nii.gz"])
def test_the_same_brain_stored_otherwise_gives_the_same_sample(plain, tmp_path, codes, kind):
    bold_path, mask_path, _ = plain
    reference = harmonise(source(bold_path, mask_path), SMALL)

    def turned(path: Path) -> tuple[np.ndarray, np.ndarray]:
        image = nib.load(path)
        change = ornt_transform(io_orientation(image.affine), axcodes2ornt(codes))
        return (nib.apply_orientation(image.get_fdata(), change), image.affine @ inv_ornt_aff(change, image.shape[:3]))

    data, affine = turned(bold_path)
    assert "".join(nib.aff2axcodes(affine)) == codes
    bold = tmp_path / f"bold_{kind}"
    if kind.startswith("int16"):
        image = nib.Nifti1Image(data, affine)
        image.header.set_data_dtype(np.int16)  # nibabel chooses slope and intercept
        image.header.set_zooms((5, 5, 5, 0.72))
        image.set_sform(affine, 4)
        nib.save(image, bold)
        stored = nib.load(bold).dataobj
        assert stored.slope not in (1.0, 0.0) and stored.inter != 0
    else:
        save(bold, data.astype(np.float32), affine)
    mask, mask_affine = turned(mask_path)
    result = harmonise(source(bold, save(tmp_path / "mask.nii", mask.astype("u1"), mask_affine)), SMALL)

    np.testing.assert_array_equal(result.brain_XYZ, reference.brain_XYZ)
    np.testing.assert_array_equal(result.patch_P3, reference.patch_P3)
    np.testing.assert_allclose(result.baseline_PV, reference.baseline_PV, atol=2e-4)
    np.testing.assert_allclose(fluctuation(result), fluctuation(reference), atol=4e-4)


def test_compressed_and_plain_files_are_the_same_bits(plain, tmp_path):
    bold_path, mask_path, _ = plain
    unpacked = tmp_path / "bold.nii"
    nib.save(nib.load(bold_path), unpacked)
    one, two = (harmonise(source(path, mask_path), SMALL) for path in (bold_path, unpacked))
    np.testing.assert_array_equal(fluctuation(one), fluctuation(two))
    np.testing.assert_array_equal(one.baseline_PV, two.baseline_PV)


@pytest.mark.parametrize("flip", [False, True])
def test_a_run_on_the_lattice_is_copied_exactly(tmp_path, flip):
    """FSL's 2 mm MNI template is 91 x 109 x 91 voxels with x to the left; here every third voxel of it."""
    grid = GridSettings(mm=2, shape=(32, 32, 32))
    shape = (40, 44, 42)
    affine = np.diag([2.0, 2, 2, 1])
    affine[:3, 3] = np.round(np.array([-1, -17, 5]) - np.array(shape)) // 2 * 2
    data = np.random.default_rng(0).integers(100, 900, (*shape, 6)).astype(np.int16)
    mask = np.zeros(shape, "u1")
    mask[8:32, 8:36, 8:34] = 1
    if flip:
        data, mask = data[::-1], mask[::-1]
        affine = affine @ np.array([[-1, 0, 0, shape[0] - 1], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
    run = source(save(tmp_path / "b.nii", data, affine), save(tmp_path / "m.nii", mask, affine), dummy=0)
    result = harmonise(run, grid, BrainMaskSettings(ml=(0, 3000), outside=1))
    place = apply_affine(np.linalg.inv(affine) @ grid.grid().affine, np.argwhere(result.brain_XYZ))
    index = tuple(np.rint(place).astype(int).T)
    np.testing.assert_allclose(place, np.rint(place), atol=1e-6)
    np.testing.assert_array_equal(result.raw_TN, data[index].T)
    assert mask[index].all() and len(index[0]) == result.brain_XYZ.sum() > 1000


def test_the_default_grid_lies_on_the_templates_lattice():
    """So fMRIPrep, HCP and FSL runs at 2 mm (whose voxel centres are at even millimetres) are not interpolated."""
    affine = GridSettings().grid().affine
    np.testing.assert_array_equal(affine[:3, :3], 2 * np.eye(3))
    assert (affine[:3, 3] % 2 == 0).all()
    hcp = np.array([[-2, 0, 0, 90], [0, 2, 0, -126], [0, 0, 2, -72], [0, 0, 0, 1.0]])
    place = (np.linalg.inv(hcp) @ affine)[:3, 3]
    np.testing.assert_array_equal(place, np.rint(place))


def test_what_the_grid_cannot_show_is_smoothed_away(tmp_path):
    """A checkerboard of 2 mm voxels has no place on an 8 mm grid: without a filter it would alias into patterns."""
    shape = (70, 80, 66)
    affine = oblique((2, 2, 2), 0, (-1.7, -17.3, 4.4), shape)
    mask, anatomy = brain(affine, shape)
    board = 1.0 - 2 * (np.indices(shape).sum(axis=0) % 2)
    volumes = [anatomy + t * anatomy / 100 + (100 if t % 2 else -100) * board for t in range(-2, 3)]
    data = np.stack(volumes, axis=-1).astype(np.float32)
    coarse = GridSettings(mm=8, shape=(20, 20, 20))
    result = harmonise(saved(tmp_path, data, mask, affine), coarse)
    drift_TN = (1 + np.arange(-2, 3) / 100)[:, None]
    level_TN = result.raw_TN / drift_TN
    assert np.abs(level_TN - level_TN.mean(axis=0)).max() < 2  # of 200
    inner = ndimage.binary_erosion(result.brain_XYZ)[result.brain_XYZ]
    _, expected = brain(coarse.grid().affine, coarse.shape)
    np.testing.assert_allclose(result.raw_TN.mean(axis=0)[inner], expected[result.brain_XYZ][inner], atol=12)


@pytest.mark.parametrize("source_tr", [2.2, 1.5, 0.5, 0.8001])
def test_in_time_equals_scipy_and_invents_nothing(tmp_path, plain, source_tr):
    _, mask_path, affine = plain
    mask = nib.load(mask_path).get_fdata() > 0
    rng = np.random.default_rng(2)
    data = (1000 + 30 * rng.standard_normal((*mask.shape, 30))).astype(np.float32)
    bold = save(tmp_path / "b.nii", data, affine, tr=source_tr)
    kept = harmonise(source(bold, mask_path), SMALL.model_copy(update={"tr": source_tr, "tr_range": (0.01, 20)}))
    result = harmonise(source(bold, mask_path), SMALL)
    assert (kept.tr, result.tr, result.source_tr) == (pytest.approx(source_tr), 0.72, pytest.approx(source_tr))
    seconds = np.arange(30) * result.source_tr
    wanted = np.arange(len(result.raw_TN)) * 0.72
    assert wanted[-1] <= seconds[-1] + 1e-6 < wanted[-1] + 0.72 + 2e-6  # inside the span, and all of it
    series_TN = kept.raw_TN.astype(np.float64)
    if source_tr < 0.72:  # what 0.72 s would alias is filtered away first
        nyquist = 0.5 / 0.72
        taps, beta = kaiserord(50, 0.2 * nyquist * 2 * source_tr)
        kernel = firwin(taps // 2 * 2 + 1, 0.9 * nyquist, window=("kaiser", beta), fs=1 / source_tr)
        series_TN = convolve1d(series_TN, kernel, axis=0, mode="mirror")
    np.testing.assert_allclose(result.raw_TN, CubicSpline(seconds, series_TN)(wanted), rtol=2e-6)


def test_what_a_longer_tr_would_alias_is_gone_and_the_rest_stays(tmp_path, plain):
    """At TR 0.35 s a pulse of 1.1 Hz is measured; at 0.72 s it would look like 0.29 Hz."""
    _, mask_path, affine = plain
    _, anatomy = brain(affine, nib.load(mask_path).shape)
    seconds = 0.35 * np.arange(400)
    for hertz, least, most in ((1.1, 0, 0.04), (0.75, 0, 0.04), (0.5, 9.5, 10.5), (0.05, 9.9, 10.1)):
        wave_T = 10 * np.sin(2 * np.pi * hertz * seconds)
        bold = save(tmp_path / "b.nii", (anatomy[..., None] + wave_T).astype(np.float32), affine, tr=0.35)
        raw_TN = harmonise(source(bold, mask_path), SMALL).raw_TN[20:-20]  # the ends see mirrored frames
        amplitude_N = np.sqrt(2) * raw_TN.std(axis=0)
        assert least <= amplitude_N.min() and amplitude_N.max() <= most, hertz


@pytest.mark.parametrize("source_tr", [0.7, 0.72, 0.8])
def test_a_tr_near_the_target_is_left_alone(tmp_path, plain, source_tr):
    _, mask_path, affine = plain
    data = np.random.default_rng(0).normal(1000, 30, (28, 32, 26, 9)).astype(np.float32)
    result = harmonise(source(save(tmp_path / "b.nii", data, affine, tr=source_tr), mask_path), SMALL)
    assert len(result.raw_TN) == 9 and result.tr == pytest.approx(source_tr)


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 10**6), scale=st.sampled_from([1e-4, 1.0, 1e5]), tr=st.sampled_from([0.72, 1.3]))
def test_the_three_parts_are_the_global_z_score(tmp_path_factory, seed, scale, tr):
    rng = np.random.default_rng(seed)
    shape = (10, 12, 9)
    affine = oblique((16, 15, 17), 7, (-1, -17, 5), shape)
    mask = np.zeros(shape, "u1")
    mask[2:8, 3:9, 2:7] = rng.random((6, 6, 5)) > 0.2
    data = scale * (rng.uniform(500, 1500, shape)[..., None] + 20 * rng.standard_normal((*shape, 16)))
    folder = tmp_path_factory.mktemp("z")
    grid = GridSettings(mm=16, shape=(12, 12, 12))
    result = harmonise(
        source(save(folder / "b.nii", data.astype(np.float32), affine, tr), save(folder / "m.nii", mask, affine)), grid
    )
    raw_TN = result.raw_TN.astype(np.float64)
    expected_TN = (raw_TN - raw_TN.mean()) / raw_TN.std()
    brain_N = result.brain_XYZ
    got_TN = np.stack([whole(result, frame, grid)[brain_N] for frame in zscored(result)])
    np.testing.assert_allclose(got_TN, expected_TN, atol=2e-6)
    np.testing.assert_allclose(whole(result, result.spread_PV, grid)[brain_N], expected_TN.std(axis=0), rtol=1e-4)
    np.testing.assert_allclose(whole(result, result.baseline_PV, grid)[brain_N], expected_TN.mean(axis=0), atol=2e-6)
    np.testing.assert_allclose(fluctuation(result).mean(axis=0), 0, atol=1e-5)
    for part in (result.baseline_PV, result.spread_PV, *fluctuation(result)[:2]):
        assert not whole(result, part, grid)[~brain_N].any()  # background is 0
    assert result.facts["global_mean"] == pytest.approx(raw_TN.mean(), rel=1e-4, abs=1e-5)
    assert result.facts["global_sd"] == pytest.approx(raw_TN.std(), rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("point_mm", [(-42, -22, 54), (38, -68, -18), (-1, 45, 5)])
def test_a_spot_at_an_mni_coordinate_lands_in_its_patch_and_voxel(tmp_path, point_mm):
    """In a left-handed file (LAS), where a mix-up of sides would show."""
    shape = (91, 109, 91)
    affine = np.array([[-2, 0, 0, 90], [0, 2, 0, -126], [0, 0, 2, -72], [0, 0, 0, 1.0]])
    mask, _ = brain(affine, shape)
    mask |= ((apply_affine(affine, np.indices(shape).reshape(3, -1).T) - [-1, -17, 5]) ** 2).sum(axis=1).reshape(
        shape
    ) < 70**2
    data = np.full((*shape, 4), 100, np.int16)
    data[..., 1] += 1
    voxel = tuple(np.rint(apply_affine(np.linalg.inv(affine), point_mm)).astype(int))
    data[voxel] = [1000, 1001, 1000, 1001]
    result = harmonise(saved(tmp_path, data, mask, affine), GridSettings())
    patch, number = np.unravel_index(result.baseline_PV.argmax(), result.baseline_PV.shape)
    inside = np.array(np.unravel_index(number, (4, 4, 4)))  # x-major
    mm = apply_affine(GridSettings().grid().affine, result.patch_P3[patch] * 4 + inside)
    centre = apply_affine(affine, voxel)
    np.testing.assert_allclose(mm, centre)
    assert np.abs(mm - point_mm).max() <= 1


def test_a_native_run_is_centred_by_its_mask_and_says_so(tmp_path):
    shape = (26, 28, 24)
    affine = oblique((6, 6, 6), 0, (131, -40, 77), shape)
    inside, anatomy = brain(affine, shape, centre_mm=(121, -28, 71))
    data = np.stack([anatomy + np.sin(t) * 10 for t in range(6)], axis=-1).astype(np.float32)
    bold = save(tmp_path / "b.nii", data, affine, codes=1)
    mask = save(tmp_path / "m.nii", inside.astype("u1"), affine, codes=1)
    with pytest.raises(RunRefused, match="space: native"):
        harmonise(source(bold, mask), SMALL)
    result = harmonise(source(bold, mask, space="native"), SMALL)
    low, high = np.argwhere(result.brain_XYZ).min(axis=0), np.argwhere(result.brain_XYZ).max(axis=0)
    middle = apply_affine(SMALL.grid().affine, (low + high) / 2)
    np.testing.assert_allclose(middle, SMALL.grid().centre_mm, atol=6)
    corners = apply_affine(affine, np.argwhere(inside))
    moved = np.array(SMALL.grid().centre_mm) - (corners.min(axis=0) + corners.max(axis=0)) / 2
    np.testing.assert_allclose(result.facts["centred_by_mm"], moved, atol=0.01)
    assert result.facts["space"] == "native" and result.facts["mask_outside_grid"] == 0


def test_a_mask_is_computed_where_none_is_given(tmp_path):
    shape = (30, 34, 28)
    affine = oblique((5, 5, 5), 0, (-1, -17, 5), shape)
    inside, anatomy = brain(affine, shape)
    rng = np.random.default_rng(0)
    data = np.where(inside, anatomy, 20)[..., None] + rng.standard_normal((*shape, 8)) * 5
    result = harmonise(source(save(tmp_path / "b.nii.gz", data.astype(np.float32), affine), None), SMALL)
    truth = harmonise(source(tmp_path / "b.nii.gz", save(tmp_path / "m.nii", inside.astype("u1"), affine)), SMALL)
    overlap = (result.brain_XYZ & truth.brain_XYZ).sum() / (result.brain_XYZ | truth.brain_XYZ).sum()
    assert overlap > 0.85 and result.facts["mask_source"] == "computed"


def test_a_mask_on_another_grid_is_taken_to_the_run(plain, tmp_path):
    bold_path, mask_path, _ = plain
    shape = (80, 90, 78)
    affine = oblique((1.7, 1.9, 1.8), 20, (-1, -17, 5), shape)
    fine, _ = brain(affine, shape)
    result = harmonise(source(bold_path, save(tmp_path / "m.nii", fine.astype("u1"), affine)), SMALL)
    reference = harmonise(source(bold_path, mask_path), SMALL)
    overlap = (result.brain_XYZ & reference.brain_XYZ).sum() / (result.brain_XYZ | reference.brain_XYZ).sum()
    assert overlap > 0.9


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), frames=st.integers(4, 60), voxels=st.integers(2, 40), spikes=st.integers(0, 3))
def test_quality_numbers_equal_plain_numpy(seed, frames, voxels, spikes):
    rng = np.random.default_rng(seed)
    raw = (rng.uniform(100, 900, voxels) + 10 * rng.standard_normal((frames, voxels))).astype(np.float32)
    raw[rng.integers(frames, size=spikes)] += 200
    raw[:, 0] = 500  # a voxel that never changes has no tSNR
    mean_N, variance_N = quality.mean_and_variance(raw)
    np.testing.assert_allclose(mean_N, raw.astype(np.float64).mean(axis=0))
    np.testing.assert_allclose(variance_N, raw.astype(np.float64).var(axis=0), atol=1e-9)
    got = quality.of_run(raw, mean_N, variance_N, brain_voxel_ml=0.008)
    change = np.sqrt((np.diff(raw.astype(np.float64), axis=0) ** 2).mean(axis=1))
    first, third = np.percentile(change, [25, 75])
    alive = raw[:, 1:].astype(np.float64)
    assert got["tsnr"] == pytest.approx(np.median(alive.mean(axis=0) / alive.std(axis=0)), rel=1e-3, abs=1e-3)
    assert got["dvars_outliers"] == (change > third + 1.5 * (third - first)).sum()
    assert got["brain_ml"] == pytest.approx(voxels * 0.008, abs=0.006)


@pytest.mark.parametrize(("tr", "frames"), [(0.72, 240), (2.0, 88), (0.3, 560)])
def test_memory_stays_below_three_times_the_run(tmp_path, tr, frames):
    """Peak of a fresh process beyond what it holds before, against the harmonised run in float32."""
    shape = (60, 70, 56)
    affine = oblique((3, 3, 3.2), 5, (-1, -17, 5), shape)
    mask, anatomy = brain(affine, shape)
    noise = np.random.default_rng(0).standard_normal((*shape, 8)).astype(np.float32)
    data = np.tile(anatomy.astype(np.float32)[..., None] + noise, (1, 1, 1, frames // 8))
    run = saved(tmp_path, data, mask, affine)
    image = nib.load(run.bold)
    image.header.set_zooms((*image.header.get_zooms()[:3], tr))
    nib.save(image, tmp_path / "r.nii")
    del data, noise
    script = """
import resource, sys
from dataclasses import replace
from pathlib import Path
from shards.cohorts.cohort_file import RunSource
from shards.preprocessing.harmonise import GridSettings, harmonise

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

run = RunSource("c", "1", "", "", "", Path(sys.argv[1]), "r.nii", "MNI", mask=Path(sys.argv[2]))
before = peak()
result = harmonise(run, GridSettings(mm=3, shape=(64, 64, 64)))
result.windows([0, 5, 10], 5)
print((peak() - before) / result.raw_TN.nbytes, len(result.raw_TN))
"""
    words = [sys.executable, "-c", script, str(tmp_path / "r.nii"), str(run.mask)]
    done = subprocess.run(words, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    ratio, length = done.stdout.split()
    assert int(length) == (frames if tr == 0.72 else int((frames - 1) * tr / 0.72) + 1)
    assert float(ratio) < 3, ratio
