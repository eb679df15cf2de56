"""One scan gives the same vectors, bit for bit, however it is given and however many threads there are."""

from __future__ import annotations

import shutil
from pathlib import Path

import joblib
import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch

from helpers.pretrained import ALIGNED, write_run
from shards.cohorts.cohort_file import find_runs
from shards.cohorts.niimg import as_run
from shards.cohorts.scan import RunSource
from shards.core.errors import ConfigError, RunRefused
from slim.inference.cores import cores
from slim.inference.encoding import SessionEncoder
from slim.inference.slim_brain import SlimBrain


@pytest.fixture(scope="module")
def model(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> SlimBrain:
    return SlimBrain.from_pretrained(write_run(tmp_path_factory.mktemp("one") / "run", dataset, ALIGNED))


@pytest.fixture
def source(cohort: Path, tmp_path: Path) -> RunSource:
    """A run whose sidecar, inherited from above, has a TR (0.8 s) that its header does not have."""
    root = tmp_path / "bids"
    shutil.copytree(cohort, root)
    (root / "task-rest_bold.json").write_text('{"RepetitionTime": 0.8}')
    for own in root.rglob("*_bold.json"):
        if own.parent != root:
            own.unlink()
    return find_runs(root / "cohort.yaml")[0]


def test_a_path_and_the_image_loaded_from_it(model: SlimBrain, source: RunSource):
    expected = model.encode_tokens(str(source.bold))
    assert expected.source_tr == 0.8
    looked_at = nib.load(source.bold)
    looked_at.get_fdata()
    for image in (source.bold, nib.load(source.bold), looked_at):
        found = model.encode_tokens(image)
        np.testing.assert_array_equal(found.tokens, expected.tokens)
        assert (found.key, found.source_tr) == (expected.key, 0.8)
        with as_run(image) as run:
            assert (run.bold, run.source, run.mask) == (source.bold, str(source.bold), source.mask)


def test_an_image_that_was_saved_is_its_file(source: RunSource, tmp_path: Path):
    there = nib.load(source.bold)
    image = nib.Nifti1Image(there.get_fdata(), there.affine, there.header, dtype=np.float32)
    path = tmp_path / source.bold.name
    nib.save(image, path)
    with as_run(image) as run:
        assert run.bold == path
    np.asanyarray(image.dataobj)[2, 2, 2, 2] += 1
    with as_run(image) as run:
        assert run.bold != path and run.source == f"{path} (changed in memory)"


def test_what_was_changed_in_memory_counts_and_so_does_what_lies_beside_the_file(model: SlimBrain, source: RunSource):
    """Another affine in the header: the same voxels, mask and TR, at another place."""
    image = nib.load(source.bold)
    moved = image.affine.copy()
    moved[2, 3] += 16
    image.set_sform(moved)
    image.set_qform(moved)
    with as_run(image) as run:
        assert run.bold != source.bold and (run.mask, run.confounds) == (source.mask, source.confounds)
        assert run.says_mni and run.source == f"{source.bold} (changed in memory)"
    found = model.encode_tokens(image)
    assert found.source_tr == 0.8  # the sidecar's
    assert not np.array_equal(found.tokens[:1], model.encode_tokens(source.bold).tokens[:1])

    image = nib.load(source.bold)
    image.header["descrip"] = b"looked at"  # nothing that matters
    np.testing.assert_array_equal(model.encode(image), model.encode(source.bold))
    image.header.set_zooms(
        (*image.header.get_zooms()[:3], 0.9)
    )  # the TR was set in the header: the sidecar is not asked
    assert model.encode_tokens(image).source_tr == 0.9


def test_voxels_changed_in_the_cache_alone_are_refused(model: SlimBrain, source: RunSource):
    image = nib.load(source.bold)
    image.get_fdata()[...] *= 2
    with pytest.raises(ConfigError, match=r"voxels of get_fdata\(\) that were changed in place.*Nifti1Image"):
        model.encode(image)


def test_an_image_made_in_memory_has_nothing_beside_it(source: RunSource):
    image = nib.load(source.bold)
    for made in (image.slicer[..., 1:], nib.Nifti1Image(image.get_fdata(dtype=np.float32), image.affine, image.header)):
        with as_run(made) as run:
            assert (run.mask, run.confounds, run.source) == (None, None, "an image in memory")


def test_the_3d_images_of_a_scan(model: SlimBrain, source: RunSource, tmp_path: Path):
    there = nib.load(source.bold)
    scan = nib.Nifti1Image(
        np.asanyarray(there.dataobj).astype(np.float32), there.affine, there.header, dtype=np.float32
    )
    images = nib.four_to_three(scan)
    paths = [tmp_path / f"vol{number:04}.nii.gz" for number in range(len(images))]
    for image, path in zip(images, paths, strict=True):
        nib.save(image, path)
    given = {"mask": source.mask, "confounds": source.confounds, "tr": 0.8, "space": "MNI"}
    expected = model.encode(source.bold, **given)
    for frames in (images, tuple(paths), [*paths[:5], *images[5:]]):
        np.testing.assert_array_equal(model.encode(frames, **given), expected)
    assert not np.array_equal(model.encode(paths[::-1], **given), expected)

    small = nib.Nifti1Image(np.zeros((2, 2, 2), np.float32), there.affine)
    elsewhere = nib.Nifti1Image(np.asanyarray(images[1].dataobj), there.affine + np.eye(4), images[1].header)
    (tmp_path / "cut.nii.gz").write_bytes(paths[1].read_bytes()[:900])
    for frames, arguments, error, match in (
        (paths, {}, ConfigError, "tr: got none for a list of 3-D images, expected the repetition time .*Give tr="),
        ([source.bold], {"tr": 2}, ConfigError, r"image\[0\]: .*: shape: got 4-D.*SlimBrainTransformer accepts many"),
        ([images[0], small], {"tr": 2}, ConfigError, r"image\[1\]: an image in memory: shape: got 2x2x2, expected"),
        ([paths[0], elsewhere], {"tr": 2}, ConfigError, r"image\[1\]: .*affine: got another position"),
        ([paths[0], tmp_path / "none.nii"], {"tr": 2}, RunRefused, r"image\[1\]: .*none.nii: got no such file"),
        ([*paths[:9], tmp_path / "cut.nii.gz"], {"tr": 2}, RunRefused, r"image\[9\]: .*cut.nii.gz: data: got unread"),
        ([], {"tr": 2}, ConfigError, "image: got an empty list"),
        ([paths], {"tr": 2}, TypeError, r"image\[0\]: got list.*one scan at a time"),
        ([images[0], 3], {"tr": 2}, TypeError, r"image\[1\]: got 3 \(int\)"),
    ):
        with pytest.raises(error, match=match):
            model.encode(frames, **arguments)


def test_confounds_as_a_table_in_memory(source: RunSource):
    table = pd.read_csv(source.confounds, sep="\t", na_values="n/a")
    with as_run(source.bold, confounds=table) as run:
        written = pd.read_csv(run.confounds, sep="\t", na_values="n/a", float_precision="round_trip")
        pd.testing.assert_frame_equal(written, table, check_exact=True)
        assert "n/a" in run.confounds.read_text()
    match = r"confounds: got list, expected the path of a table \(.tsv\), or a pandas DataFrame"
    with pytest.raises(TypeError, match=match), as_run(source.bold, confounds=["x"]):
        pass


def test_errors_do_not_name_temporary_files(model: SlimBrain, source: RunSource):
    image = nib.load(source.bold)
    short = pd.read_csv(source.confounds, sep="\t").iloc[:-1]
    empty = nib.Nifti1Image(np.zeros(image.shape[:3], np.uint8), image.affine)
    for arguments, match in (
        ({"image": source.bold, "confounds": short}, "the DataFrame of confounds: rows: got 59"),
        ({"image": image.slicer[..., :2]}, "an image in memory: dim: got"),
        ({"image": source.bold, "mask": empty}, "an empty mask"),
    ):
        with pytest.raises(RunRefused, match=match) as told:
            model.encode(**arguments)
        assert "slim-brain-" not in str(told.value)


def test_vectors_do_not_depend_on_threads(model: SlimBrain, source: RunSource, monkeypatch: pytest.MonkeyPatch):
    before, found, used = torch.get_num_threads(), [], set()
    passed = SessionEncoder._pass

    def counted(self, groups, stage):
        used.add((torch.get_num_threads(), len(groups)))
        return passed(self, groups, stage)

    monkeypatch.setattr(SessionEncoder, "_pass", counted)
    try:
        for threads, allowed in ((1, 64), (4, 64), (64, 2)):
            torch.set_num_threads(threads)
            monkeypatch.setattr(joblib, "cpu_count", lambda allowed=allowed: allowed)
            assert cores() == min(threads, allowed)
            found.append(model.encode_tokens(source.bold).tokens)
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert used == {(1, 1)}  # no threads that wait for one another inside an operation
    for tokens in found[1:]:
        np.testing.assert_array_equal(tokens, found[0])
