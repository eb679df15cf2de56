"""Masks in any range of values, voxels without signal, copies of volumes, and whether a brain lies in MNI space."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import ndimage

from helpers.records import scan_facts
from helpers.scans import FRAMES, SMALL, brain, oblique, save, saved, signal, source
from shards.conversion.session import SessionSettings, WindowSettings, assumptions, convert_run
from shards.core.errors import RunRefused
from shards.preprocessing.harmonise import GridSettings, harmonise
from shards.preprocessing.masks import BrainMaskSettings, threshold
from shards.preprocessing.resampling import resample_mask
from shards.preprocessing.space import template
from slim.ranking.parcels import make_parcels
from slim.ranking.rankers import make_ranker

pytestmark = pytest.mark.fast

SHAPE = 28, 32, 26
AFFINE = oblique((5, 5, 5), 0, (-1, -17, 5), SHAPE)
BRAIN, ANATOMY = brain(AFFINE, SHAPE)
DEPTH_MM = ndimage.distance_transform_edt(BRAIN) * 5
T1 = np.where(BRAIN, np.where(DEPTH_MM < 8, 0.3, np.where(DEPTH_MM < 16, 0.45, 0.9)), 0)


@given(top=st.sampled_from([1.0, 0.98, 100.0, 255.0, 32767.0]), blur=st.floats(0.35, 0.9), whole=st.booleans())
def test_a_soft_mask_is_cut_at_half_of_its_range(top, blur, whole):
    """A probability map, per cent, 0-255: the same mask in any unit."""
    soft = ndimage.gaussian_filter(BRAIN.astype(float), blur)
    values = top * soft
    found, rule = threshold((np.round(values) if whole and top > 50 else values).astype(np.float32))
    wrong = found != (soft > 0.5)
    assert np.abs(soft[wrong] - 0.5).max(initial=0) < 0.02 and "brain above half of it" in rule


def test_images_and_labels_are_brain_wherever_they_are_above_0():
    rng = np.random.default_rng(0)
    noisy = np.where(BRAIN, 800 + 300 * np.sin(ANATOMY / 90) + 60 * rng.standard_normal(SHAPE), 0)
    for image in (T1, 1000 * T1, 255 * T1, noisy, noisy / noisy.max(), np.where(BRAIN, 1 + (DEPTH_MM > 8), 0)):
        found, rule = threshold(image.astype(np.float32))
        np.testing.assert_array_equal(found, BRAIN)
        assert rule.endswith("brain above 0")
    with_nan = np.where(BRAIN, 1, np.nan).astype(np.float32)
    np.testing.assert_array_equal(threshold(with_nan)[0], BRAIN)
    assert threshold(BRAIN.astype(np.float32))[1] == ""  # nothing to tell
    assert threshold(255 * BRAIN.astype(np.float32))[1] == "all of its values above 0 are 255"
    for nothing in (np.zeros(SHAPE), np.full(SHAPE, -1), np.full(SHAPE, np.inf), np.full(SHAPE, np.nan)):
        assert not threshold(nothing.astype(np.float32))[0].any()


def test_the_rule_of_a_mask_is_told_and_its_size_judged(tmp_path, plain):
    bold_path, mask_path, _ = plain
    soft = 255 * ndimage.gaussian_filter(BRAIN.astype(np.float32), 0.6)
    given = save(tmp_path / "soft.nii.gz", np.round(soft).astype("u1"), AFFINE)
    result = harmonise(source(bold_path, given), SMALL)
    hard = harmonise(source(bold_path, mask_path), SMALL)
    assert result.facts["mask_rule"] == "soft values from 0 to 255: brain above half of it"
    assert result.facts["brain_ml"] == pytest.approx(hard.facts["brain_ml"], rel=0.05)
    assert "mask_rule" not in hard.facts


def run_of(folder, data, mask=BRAIN, **fields):
    return replace(saved(folder, data.astype(np.float32), mask, AFFINE), **fields)


DATA = signal(AFFINE, SHAPE, np.arange(60) * 0.72) + np.random.default_rng(0).standard_normal((*SHAPE, 60))


def test_voxels_without_signal_are_left_out_and_refused_above_a_limit(tmp_path):
    """A mask of the whole brain over a scan whose lowest slices were not measured."""
    lost = np.zeros(SHAPE, bool)
    lost[:, :, :6] = True  # below
    share = (lost & BRAIN).sum() / BRAIN.sum()
    assert 0.03 < share < 0.2
    grid = GridSettings(mm=5, shape=(28, 32, 24))
    whole = harmonise(run_of(tmp_path, DATA), grid)
    for value in (0.0, 818.3):
        data = np.where(lost[..., None], value, DATA)
        result = harmonise(run_of(tmp_path, data), grid)
        assert result.facts["dead_share"] == pytest.approx(share, abs=0.02)
        kept = resample_mask(lost, AFFINE, grid.grid())[whole.brain_XYZ]
        np.testing.assert_array_equal(result.brain_XYZ, whole.brain_XYZ & ~resample_mask(lost, AFFINE, grid.grid()))
        np.testing.assert_array_equal(result.raw_TN, whole.raw_TN[:, ~kept])  # the others are as they were
        assert result.baseline_PV.shape == result.spread_PV.shape
        assert (
            f"{result.facts['dead_share']:.1%} of the mask has no signal" in assumptions(scan_facts(**result.facts))[-1]
        )
        with pytest.raises(RunRefused, match=r"mask: got \d+% of its voxels without signal.*at most 3%"):
            harmonise(run_of(tmp_path, data), grid, BrainMaskSettings(dead=0.03))
    assert whole.facts["dead_share"] == 0


SETTINGS = SessionSettings(grid=SMALL, windows=WindowSettings(keep=6, minimum=4))


@pytest.mark.parametrize("tr", [0.72, 1.5])
@pytest.mark.parametrize("ranker", ["variance", "ridge", "uniform"])
def test_copies_of_a_volume_are_counted_and_never_kept(tmp_path, tr, ranker):
    data = DATA.copy()
    data[..., 30:40] = 1.2 * data[..., 7:8]  # a burst that stands still, and would be the most salient
    run = replace(run_of(tmp_path, data), tr=tr)
    parcels = make_parcels(SMALL.grid(), SETTINGS.parcels)
    made = convert_run(run, SETTINGS, parcels, make_ranker(ranker))
    assert made.meta.repeated_frames == 9  # the first of ten was measured, as far as anybody can tell
    arrays = made.read(made.meta)
    first, last = 31 * tr, 39 * tr  # s
    begin_K = arrays["start"] * made.meta.tr
    end_K = begin_K + 5 * made.meta.tr
    assert not ((begin_K <= last) & (end_K > first + made.meta.tr)).any()
    assert len(arrays["start"]) == made.meta.n_kept == 6 and (np.diff(arrays["saliency"]) <= 0).all()
    assert np.isfinite(arrays["scores"]).all() and len(arrays["scores"]) == made.meta.n_windows
    assert "9 volumes are copies of an earlier one" in assumptions(made.meta)[-1]


def test_a_scanner_that_stopped_early_is_refused(tmp_path):
    data = DATA.copy()
    data[..., 16:] = data[..., 15:16]
    run = run_of(tmp_path, data)
    with pytest.raises(RunRefused, match=r"data: got 3 of 12 windows without volumes.*, expected at least 4"):
        convert_run(run, SETTINGS, make_parcels(SMALL.grid(), SETTINGS.parcels), make_ranker("variance"))


def in_mni(folder, shift_mm=(0, 0, 0), code=4, name="b.nii", **fields):
    """A run whose mask is the MNI152 brain, moved."""
    mask, affine = template()
    grid = GridSettings(mm=6, shape=(28, 36, 28)).grid()
    inside = resample_mask(mask > 0, affine, grid)
    moved = grid.affine.copy()
    moved[:3, 3] += shift_mm
    rng = np.random.default_rng(0)
    data = np.where(inside[..., None], 1000 + 20 * rng.standard_normal((*grid.shape, FRAMES)), 5 * rng.random(FRAMES))
    bold = save(folder / name, data.astype(np.float32), moved, codes=code)
    given = save(folder / "mask.nii", inside.astype("u1"), moved, codes=code)
    return source(bold, given, **{"space": None, **fields})


GRID_6 = GridSettings(mm=6, shape=(32, 36, 32))


def test_the_space_is_what_was_stated_or_what_header_and_brain_say(tmp_path):
    there = harmonise(in_mni(tmp_path), GRID_6)
    assert there.facts["mni_dice"] > 0.97 and "space_assumed" not in there.facts and there.facts["space"] == "MNI"

    scanner = harmonise(in_mni(tmp_path, code=1), GRID_6)  # said loudly
    assert "taken as MNI: header code 1 (scanner)" in scanner.facts["space_assumed"]
    assert f"Dice {scanner.facts['mni_dice']:.2f}" in scanner.facts["space_assumed"]

    away = (0, 35, 20)
    for code in (1, 4):
        with pytest.raises(
            RunRefused, match=rf"space: got header code {code} .*Dice 0\.\d\d, expected .*0\.75 or more"
        ):
            harmonise(in_mni(tmp_path, away, code), GRID_6)
    harmonise(in_mni(tmp_path, away, 1), GRID_6, BrainMaskSettings(mni_dice=0.2))

    for stated in ({"space": "MNI"}, {"name": "sub-1_space-MNI152NLin6Asym_desc-preproc_bold.nii"}):
        told = harmonise(in_mni(tmp_path, away, 1, **stated), GRID_6)
        assert told.facts["mni_dice"] < 0.75 and "check the registration" in told.facts["space_assumed"]
    native = harmonise(in_mni(tmp_path, away, 1, space="native"), GRID_6)
    assert native.facts["mni_dice"] is None and "space_assumed" not in native.facts


def test_the_overlap_is_that_of_dice(tmp_path):
    """Against the masks themselves, on the grid of the template."""
    mask, _ = template()
    shifted = np.zeros_like(mask)
    shifted[6:] = mask[:-6]  # 12 mm to the right
    expected = 2 * ((mask > 0) & (shifted > 0)).sum() / ((mask > 0).sum() + (shifted > 0).sum())
    found = harmonise(in_mni(tmp_path, (12, 0, 0)), GRID_6).facts["mni_dice"]
    assert found == pytest.approx(expected, abs=0.01)
