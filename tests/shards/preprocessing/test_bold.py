"""What a run on disk must be like: its TR and position, and every refusal."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform

from helpers.scans import FRAMES, SMALL, save, source, zscored
from shards.cohorts.scan import RunSource
from shards.core.errors import RunRefused
from shards.preprocessing import bold as bold_module
from shards.preprocessing.bold import open_bold
from shards.preprocessing.harmonise import harmonise

pytestmark = pytest.mark.fast


def corrupt(path: Path, out: Path, keep: float) -> Path:
    data = path.read_bytes()
    out.write_bytes(data[: int(len(data) * keep)])
    return out


def test_tr_is_the_cohorts_then_the_sidecars_then_the_headers(tmp_path, plain):
    bold_path, mask_path, affine = plain
    data = nib.load(bold_path).get_fdata(dtype=np.float32)

    def tr(zoom: float, unit: str, **stated) -> float:
        image = nib.Nifti1Image(data, affine)
        image.header.set_zooms((5, 5, 5, zoom))
        image.header.set_xyzt_units("mm", unit)
        nib.save(image, tmp_path / "b.nii.gz")
        return open_bold(source(tmp_path / "b.nii.gz", mask_path, **stated)).tr

    assert [tr(720, "msec"), tr(720_000, "usec"), tr(0.8, "sec"), tr(1, "sec"), tr(2, "unknown")] == [
        0.72,
        0.72,
        0.8,
        1,
        2,
    ]
    with pytest.raises(RunRefused, match=r"TR: got 1 without a unit.*Give `tr` in the cohort file"):
        tr(1, "unknown")
    assert tr(1, "unknown", tr=1.3) == 1.3
    (tmp_path / "b.json").write_text(json.dumps({"RepetitionTime": 1.44}))
    assert tr(0.72, "sec") == tr(1, "unknown") == 1.44
    assert tr(0.72, "sec", tr=0.75) == 0.75
    for text in ('{"RepetitionTime": "1.44 s"}', '{"RepetitionTime": [1.4]}', "{", "[]"):
        (tmp_path / "b.json").write_text(text)
        with pytest.raises(RunRefused, match=r"b\.json"):
            tr(0.72, "sec")


@pytest.mark.parametrize("codes", ["LAS", "RAS", "PSR"])
def test_without_codes_the_stated_orientation_holds_and_the_brain_is_centred(tmp_path, plain, codes):
    bold_path, mask_path, affine = plain
    expected = harmonise(source(bold_path, mask_path, space="native"), SMALL)
    stored = ornt_transform(io_orientation(affine), axcodes2ornt(codes))
    bold, mask = (nib.load(path).as_reoriented(stored) for path in (bold_path, mask_path))
    files = []
    for name, image in (("b.nii", bold), ("m.nii", mask)):
        bare = nib.Nifti1Image(np.asarray(image.dataobj), None, image.header)
        bare.set_sform(None, 0)
        bare.set_qform(None, 0)
        nib.save(bare, tmp_path / name)
        files.append(tmp_path / name)
    run = source(*files, space=None)
    with pytest.raises(RunRefused, match="qform_code, sform_code: got 0, 0"):
        harmonise(run, SMALL)
    for space in ("native", "MNI"):
        stated = harmonise(replace(run, space=space, orientation=codes), SMALL)
        assert stated.facts["orientation_assumed"] == codes and "centred_by_mm" in stated.facts
        np.testing.assert_allclose(zscored(stated), zscored(expected), atol=1e-3)
    assumed = harmonise(replace(run, space="native"), SMALL)
    assert assumed.facts["orientation_assumed"] == "LAS"
    if codes == "LAS":
        np.testing.assert_array_equal(assumed.raw_TN, stated.raw_TN)


@pytest.mark.parametrize("how", ["longer", "rewritten", "gone"])
def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path, plain, how, monkeypatch):
    bold_path, mask_path, affine = plain
    path = save(tmp_path / "b.nii", nib.load(bold_path).get_fdata(dtype=np.float32), affine)
    checked = bold_module._check_volume

    def change(run, frame, volume):
        if frame == 3:
            content = path.read_bytes()
            path.unlink()
            if how != "gone":
                path.write_bytes(content + b"more" * (how == "longer"))
        checked(run, frame, volume)

    monkeypatch.setattr(bold_module, "_check_volume", change)
    with pytest.raises(RunRefused, match=r"changed while it was read|was removed while it was read"):
        harmonise(source(path, mask_path), SMALL)


def spoiled(name: str, folder: Path, bold: Path, mask: Path) -> RunSource:
    """The plain run with one thing wrong."""
    image = nib.load(bold)
    data, affine = image.get_fdata(dtype=np.float32), image.affine
    path, run = folder / "sub-01_bold.nii.gz", source(folder / "sub-01_bold.nii.gz", mask)
    match name:
        case "three dimensions":
            save(path, data[..., 0], affine)
        case "three frames":
            save(path, data[..., :3], affine)
        case "no codes":
            save(path, data, affine, codes=0)
            run = replace(run, space=None)
        case "no TR":
            image.header.set_zooms((5, 5, 5, 1))
            image.header.set_xyzt_units("mm", "unknown")
            nib.save(image, path)
        case "an empty frame":
            data[..., 7] = 0
            save(path, data, affine)
        case "a mask of everything":
            save(path, data, affine)
            run = replace(run, mask=save(folder / "m.nii", np.ones((28, 32, 26), "u1"), affine))
        case "a speck of a mask":
            speck = np.zeros((28, 32, 26), "u1")
            speck[12:16, 12:16, 12:16] = 1
            save(path, data, affine)
            run = replace(run, mask=save(folder / "m.nii", speck, affine))
        case "a mask beside the scan":
            save(path, data[:, :12], affine)
        case "NaN" | "Inf":
            data[3, 4, 5, 6] = np.nan if name == "NaN" else np.inf
            save(path, data, affine)
        case "truncated gzip":
            corrupt(bold, path, 0.6)
        case "truncated plain":
            nib.save(image, folder / "whole.nii")
            run = source(corrupt(folder / "whole.nii", folder / "sub-01_bold.nii", 0.6), mask)
        case "last byte of gzip lost":
            path.write_bytes(bold.read_bytes()[:-1])
        case "a flipped bit of the checksum":
            content = bytearray(bold.read_bytes())
            content[-8] ^= 1
            path.write_bytes(content)
        case "no NIfTI":
            path.write_bytes(b"not an image at all")
        case "no file":
            pass
        case "colour":
            colour = np.zeros((4, 4, 4, 5), [("R", "u1"), ("G", "u1"), ("B", "u1")])
            nib.save(nib.Nifti1Image(colour, affine), path)
        case "no mask file":
            shutil.copy(bold, path)
            run = replace(run, mask=folder / "sub-01_mask.nii.gz")
        case "empty mask":
            shutil.copy(bold, path)
            run = replace(run, mask=save(folder / "m.nii", np.zeros((28, 32, 26), "u1"), affine))
        case "a mask without position":
            shutil.copy(bold, path)
            run = replace(run, mask=save(folder / "m.nii", np.ones((28, 32, 26), "u1"), affine, codes=0))
        case "a mask of four dimensions":
            shutil.copy(bold, path)
            run = replace(run, mask=bold)
        case "mask beside the run":
            shutil.copy(bold, path)
            away = affine.copy()
            away[:3, 3] += [0, 0, 400]
            grid_mask = np.zeros((28, 32, 26), "u1")
            grid_mask[6:22, 6:22, 6:22] = 1
            here = save(path, data, away)
            run = replace(run, bold=here, mask=save(folder / "m.nii", grid_mask, affine))
        case "constant":
            save(path, np.full_like(data, 818.3), affine)
        case "constant but for rounding":
            noise = np.random.default_rng(0).uniform(-1e-7, 1e-7, data.shape)
            save(path, (818.3 * (1 + noise)).astype(np.float32), affine)
        case "the same frame again and again":
            save(path, np.repeat(data[..., :1], FRAMES, axis=3), affine, tr=2.2)
        case "TR 0":
            save(path, data, affine, tr=0)
        case "TR in a wrong unit":
            save(path, data, affine, tr=720)
        case "outside the grid":
            away = affine.copy()
            away[:3, 3] += [0, 60, 0]
            save(path, data, away)
            run = replace(run, mask=save(folder / "m.nii", nib.load(mask).get_fdata().astype("u1"), away))
        case _:
            raise AssertionError(name)
    return run


REFUSALS = {
    "three dimensions": ("dim", "28x32x26", "4 frames"),
    "three frames": ("dim", "28x32x26x3", "4 frames"),
    "no codes": ("qform_code", "0, 0", "a code above 0"),
    "NaN": ("data", "NaN or Inf in frame 6", "finite"),
    "Inf": ("data", "NaN or Inf in frame 6", "finite"),
    "truncated gzip": ("data", "unreadable", "a complete file"),
    "truncated plain": ("data", "it ends in frame 14 of 24", "a complete file"),
    "last byte of gzip lost": ("data", "unreadable", "a complete file"),
    "a flipped bit of the checksum": ("data", "CRC", "a complete file"),
    "no NIfTI": ("", "a file that is not compressed with gzip", "a NIfTI image"),
    "no file": ("", "no such file", "a NIfTI image"),
    "colour": ("datatype", "colour", "real numbers"),
    "no mask file": ("mask", "sub-01_mask.nii.gz: no such file", "a NIfTI image"),
    "empty mask": ("mask", "an empty mask", "brain voxels"),
    "a mask without position": ("mask", "position unknown", "a code above 0"),
    "a mask of four dimensions": ("mask", "4 dimensions", "three dimensions"),
    "mask beside the run": ("mask", "100% of the mask outside the scan", "overlap"),
    "no TR": ("TR", "1 without a unit", "in seconds"),
    "an empty frame": ("data", "0 in every voxel of frame 7", "an image in every frame"),
    "a mask of everything": ("mask", "a brain of 2912 ml", "300 to 2500 ml"),
    "a speck of a mask": ("mask", "a brain of 8 ml", "300 to 2500 ml"),
    "a mask beside the scan": ("mask", "of the mask outside the scan", "overlap"),
    "constant": ("data", "818.3 in every voxel of frame 0", "an image in every frame"),
    "constant but for rounding": ("data", "the same volume in every frame", "varies"),
    "the same frame again and again": ("data", "the same volume in every frame", "varies"),
    "TR 0": ("TR", "0 s", "0.05-20 s"),
    "TR in a wrong unit": ("TR", "720 s", "0.05-20 s"),
    "outside the grid": ("mask", "of the brain outside the grid", "at most 10%"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_what_cannot_be_converted_is_refused_by_name(plain, tmp_path, name):
    bold, mask, _ = plain
    run = spoiled(name, tmp_path, bold, mask)
    with pytest.raises(RunRefused) as caught:
        harmonise(run, SMALL)
    field, got, expected = REFUSALS[name]
    line = caught.value.line()
    assert "\n" not in line and line.startswith(f"{run.source}: {field}")
    assert got in str(caught.value.got) and expected in str(caught.value.expected)


def test_the_file_itself_is_never_changed(plain):
    bold, mask, _ = plain
    before = bold.read_bytes()
    harmonise(source(bold, mask), SMALL)
    assert bold.read_bytes() == before
