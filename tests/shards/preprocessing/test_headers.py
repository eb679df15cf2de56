"""Headers as scanners and packages write them: units, axes, pairs, byte orders, forms that disagree, TR by BIDS."""

from __future__ import annotations

import json
import os
import struct
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from helpers.records import scan_facts
from helpers.scans import FRAMES, SMALL, save, source, zscored
from shards.cohorts import bids
from shards.conversion.session import assumptions
from shards.core.errors import RunRefused
from shards.format.session_record import ScanFacts
from shards.preprocessing.bold import open_bold
from shards.preprocessing.harmonise import harmonise

pytestmark = pytest.mark.fast


def stored(path: Path, image: nib.Nifti1Pair, tr: float = 0.72, unit: str = "mm") -> Path:
    """An image written with codes 4, its TR on the first axis after the third that is longer than 1."""
    image.set_sform(image.affine, 4)
    image.set_qform(image.affine, 4)
    zooms = list(image.header.get_zooms())
    zooms[3 + next((n for n, size in enumerate(image.shape[3:]) if size > 1), 0)] = tr
    image.header.set_zooms(zooms)
    image.header.set_xyzt_units(unit, "sec")
    nib.save(image, path)
    return path


@pytest.fixture(scope="module")
def scan(plain):
    """Voxels, affine, mask and what they are harmonised into."""
    bold_path, mask_path, affine = plain
    data = nib.load(bold_path).get_fdata(dtype=np.float32)
    return data, affine, mask_path, harmonise(source(bold_path, mask_path), SMALL)


def test_a_tr_of_32_bits_is_what_was_meant(tmp_path, scan):
    data, affine, mask_path, _ = scan
    bold = save(tmp_path / "b.nii.gz", data, affine, tr=0.8)
    for told in (0.8, 0.800000011920929, float(np.float32(0.8))):
        (tmp_path / "b.json").write_text(json.dumps({"RepetitionTime": told}))
        assert open_bold(source(bold, mask_path)).tr == 0.8
        assert open_bold(source(bold, mask_path, tr=told)).tr == 0.8
    result = harmonise(source(bold, mask_path), SMALL)
    assert (result.tr, result.source_tr, len(result.raw_TN)) == (0.8, 0.8, FRAMES)


def test_a_tr_is_inherited_as_bids_has_it(tmp_path, scan):
    data, affine, mask_path, _ = scan
    func = tmp_path / "sub-01" / "ses-1" / "func"
    bold = save(func / "sub-01_ses-1_task-rest_run-1_space-MNI_desc-preproc_bold.nii.gz", data, affine, tr=1.0)

    def tr() -> tuple[float, str]:
        found = open_bold(source(bold, mask_path))
        return found.tr, found.tr_source

    def write(path: Path, **content) -> None:
        path.write_text(json.dumps(content))

    assert tr() == (1.0, "header")
    assert "TR 1 s is from the header" in assumptions(ScanFacts(tr=1.0, tr_source="header"))[0]
    write(tmp_path / "task-nback_bold.json", RepetitionTime=9)  # of another task
    write(tmp_path / "task-rest_run-2_bold.json", RepetitionTime=8)
    write(tmp_path / "task-rest_physio.json", RepetitionTime=7)
    assert tr() == (1.0, "header")
    write(tmp_path / "bold.json", RepetitionTime=2.5)
    assert tr() == (2.5, "bold.json")
    write(tmp_path / "task-rest_bold.json", RepetitionTime=2.0, TaskName="rest")
    assert tr() == (2.0, "task-rest_bold.json")
    write(tmp_path / "sub-01" / "sub-01_task-rest_bold.json", RepetitionTime=1.5)
    assert tr() == (1.5, "sub-01_task-rest_bold.json")
    own = bold.with_name(bold.name.replace(".nii.gz", ".json"))
    write(own, SkullStripped=True)  # has none: it is inherited
    assert tr() == (1.5, "sub-01_task-rest_bold.json")
    own.write_bytes(b"\xef\xbb\xbf" + json.dumps({"RepetitionTime": 0.9}).encode())  # a byte order mark
    assert tr() == (0.9, own.name)
    own.unlink()
    own.symlink_to("../../../.git/annex/objects/0.json")
    with pytest.raises(RunRefused, match=r"bold\.json: got a link to content.*datalad get"):
        tr()


def test_a_folder_that_did_not_change_is_listed_once(tmp_path, monkeypatch):
    """The folder of a dataset is asked about for each run; a file that is added later is found all the same."""
    bold = tmp_path / "sub-01" / "func" / "sub-01_task-rest_bold.nii.gz"
    bold.parent.mkdir(parents=True)
    for folder in (tmp_path, bold.parent, bold.parent.parent):
        os.utime(folder, (1e9, 1e9))
    listed = []
    listing = bids._listed_descriptions
    monkeypatch.setattr(bids, "_listed_descriptions", lambda folder: listed.append(folder) or listing(folder))
    own = bold.with_name("sub-01_task-rest_bold.json")
    assert [bids.sidecars(bold) for _ in range(3)] == [[own]] * 3 and len(listed) == 3
    (tmp_path / "task-rest_bold.json").write_text("{}")
    assert [bids.sidecars(bold) for _ in range(2)] == [[own, tmp_path / "task-rest_bold.json"]] * 2
    (tmp_path / "bold.json").write_text("{}")
    assert len(bids.sidecars(bold)) == 3


def test_an_affine_in_metres_or_microns_is_read_by_its_unit(tmp_path, scan):
    data, affine, mask_path, expected = scan
    for unit, factor in (("meter", 1e-3), ("micron", 1e3)):
        scaled = np.diag([factor, factor, factor, 1]) @ affine
        bold = stored(tmp_path / f"{unit}.nii", nib.Nifti1Image(data, scaled), unit=unit)
        mask = nib.Nifti1Image(np.asarray(nib.load(mask_path).dataobj), scaled)
        mask.header.set_xyzt_units(unit)
        mask.set_sform(scaled, 4)
        nib.save(mask, tmp_path / f"{unit}_mask.nii")
        opened = open_bold(source(bold, None))
        np.testing.assert_allclose(opened.affine, affine, rtol=1e-6)
        assert opened.voxel_mm == (5, 5, 5)
        result = harmonise(source(bold, tmp_path / f"{unit}_mask.nii"), SMALL)
        np.testing.assert_allclose(zscored(result), zscored(expected), atol=1e-3)


@pytest.mark.parametrize("kind", ["x y z 1 t", "x y z t 1", "pair", "pair by its header", "nifti-2", "big-endian"])
def test_other_layouts_hold_the_same_run(tmp_path, scan, kind):
    data, affine, mask_path, expected = scan
    match kind:
        case "x y z 1 t":
            bold = stored(tmp_path / "b.nii.gz", nib.Nifti1Image(data[:, :, :, None], affine))
        case "x y z t 1":
            bold = stored(tmp_path / "b.nii.gz", nib.Nifti1Image(data[..., None], affine))
        case "nifti-2":
            bold = stored(tmp_path / "b.nii", nib.Nifti2Image(data, affine))
        case "big-endian":
            header = nib.Nifti1Header(endianness=">")
            header.set_data_dtype(np.float32)
            bold = stored(tmp_path / "b.nii", nib.Nifti1Image(data, affine, header))
        case _:
            stored(tmp_path / "b.img", nib.Nifti1Pair(data, affine))
            bold = tmp_path / ("b.hdr" if "header" in kind else "b.img")
    result = harmonise(source(bold, mask_path), SMALL)
    assert (result.source_tr, len(result.raw_TN)) == (0.72, FRAMES)
    np.testing.assert_array_equal(result.raw_TN, expected.raw_TN)


def test_half_of_a_pair_and_analyze_are_named(tmp_path, scan):
    data, affine, mask_path, _ = scan
    stored(tmp_path / "b.img", nib.Nifti1Pair(data, affine))
    (tmp_path / "b.hdr").unlink()
    with pytest.raises(RunRefused, match=r"no b\.hdr next to it, expected both files of the pair"):
        open_bold(source(tmp_path / "b.img", mask_path))
    with pytest.raises(RunRefused, match=r"no c\.img next to it"):
        (tmp_path / "c.hdr").write_bytes(bytes(348))
        open_bold(source(tmp_path / "c.hdr", mask_path))
    nib.save(nib.AnalyzeImage(data, affine), tmp_path / "old.img")
    with pytest.raises(RunRefused, match=r"ANALYZE 7\.5, which has no orientation.*Convert it to NIfTI"):
        open_bold(source(tmp_path / "old.img", mask_path))


@pytest.mark.parametrize("dtype", ["int16", "int32", "float32", "float64"])
@pytest.mark.parametrize("order", [">", "<"])
def test_voxels_in_another_byte_order_than_the_header_are_refused(tmp_path, scan, dtype, order):
    data, affine, mask_path, _ = scan
    header = nib.Nifti1Header(endianness=order)
    header.set_data_dtype(dtype)
    values = np.where(data < 400, 0, data)
    path = stored(tmp_path / "b.nii", nib.Nifti1Image(np.rint(values).astype(dtype), affine, header))
    harmonise(source(path, mask_path), SMALL)
    raw = bytearray(path.read_bytes())
    raw[352:] = np.frombuffer(raw[352:], dtype).byteswap().tobytes()
    path.write_bytes(raw)
    with pytest.raises(RunRefused, match=r"data: got voxels that are noise in the byte order of the header"):
        harmonise(source(path, mask_path), SMALL)


@pytest.mark.parametrize(
    ("edits", "message"),
    [
        ([(123, "B", 7)], r"xyzt_units: got code 7 for the unit of length"),
        ([(123, "B", 2 | 32)], r"xyzt_units: got code 32 for the unit of time"),
        ([(42, "h", -28)], r"dim: got "),
        ([(40, "h", 0)], r"dim: got "),
        ([(70, "h", 77)], r"datatype: got code 77"),
        ([(112, "f", 1.0), (116, "f", float("nan"))], r"scl_slope, scl_inter: got 1, nan"),
        ([(254, "h", 0), (256, "f", 0.7071070), (260, "f", 0.7071072), (264, "f", 0.01)], r"quatern_b, c, d: got "),
        ([(42, "h", 30000), (44, "h", 30000), (46, "h", 30000)], r"data: got an incomplete file: it ends in frame 0"),
        ([(280, "f", float("nan"))], r"affine: got singular or not finite"),
        ([(108, "f", 1e9)], r"data: got an incomplete file|got "),
    ],
)
def test_a_field_without_meaning_is_named_and_refuses_that_scan_alone(tmp_path, scan, edits, message):
    data, affine, mask_path, _ = scan
    path = stored(tmp_path / "b.nii", nib.Nifti1Image(data, affine))
    raw = bytearray(path.read_bytes())
    for offset, kind, value in edits:
        struct.pack_into("<" + kind, raw, offset, value)
    path.write_bytes(raw)
    with pytest.raises(RunRefused, match=message) as caught:
        harmonise(source(path, mask_path), SMALL)
    assert "\n" not in caught.value.line()


def test_sform_and_qform_that_disagree_on_left_and_right_are_told(tmp_path, scan):
    data, affine, mask_path, expected = scan
    flipped = np.diag([-1, 1, 1, 1]) @ affine
    for qform, told in ((flipped, "sform RAS, qform LAS"), (affine, None), (None, None)):
        image = nib.Nifti1Image(data, affine)
        image.header.set_zooms((5, 5, 5, 0.72))
        image.header.set_xyzt_units("mm", "sec")
        image.set_sform(affine, 4)
        image.set_qform(qform, 0 if qform is None else 4)
        nib.save(image, tmp_path / "b.nii")
        result = harmonise(source(tmp_path / "b.nii", mask_path), SMALL)
        assert result.facts.get("forms_disagree") == told
        assert any("disagree on left and right" in words for words in assumptions(scan_facts(**result.facts))) == bool(
            told
        )
        np.testing.assert_allclose(result.raw_TN, expected.raw_TN)


def test_hints_speak_of_where_things_are_stated(tmp_path, scan):
    data, affine, mask_path, _ = scan
    bold = save(tmp_path / "b.nii", data, affine, tr=0)
    with pytest.raises(RunRefused, match="Give `tr` in the cohort file"):
        open_bold(source(bold, mask_path))
    with pytest.raises(RunRefused, match="Give `tr` as an argument"):
        open_bold(replace(source(bold, mask_path), stated="as an argument"))
