"""Real human runs, in the folder $SLIM_REAL_DATA: two whole brains at full size, and the odd ones."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import yaml

from shards.cohorts.scan import RunSource
from shards.core.errors import RunRefused
from shards.format.grid import Grid
from shards.format.reader import Dataset
from shards.preprocessing.bold import open_bold
from shards.preprocessing.harmonise import GridSettings, harmonise
from shards.preprocessing.masks import BrainMaskSettings

pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def real() -> Path:
    folder = os.environ.get("SLIM_REAL_DATA")
    if not folder:
        pytest.skip("SLIM_REAL_DATA is not set: no folder of real runs to convert")
    path = Path(folder).resolve()
    if not path.is_dir():
        pytest.skip(f"SLIM_REAL_DATA is {path}, which is no folder")
    return path


def cohort_file(folder: Path, name: str, root: Path, pattern: str, **settings) -> Path:
    path = folder / f"{name}.yaml"
    path.write_text(
        yaml.safe_dump(
            {"name": name, "root": str(root), "layout": "pattern", "pattern": pattern, "space": "native", **settings}
        )
    )
    return path


# From the headers and the data's README: frames and TR of the source, volume of the brain in ml (rapidtide: of its own
# mask; ds000205: of an EPI mask, which varies), and a range for the median tSNR. The README's figures (62, 117) are
# means over the voxels of the source. These are medians after interpolation, which averages neighbouring voxels and
# frames, so noise falls and tSNR rises by a third or so; a wrong scale, mask or axis would be off by far more.
WHOLE = {
    "ds000205": {"frames": 82, "tr": 2.2, "brain_ml": (900, 2200), "tsnr": (45, 110)},
    "rapidtide": {"frames": 260, "tr": 1.5, "brain_ml": (1300, 1600), "tsnr": (90, 190)},
}


def convert(command, cohorts, out, timeout):
    """The conversion of some cohort files, ranked without training."""
    words = (*cohorts, "--out", out, "--ranker", "ridge", "--workers", 1, "--json")
    return command("tools/make_shards.py", *words, timeout=timeout)


def test_two_whole_brains_at_full_size(real, command, tmp_path):
    cohorts = [
        cohort_file(tmp_path, "ds000205", real / "ds000205", "sub-{subject}_task-{task}_run-{run}_bold_volreg.nii.gz"),
        cohort_file(
            tmp_path, "rapidtide", real / "rapidtide", "sub-{subject}.nii.gz", mask="sub-{subject}_brainmask.nii.gz"
        ),
    ]
    done = convert(command, cohorts, tmp_path / "out", timeout=900)
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout.splitlines()[-1])
    assert (facts["sessions"], facts["refused"]) == (2, 0)
    dataset = Dataset(tmp_path / "out")
    assert dataset.grid == Grid(2.0, (96, 96, 96), 4)
    for session in dataset.sessions:
        known = WHOLE[session.cohort]
        told = [line for line in done.stdout.splitlines() if line.startswith(f"native space: {session.key}")]
        assert len(told) == 1 and "not registered" in told[0] and str(session.centred_by_mm) in told[0]
        assert session.source_tr == pytest.approx(known["tr"]) and session.tr == 0.72
        assert session.frames == int((known["frames"] - 1) * known["tr"] / 0.72 + 1e-9) + 1
        for name in ("brain_ml", "tsnr"):
            low, high = known[name]
            assert low < getattr(session, name) < high, (session.cohort, name, getattr(session, name))
        assert session.mask_outside_grid == 0 and session.n_windows == session.frames // 5
        arrays = dataset.read(session)
        assert arrays["windows"].shape == (32, 5, session.n_patches, 64)
        assert 3000 < session.n_patches < 7000
        brain = arrays["brain"].astype(bool)
        # a global z-score: over brain voxels the mean is 0, and between and within them the SD is 1
        assert abs(arrays["baseline"][brain].mean()) < 1e-4
        assert np.mean(arrays["baseline"][brain] ** 2 + arrays["spread"][brain] ** 2) == pytest.approx(1, abs=1e-3)
        assert 0.005 < np.median(arrays["spread"][brain]) < 0.3  # fluctuations are a small part of it
        # centred: what is left and right of the middle, and so on, is alike
        place = arrays["patch"].astype(int)
        np.testing.assert_allclose((place.min(axis=0) + place.max(axis=0)) / 2, 11.5, atol=1)
        assert np.isfinite(arrays["scores"]).all() and arrays["scores"].max() > 0


def stored(real: Path, name: str, file: str, **stated) -> RunSource:
    return RunSource(name, "1", "", "", "", real / name / file, file, **{"space": "native", **stated})


# What becomes of each file: cohort settings, then by subject a reason to refuse it, or None if it is converted.
ODD = {
    "rt-cloud": (
        {"pattern": "{subject}_task-{task}_run-{run}_bold.nii.gz"},
        {"rtcloud": "windows of 5 frames at TR 0.72 s, expected at least 8"},
    ),
    "oro-nifti": (
        {"pattern": "{subject}_func_data.nii.gz", "space": None},
        {"filtered": "qform_code, sform_code: got 0, 0"},
    ),
    "nipy": ({"pattern": "{subject}.nii.gz"}, {"functional": "mask: got"}),
    "nitime": (
        {"pattern": "{subject}.nii.gz", "mask": "ones"},
        {"fmri1": "mask: got a brain of 18 ml", "fmri2": "mask: got a brain of 18 ml"},
    ),
    "tedana": (
        {"pattern": "{subject}.nii.gz", "mask": "mask.nii.gz"},
        {
            "mask": "dim: got 39x50x33, expected",
            "echo1": "windows of 5 frames",
            "echo2": "windows of 5 frames",
            "echo3": "windows of 5 frames",
        },
    ),
    # a parcellation that the pattern takes for a second run, and a mask that its field does not match
    "ds000205": (
        {"pattern": "sub-{subject}_task-{task}_run-{run}_bold_*.nii.gz"},
        {"ds205s03": "for 2 files, also sub-ds205s03_task-functionallocalizer_run-01_bold_volreg.nii.gz"},
    ),
}


@pytest.fixture(scope="module")
def ones(real, tmp_path_factory) -> str:
    """A mask for nitime's two small blocks inside the brain, without a rim to find a mask by."""
    image = nib.load(real / "nitime" / "fmri1.nii.gz")
    path = tmp_path_factory.mktemp("ones") / "ones.nii.gz"
    nib.save(nib.Nifti1Image(np.ones(image.shape[:3], np.uint8), image.affine), path)
    return str(path)


def test_the_odd_ones_are_refused_for_the_right_reason(real, ones, command, tmp_path):
    cohorts = []
    for name, (settings, _) in ODD.items():
        settings = {key: ones if value == "ones" else value for key, value in settings.items()}
        cohorts.append(cohort_file(tmp_path, name, real / name, **settings))
    planned = command("tools/make_shards.py", *cohorts, "--out", tmp_path / "out", "--dry-run", "--json")
    assert planned.returncode == 1, planned.stderr
    facts = json.loads(planned.stdout.splitlines()[-1])
    assert facts["will_be_refused"] == facts["runs"] - 1  # all but nipy, whose mask is computed from its frames
    assert not (tmp_path / "out").exists()

    done = convert(command, cohorts, tmp_path / "out", timeout=600)
    assert done.returncode == 1, done.stderr
    failed = {
        (line["cohort"], line["key"].split("sub-")[1].split("_")[0]): line
        for line in map(json.loads, (tmp_path / "out" / "failed.jsonl").read_text().splitlines())
    }
    assert set(failed) == {(name, subject) for name, (_, fates) in ODD.items() for subject in fates}
    for name, (_, fates) in ODD.items():
        for subject, reason in fates.items():
            line = failed[name, subject]
            assert reason in line["reason"] and "expected" in line["reason"] and line["source"] in line["reason"]
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_small_blocks_are_converted_where_their_volume_is_meant(real, ones, command, tmp_path):
    cohort = cohort_file(tmp_path, "nitime", real / "nitime", pattern="{subject}.nii.gz", mask=ones)
    done = command(
        "tools/make_shards.py", cohort, "--out", tmp_path / "out", "--ranker", "ridge", "--json", "mask.ml=[1,2500]"
    )
    assert done.returncode == 0, done.stderr
    sessions = Dataset(tmp_path / "out").sessions
    assert [session.subject for session in sessions] == ["fmri1", "fmri2"]
    assert all(session.frames == int(39 * 1.35 / 0.72) + 1 for session in sessions)  # LSP, TR 1.35 s


COARSE = GridSettings(mm=4, shape=(48, 48, 48))


def test_the_volume_before_the_steady_state_is_found(real):
    for echo in ("echo1.nii.gz", "echo2.nii.gz", "echo3.nii.gz"):
        run = stored(real, "tedana", echo, mask=real / "tedana" / "mask.nii.gz")
        with pytest.raises(RunRefused, match="a brain of 3311 ml"):  # nearly the whole box
            harmonise(run, COARSE)
        assert harmonise(run, COARSE, BrainMaskSettings(ml=(300, 3500))).facts["dropped_frames"] == 1


def test_a_header_nobody_filled_in_needs_tr_and_orientation_from_the_cohort_file(real):
    run = stored(real, "oro-nifti", "filtered_func_data.nii.gz", space=None)
    for stated, message in (
        ({}, "qform_code, sform_code: got 0, 0"),
        ({"space": "native"}, "TR: got 1 without a unit"),
        ({"space": "native", "tr": 2.0}, "mask: got a brain of"),  # voxels of 1 mm, a brain of 40 ml
    ):
        with pytest.raises(RunRefused, match=message):
            harmonise(replace(run, **stated), COARSE)
    meant = replace(run, space="native", tr=2.0, orientation="RAS")
    result = harmonise(meant, COARSE, BrainMaskSettings(ml=(1, 2500)))
    assert result.facts["orientation_assumed"] == "RAS" and len(result.raw_TN) == int(63 * 2 / 0.72) + 1


def test_plain_and_compressed_are_the_same_run(real):
    runs = [stored(real, "nipy", name) for name in ("functional.nii", "functional.nii.gz")]
    plain, compressed = (list(open_bold(run).volumes()) for run in runs)
    np.testing.assert_array_equal(plain, compressed)
    image = nib.load(real / "nipy" / "functional.nii")
    np.testing.assert_allclose(np.stack(plain, axis=-1), image.get_fdata(), rtol=1e-6)  # slope and intercept
