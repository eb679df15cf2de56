"""The confounds of a run, cleaning with them against nilearn, and volumes before the steady state."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.scans import FRAMES, SMALL, brain, oblique, save, signal, source
from shards.core.errors import RunRefused
from shards.preprocessing import quality
from shards.preprocessing.confounds import CleanSettings
from shards.preprocessing.harmonise import GridSettings, harmonise


def confounds_table(path: Path, **columns) -> Path:
    pd.DataFrame(columns).to_csv(path, sep="\t", index=False, na_rep="n/a")
    return path


def test_mean_framewise_displacement_is_the_tables(tmp_path, plain):
    bold_path, mask_path, _ = plain
    moved = [None, *np.linspace(0.1, 0.3, FRAMES - 1)]
    table = confounds_table(tmp_path / "confounds.tsv", framewise_displacement=moved)
    run = source(bold_path, mask_path, confounds=table)
    assert harmonise(run, SMALL).facts["mean_fd_mm"] == pytest.approx(0.2)
    confounds_table(table, trans_x=[0.1] * FRAMES)
    assert harmonise(run, SMALL).facts["mean_fd_mm"] is None
    confounds_table(table, framewise_displacement=[None] * FRAMES, trans_x=[0.1] * FRAMES)
    assert harmonise(run, SMALL).facts["mean_fd_mm"] is None
    confounds_table(table, framewise_displacement=moved[1:])
    with pytest.raises(RunRefused, match=r"confounds\.tsv: rows: got 23, expected 24"):
        harmonise(run, SMALL)
    table.write_bytes(b"trans_x\n0\n\xff\n")
    with pytest.raises(RunRefused, match=r"unreadable table .*in line 3"):
        harmonise(run, SMALL)
    with open(table, "w") as file:  # parted by blanks
        file.write("trans_x framewise_displacement\n" + "0.5  0.25\n" * FRAMES)
    assert harmonise(run, SMALL).facts["mean_fd_mm"] == 0.25


@settings(deadline=None, max_examples=25)
@given(tr=st.sampled_from([0.72, 0.8, 0.3, 1.0, 2.2]), dropped=st.integers(0, 4), seed=st.integers(0, 1000))
def test_framewise_displacement_belongs_to_the_frames_after_resampling(tmp_path_factory, plain, tr, dropped, seed):
    """A frame has the larger value of the volumes at most one TR of the scan from it; dropped volumes are gone."""
    bold_path, mask_path, _ = plain
    moved = [None, *np.random.default_rng(seed).uniform(0, 1, FRAMES - 1).round(3)]
    table = confounds_table(tmp_path_factory.mktemp("moved") / "c.tsv", framewise_displacement=moved)
    run = source(bold_path, mask_path, confounds=table, tr=tr, dummy=dropped)
    result = harmonise(run, SMALL)
    assert len(result.displacement_T) == len(result.raw_TN)
    left = np.array(moved[dropped:], float)
    measured_T = np.arange(len(left)) * tr
    for frame, value in enumerate(result.displacement_T):
        apart_T = np.abs(measured_T - frame * result.tr)
        near = left[apart_T < 1e-6] if (apart_T < 1e-6).any() else left[apart_T < tr - 1e-6]
        expected = np.nan if np.isnan(near).all() else np.nanmax(near)
        np.testing.assert_allclose(value, expected)
    assert harmonise(replace(run, confounds=None), SMALL).displacement_T is None


@pytest.mark.parametrize(
    "clean",
    [
        {"confounds": ["trans_*", "csf"]},
        {"detrend": True},
        {"high_pass": 0.05},
        {"confounds": ["csf"], "low_pass": 0.3, "high_pass": 0.04, "detrend": True},
    ],
)
@pytest.mark.parametrize("tr", [0.72, 1.3])
def test_cleaning_is_nilearns_at_the_tr_of_the_scan(tmp_path, tr, clean):
    from nilearn.signal import clean as nilearn_clean

    rng, frames = np.random.default_rng(0), 60
    shape = (28, 32, 26)
    affine = oblique((5, 5, 5), 0, (-1, -17, 5), shape)
    mask, _ = brain(affine, shape)
    data = signal(affine, shape, np.arange(frames) * tr) + rng.standard_normal((*shape, frames))
    bold = save(tmp_path / "b.nii", data.astype(np.float32), affine, tr=tr)
    columns = {name: rng.standard_normal(frames).cumsum() for name in ("csf", "trans_x", "trans_y", "rot_x")}
    columns["trans_x_derivative1"] = [None, *np.diff(columns["trans_x"])]
    table = confounds_table(tmp_path / "c.tsv", **columns)
    run = source(bold, save(tmp_path / "m.nii", mask.astype("u1"), affine), confounds=table)
    settings = CleanSettings(**clean)
    # the same grid in time as the scan, so that what comes out is what was cleaned
    grid = GridSettings(mm=5, shape=(28, 32, 24), tr=tr, tr_range=(tr, tr))
    raw_TN = harmonise(run, grid).raw_TN.astype(np.float64)
    chosen = {"csf": ["csf"], "trans_*": ["trans_x", "trans_y", "trans_x_derivative1"]}
    names = [name for pattern in clean.get("confounds", []) for name in chosen[pattern]]
    wanted = pd.DataFrame(columns)[names].bfill().to_numpy(float) if names else None
    rest = {name: value for name, value in clean.items() if name != "confounds"}
    expected_TN = nilearn_clean(
        raw_TN - raw_TN.mean(axis=0),
        confounds=wanted,
        standardize=False,
        t_r=tr,
        **{"detrend": False, **rest},
    )
    result = harmonise(run, grid, clean=settings)
    np.testing.assert_allclose(result.raw_TN, expected_TN + raw_TN.mean(axis=0), atol=2e-3)
    assert result.facts["cleaned"] == settings.words != ""


def test_cleaning_that_cannot_be_is_refused(tmp_path, plain):
    bold_path, mask_path, _ = plain
    gap = [0.0] * 10 + [None] + [0.5] * (FRAMES - 11)
    table = confounds_table(tmp_path / "c.tsv", csf=np.arange(FRAMES), hole=gap)
    run = source(bold_path, mask_path, confounds=table)
    for run_, clean, message in (
        (run, {"confounds": ["white_matter"]}, "no column white_matter among csf, hole"),
        (run, {"confounds": ["hole"]}, r"c\.tsv: hole: got no number in line 12"),
        (run, {"low_pass": 0.7}, r"clean\.low_pass: got 0.7 Hz at TR 0.72 s, expected less than 0.6944 Hz"),
        (replace(run, confounds=None), {"confounds": ["csf"]}, r"clean\.confounds: got no confounds table"),
    ):
        with pytest.raises(RunRefused, match=message):
            harmonise(run_, SMALL, clean=CleanSettings(**clean))


def bright(data: np.ndarray, frames: int) -> np.ndarray:
    """The first frames brighter by 30, 15, 7.5 ... per cent, as before the steady state."""
    gain = np.ones(data.shape[3], np.float32)
    gain[:frames] += 0.3 / 2.0 ** np.arange(frames)
    return data * gain


def test_dummy_volumes_are_found_or_dropped_as_told(tmp_path, plain):
    bold_path, mask_path, affine = plain
    data = nib.load(bold_path).get_fdata(dtype=np.float32)
    whole_TN = harmonise(source(bold_path, mask_path), SMALL).raw_TN
    path = save(tmp_path / "b.nii", bright(data, 2), affine)
    found = harmonise(source(path, mask_path), SMALL)
    assert found.facts["dropped_frames"] == 2
    np.testing.assert_array_equal(found.raw_TN, whole_TN[2:])
    for told in (0, 5):
        result = harmonise(source(path, mask_path, dummy=told), SMALL)
        assert result.facts["dropped_frames"] == told and len(result.raw_TN) == FRAMES - told
    # what fMRIPrep found is believed before what the brightness says
    flags = {f"non_steady_state_outlier{n:02}": np.eye(FRAMES, dtype=int)[n] for n in range(3)}
    table = confounds_table(tmp_path / "c.tsv", **flags, csf=np.arange(FRAMES))
    assert harmonise(source(path, mask_path, confounds=table), SMALL).facts["dropped_frames"] == 3
    # at another TR time begins with the first frame that is kept
    slow = save(tmp_path / "slow.nii", bright(data, 2), affine, tr=1.5)
    kept = save(tmp_path / "kept.nii", data[..., 2:], affine, tr=1.5)
    one, two = harmonise(source(slow, mask_path), SMALL), harmonise(source(kept, mask_path, dummy=0), SMALL)
    np.testing.assert_array_equal(one.raw_TN, two.raw_TN)
    with pytest.raises(RunRefused, match="dummy: got 22 of 24 volumes"):
        harmonise(source(path, mask_path, dummy=22), SMALL)


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10**6), dummies=st.integers(0, 5), drift=st.floats(-0.01, 0.01), noise=st.floats(0, 0.003))
def test_only_bright_volumes_at_the_start_are_dummies(seed, dummies, drift, noise):
    rng = np.random.default_rng(seed)
    mean_T = 1000 * (1 + drift * np.linspace(0, 1, 100) + noise * rng.standard_normal(100))
    mean_T[:dummies] *= 1.4 - 0.05 * np.arange(dummies)
    assert quality.dummy_frames(mean_T, 2) == dummies
    mean_T[50] *= 1.4  # a bright frame later on is an artefact, not a dummy
    assert quality.dummy_frames(mean_T, 2) == dummies
    assert quality.dummy_frames(mean_T - mean_T.mean(), 2) == 0  # no level to compare with
    mean_T[:30] *= 1.4  # a minute is no saturation
    assert quality.dummy_frames(mean_T, 2) == 0
