"""Real human runs, in the folder $SLIM_REAL_DATA: two whole brains at full size, and the odd ones."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import yaml

from shards.grid import Grid
from shards.reader import Dataset

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


@pytest.mark.slow
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
        known = WHOLE[session["cohort"]]
        told = [line for line in done.stdout.splitlines() if line.startswith(f"native space: {session['key']}")]
        assert len(told) == 1 and "not registered" in told[0] and str(session["centred_by_mm"]) in told[0]
        assert session["source_tr"] == pytest.approx(known["tr"]) and session["tr"] == 0.72
        assert session["frames"] == int((known["frames"] - 1) * known["tr"] / 0.72 + 1e-9) + 1
        for name in ("brain_ml", "tsnr"):
            low, high = known[name]
            assert low < session[name] < high, (session["cohort"], name, session[name])
        assert session["mask_outside_grid"] == 0 and session["n_windows"] == session["frames"] // 5
        arrays = dataset.read(session)
        assert arrays["windows"].shape == (32, 5, session["n_patches"], 64)
        assert 3000 < session["n_patches"] < 7000
        brain = arrays["brain"].astype(bool)
        # a global z-score: over brain voxels the mean is 0, and between and within them the SD is 1
        assert abs(arrays["baseline"][brain].mean()) < 1e-4
        assert np.mean(arrays["baseline"][brain] ** 2 + arrays["spread"][brain] ** 2) == pytest.approx(1, abs=1e-3)
        assert 0.005 < np.median(arrays["spread"][brain]) < 0.3  # fluctuations are a small part of it
        # centred: what is left and right of the middle, and so on, is alike
        place = arrays["patch"].astype(int)
        np.testing.assert_allclose((place.min(axis=0) + place.max(axis=0)) / 2, 11.5, atol=1)
        assert np.isfinite(arrays["scores"]).all() and arrays["scores"].max() > 0


# What becomes of each: a reason to refuse it, or None if it is converted.
ODD = {
    "rt-cloud": (
        "{subject}_task-{task}_run-{run}_bold.nii.gz",
        {},
        {"rtcloud": "windows of 5 frames at TR 0.72 s, expected at least 8"},
    ),
    "oro-nifti": ("{subject}_func_data.nii.gz", {}, {"filtered": "qform_code, sform_code: got 0, 0"}),
    "nipy": ("{subject}.nii.gz", {}, {"functional": "mask: got"}),
    "nitime": ("{subject}.nii.gz", {"mask": "ones"}, {"fmri1": None, "fmri2": None}),
    "tedana": (
        "{subject}.nii.gz",
        {"mask": "mask.nii.gz"},
        {
            "mask": "dim: got 39x50x33, expected",
            "echo1": "windows of 5 frames",
            "echo2": "windows of 5 frames",
            "echo3": "windows of 5 frames",
        },
    ),
}


@pytest.mark.slow
def test_the_odd_ones_are_converted_or_refused_for_the_right_reason(real, command, tmp_path):
    import nibabel as nib

    cohorts = []
    for name, (pattern, settings, _) in ODD.items():
        if settings.get("mask") == "ones":  # two small blocks inside the brain, without a rim to find a mask by
            image = nib.load(real / name / "fmri1.nii.gz")
            ones = tmp_path / f"{name}_mask.nii.gz"
            nib.save(nib.Nifti1Image(np.ones(image.shape[:3], np.uint8), image.affine), ones)
            settings = {"mask": str(ones)}
        cohorts.append(cohort_file(tmp_path, name, real / name, pattern, **settings))
    done = convert(command, cohorts, tmp_path / "out", timeout=600)
    assert done.returncode == 1, done.stderr
    failed = {
        (line["cohort"], line["key"].split("sub-")[1].split("_")[0]): line["reason"]
        for line in map(json.loads, (tmp_path / "out" / "failed.jsonl").read_text().splitlines())
    }
    converted = {(session["cohort"], session["subject"]) for session in Dataset(tmp_path / "out").sessions}
    for name, (_, _, fates) in ODD.items():
        for subject, reason in fates.items():
            if reason is None:
                assert (name, subject) in converted
            else:
                assert reason in failed[name, subject]
    assert len(failed) + len(converted) == sum(len(fates) for _, _, fates in ODD.values())
