"""Cohorts to datasets: the same bytes however the work was cut, and nothing done twice."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest

from helpers.conversions import SETTINGS, bold_files, copy_cohort, make_unreadable, pack_into, renamed, same, times
from helpers.scans import save
from helpers.scans import source as run_source
from shards.cohorts.cohort_file import find_runs
from shards.conversion.session import ParcelSettings, fingerprint, survey
from shards.conversion.splits import read_table
from shards.core.cli import DONE, REFUSED, WRONG
from shards.core.errors import ConfigError, RunRefused
from shards.format import layout
from shards.format.patches import voxel_slots
from shards.format.reader import Dataset
from shards.preprocessing.harmonise import harmonise
from slim.evaluation.baselines import connectomes
from slim.ranking.rankers import make_ranker


def test_two_workers_write_what_one_writes(cohort, dataset, make_shards, tmp_path):
    assert make_shards(cohort / "cohort.yaml", "--out", tmp_path / "out", "--ranker", "ridge", "--workers", 2) == DONE
    same(tmp_path / "out", dataset)


def test_steps_one_by_one_write_what_one_call_writes(cohort, dataset, make_shards, tmp_path):
    call = [cohort / "cohort.yaml", "--out", tmp_path / "out", "--ranker", "ridge", "--only"]
    assert make_shards(*call, "pack") == WRONG  # too early, and told so
    assert make_shards(*call, "find,harmonise") == DONE
    assert not (tmp_path / "out" / layout.MANIFEST).exists()
    for bold in bold_files(copy := Path(shutil.copytree(cohort, tmp_path / "copy"))):
        make_unreadable(bold)  # from here on the runs need not be read
    call[0] = copy / "cohort.yaml"
    assert make_shards(*call, "rank") == DONE
    assert make_shards(*call, "pack") == DONE
    same(tmp_path / "out", dataset)


def test_a_second_call_reads_nothing_and_writes_nothing(cohort, dataset, make_shards, tmp_path):
    source, out = copy_cohort(cohort, tmp_path / "cohort"), Path(shutil.copytree(dataset, tmp_path / "out"))
    for bold in bold_files(tmp_path / "cohort"):
        make_unreadable(bold)
    before = times(out)
    assert make_shards(source, "--out", out, "--ranker", "ridge") == DONE
    assert times(out) == before


def members(folder: Path) -> dict[str, bytes]:
    """The Zarr member of every session."""
    dataset, found = Dataset(folder), {}
    for line in dataset.sessions:
        content = (folder / layout.SHARDS / line.shard).read_bytes()
        found[line.key] = content[line.zarr_offset : line.zarr_offset + line.zarr_size]
    return found


def test_a_new_subject_alone_is_read_and_moves_nobody(cohort, dataset, make_shards, tmp_path):
    source, out = copy_cohort(cohort, tmp_path / "cohort", 5), tmp_path / "out"
    assert make_shards(source, "--out", out, "--ranker", "ridge") == DONE
    before = read_table(out)
    for bold in bold_files(tmp_path / "cohort"):
        make_unreadable(bold)
    shutil.copytree(cohort / "sub-06", tmp_path / "cohort" / "sub-06")
    assert make_shards(source, "--out", out, "--ranker", "ridge") == DONE
    after = read_table(out)
    assert len(before) == 5 and len(after) == 6 and before.items() <= after.items()
    assert {s.person: s.split for s in Dataset(out).sessions} == after
    assert members(out) == members(dataset)
    # somebody who leaves and comes back is in the same split again
    shutil.rmtree(tmp_path / "cohort" / "sub-06")
    assert make_shards(source, "--out", out, "--ranker", "ridge") == DONE
    assert len(Dataset(out).sessions) == 5 and read_table(out) == after


def test_shards_are_closed_at_their_size(tmp_path):
    pack_into(tmp_path, 5)
    manifest = layout.read_manifest(tmp_path)
    assert [(s["name"], s["samples"]) for s in manifest["shards"]] == [
        ("train-000000.tar", 2),
        ("train-000001.tar", 2),
        ("val-000000.tar", 1),
    ]


def test_everything_a_sample_depends_on_changes_its_fingerprint(cohort, tmp_path):
    source = copy_cohort(cohort, tmp_path / "cohort", 1)
    (run,) = find_runs(source)
    seen = {fingerprint(run)}
    assert fingerprint(find_runs(source)[0]) in seen

    def changed() -> bool:
        now = fingerprint(find_runs(source)[0])
        new = now not in seen
        seen.add(now)
        return new

    assert run.mask and run.confounds
    for path in (run.bold, run.mask, run.confounds, run.bold.with_name(run.bold.name.replace(".nii.gz", ".json"))):
        path.write_bytes(path.read_bytes() + b" ")
        assert changed(), path
    table = tmp_path / "cohort" / "participants.tsv"
    table.write_text(table.read_text().replace("\tA\t", "\tC\t").replace("\tB\t", "\tC\t"))
    assert changed()
    source.write_text(source.read_text() + "tr: 0.75\n")
    assert changed()


def test_the_trained_ranker_end_to_end(cohort, make_shards, tmp_path, capsys):
    """Mutual masked reconstruction: the extractor is trained once, kept beside the dataset, and named by it."""
    source, out = copy_cohort(cohort, tmp_path / "cohort", 4), tmp_path / "out"
    steps = "extractor.steps=3"
    (out / layout.EXTRACTOR).mkdir(parents=True)  # what a call leaves that is killed while it saves the extractor
    (out / layout.WORK).mkdir()
    (out / layout.EXTRACTOR / "extractor.safetensors").write_bytes(b"half")
    assert make_shards(source, "--out", out, steps, "windows.keep=5") == DONE
    dataset = Dataset(out)
    ranker = make_ranker("mutual", out / layout.EXTRACTOR)
    assert dataset.manifest.ranker == ranker.identity() and dataset.manifest.ranker["extractor"]
    for session in dataset.sessions:
        arrays = dataset.read(session, ("roi", "roi_centre", "scores", "saliency", "start"))
        scores = ranker.scores(arrays["roi"], arrays["roi_centre"], 5)
        np.testing.assert_allclose(arrays["scores"], scores, rtol=1e-5)
        best = np.sort(arrays["scores"])[::-1][:5]
        np.testing.assert_array_equal(arrays["saliency"], best)
        np.testing.assert_array_equal(arrays["scores"][arrays["start"] // 5], best)
        assert len(arrays["scores"]) == 12

    given = tmp_path / "given"
    assert make_shards(source, "--out", given, steps, "windows.keep=5", "--extractor", out / layout.EXTRACTOR) == DONE
    assert [path.read_bytes() for path in sorted((given / "shards").iterdir())] == [
        path.read_bytes() for path in sorted((out / "shards").iterdir())
    ]
    assert make_shards(source, "--out", given, "--ranker", "ridge", "--extractor", out / layout.EXTRACTOR) == WRONG
    assert "--extractor" in capsys.readouterr().err.splitlines()[-1]


def test_all_windows_are_kept_in_the_order_of_their_saliency(cohort, make_shards, tmp_path, capsys):
    """The first of them are what a dataset of fewer windows holds, and `most_salient` reads them alone."""
    source, every, few = copy_cohort(cohort, tmp_path / "cohort", 3), tmp_path / "all", tmp_path / "few"
    assert make_shards(source, "--out", every, "--ranker", "ridge", "windows.keep=all") == DONE
    assert make_shards(source, "--out", few, "--ranker", "ridge", "windows.keep=5") == DONE
    whole, small = Dataset(every), Dataset(few)
    assert whole.manifest.windows.keep == "all" and "all of each scan are kept" in repr(whole)
    assert all(session.n_kept == session.n_windows == 12 for session in whole.sessions)
    five = whole.most_salient(5)
    assert [session.n_kept for session in five.sessions] == [5] * len(whole) and five[five.sessions[0].key].n_kept == 5
    assert whole.sessions[0].n_kept == 12
    for session, other in zip(five.sessions, small.sessions, strict=True):
        for read in ({}, {"windows": range(5)}):
            arrays, expected = five.read(session, **read), small.read(other, **read)
            for name in ("start", "windows"):
                np.testing.assert_array_equal(arrays[name], expected[name])
    for ours, theirs in zip(connectomes(five, five.sessions), connectomes(small, small.sessions), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert not np.array_equal(connectomes(five, five.sessions)[1], connectomes(whole, whole.sessions)[1])
    with pytest.raises(ConfigError, match="1 or more windows"):
        whole.most_salient(0)
    capsys.readouterr()
    assert make_shards(source, "--out", tmp_path / "none", "--ranker", "ridge", "windows.keep=0") == WRONG
    assert make_shards(source, "--out", tmp_path / "none", "--ranker", "ridge", "windows.keep=most") == WRONG
    assert "windows.keep" in capsys.readouterr().err


def test_a_dataset_of_an_earlier_version_of_the_ranker_is_continued_with_it(cohort, make_shards, tmp_path, capsys):
    """Its configuration and its manifest do not name a version, as those of version 0.1."""
    source, old, new = copy_cohort(cohort, tmp_path / "cohort", 4), tmp_path / "old", tmp_path / "new"
    ridge = ("--ranker", "ridge")
    assert make_shards(source, "--out", old, *ridge, "--ranker-version", 1) == DONE
    before = Dataset(old).manifest
    assert before.configuration["ranking"] == {"name": "ridge", "extractor": None} and "version" not in before.ranker
    kept = times(old)
    assert make_shards(source, "--out", old, *ridge) == DONE and times(old) == kept
    shutil.rmtree(old / layout.WORK)  # a dataset that was copied without it
    assert make_shards(source, "--out", old, *ridge) == DONE and Dataset(old).manifest == before

    assert make_shards(source, "--out", new, *ridge) == DONE
    after = Dataset(new).manifest
    assert after.configuration["ranking"] == {"name": "ridge", "extractor": None, "version": 2}
    assert after.ranker["version"] == 2
    for name, version in ((old, 1), (new, 2)):
        dataset = Dataset(name)
        arrays = dataset.read(dataset.sessions[0], ("roi", "roi_centre", "scores"))
        scores = make_ranker("ridge", version=version).scores(arrays["roi"], arrays["roi_centre"], 5)
        np.testing.assert_allclose(arrays["scores"], scores, rtol=1e-5)

    assert make_shards(source, "--out", old, *ridge, "--ranker-version", 2) == WRONG
    assert "configuration.ranking.version: got 2" in capsys.readouterr().err.splitlines()[-1]
    assert make_shards(source, "--out", new, *ridge, "--ranker-version", 1) == WRONG
    assert "ranking.version: got None, expected 2" in capsys.readouterr().err.splitlines()[-1]
    assert make_shards(source, "--out", new, *ridge, "--ranker-version", 3) == WRONG
    assert "--ranker-version: got 3, expected 1 or 2, the versions of ridge" in capsys.readouterr().err.splitlines()[-1]


def atlas(path: Path, shift: int = 0) -> Path:
    """A label image on a lattice of its own: slabs of 32 mm from left to right, numbered 10, 20, ..."""
    slab = 10 * (1 + (np.arange(48) + shift) // 8).astype(np.int16)
    affine = nib.affines.from_matvec(np.diag([4.0, 4.0, 4.0]), [-95, -111, -89])
    return save(path, np.broadcast_to(slab[:, None, None], (48, 48, 48)), affine)


def test_parcels_of_a_label_image_end_to_end(cohort, make_shards, tmp_path, capsys):
    """They are means over the image's parcels in the brain, and its content is part of the configuration."""
    source, out, image = copy_cohort(cohort, tmp_path / "cohort", 3), tmp_path / "out", atlas(tmp_path / "a.nii.gz")
    assert make_shards(source, "--out", out, "--ranker", "ridge", f"parcels.image={image}") == DONE
    dataset = Dataset(out)
    stated = dataset.manifest.configuration["settings"]["parcels"]["image"]
    assert stated == {"name": "a.nii.gz", "sha256": hashlib.sha256(image.read_bytes()).hexdigest()}
    grid = dataset.grid
    slab_X = (grid.affine[0, 3] + grid.mm * np.arange(16) + 95) / 4  # voxels of the image
    for run, session in zip(find_runs(source), dataset.sessions, strict=True):
        arrays = dataset.read(session, ("roi", "roi_number", "roi_centre"))
        result = harmonise(run, SETTINGS.grid)
        label_N = 10 * (1 + np.rint(slab_X[np.argwhere(result.brain_XYZ)[:, 0]]).astype(int) // 8)
        assert session.n_parcels == len(arrays["roi"]) >= 4
        assert set(arrays["roi_number"]) <= set(label_N) <= {10, 20, 30, 40, 50, 60}
        for number, roi_T in zip(arrays["roi_number"], arrays["roi"], strict=True):
            np.testing.assert_allclose(roi_T, result.raw_TN[:, label_N == number].mean(axis=1), rtol=1e-5)

    moved = tmp_path / "elsewhere" / "a.nii.gz"
    moved.parent.mkdir()
    shutil.copy(image, moved)
    before = times(out)
    assert make_shards(source, "--out", out, "--ranker", "ridge", f"parcels.image={moved}") == DONE
    assert times(out) == before
    atlas(moved, shift=1)
    assert make_shards(source, "--out", out, "--ranker", "ridge", f"parcels.image={moved}") == WRONG
    assert "configuration" in capsys.readouterr().err.splitlines()[-1]
    assert make_shards(source, "--out", out, "--ranker", "ridge") == WRONG  # cubes
    assert make_shards(source, "--out", tmp_path / "no", "--ranker", "ridge", "parcels.image=none.nii.gz") == WRONG
    last = capsys.readouterr().err.splitlines()[-1]
    assert "parcels.image: got 'none.nii.gz', expected an existing file, a NIfTI label image" in last


def test_a_native_run_has_no_parcels_of_a_label_image(cohort, make_shards, tmp_path):
    pattern = "sub-{subject}/ses-{session}/func/sub-{subject}_ses-{session}_task-{task}_space-*_bold.nii.gz"
    native = renamed(cohort, tmp_path / "native.yaml", layout="pattern", pattern=pattern, space="native")
    image = atlas(tmp_path / "a.nii.gz")
    words = (native, "--ranker", "ridge", f"parcels.image={image}")
    assert make_shards(*words, "--out", tmp_path / "none", "--dry-run") == REFUSED
    assert make_shards(*words, "--out", tmp_path / "out") == REFUSED
    failed = layout.read_lines(tmp_path / "out" / layout.FAILED)
    assert len(failed) == 6
    for line in failed:
        assert "space: got native, expected MNI space, as for the parcels of a.nii.gz" in line["reason"]
        assert line["source"] in line["reason"] and "cubes need no registration" in line["hint"]


def test_a_run_whose_place_is_not_known_has_none_either(tmp_path):
    data = np.random.default_rng(0).random((8, 8, 8, 60)).astype(np.float32)
    run = run_source(save(tmp_path / "b.nii", data, np.eye(4), codes=0), None)
    survey(run, SETTINGS)
    parcels = ParcelSettings(image=atlas(tmp_path / "a.nii.gz"))
    with pytest.raises(RunRefused, match=r"b\.nii: space: got a header without position, expected MNI space"):
        survey(run, SETTINGS.model_copy(update={"parcels": parcels}))


def test_windows_are_those_of_the_harmonised_run(cohort, dataset):
    """Frame for frame where `start` says, within a thousandth of each voxel's SD."""
    ours = Dataset(dataset)
    for run, session in zip(find_runs(cohort / "cohort.yaml"), ours.sessions, strict=True):
        arrays = ours.read(session)
        result = harmonise(run, SETTINGS.grid)
        zscored_TN = (result.raw_TN - result.raw_TN.mean(dtype=float)) / result.raw_TN.std(dtype=float)
        squares, brain = 0.0, arrays["brain"].astype(bool)
        slots = np.argsort(voxel_slots(result.brain_XYZ, arrays["patch"], 4))
        for start, window in zip(arrays["start"], arrays["windows"].astype(float), strict=True):
            stored = (arrays["baseline"] + window)[:, brain]
            squares += (stored - zscored_TN[start : start + 5][:, slots]) ** 2
        error = np.sqrt(squares.sum(axis=0) / (5 * len(arrays["start"])))
        assert (error <= 1.01e-3 * arrays["spread"][brain]).all()


def test_framewise_displacement_travels_with_the_sample(cohort, dataset):
    opened = Dataset(dataset)
    for session in opened.sessions[:3]:
        (table,) = cohort.rglob(Path(session.source).name.split("_space")[0] + "*confounds_timeseries.tsv")
        moved_T = pd.read_csv(table, sep="\t")["framewise_displacement"].to_numpy(np.float32)
        found_T = opened.read(session, ("displacement", "roi"))["displacement"]
        assert np.isnan(found_T[0]) and len(found_T) == session.frames
        np.testing.assert_array_equal(found_T, moved_T)
        assert session.mean_fd_mm == pytest.approx(np.nanmean(moved_T), abs=1e-4)


def test_a_run_that_is_no_longer_found_is_left_out_and_said(cohort, dataset, make_shards, tmp_path, capsys):
    """What vanished from the cohort does not vanish from the dataset without a word."""
    shutil.copytree(dataset, tmp_path / "out")
    fewer = copy_cohort(cohort, tmp_path / "cohort", subjects=5)
    assert make_shards(fewer, "--out", tmp_path / "out", "--ranker", "ridge") == DONE
    said = capsys.readouterr().out
    gone = next(line.key for line in Dataset(dataset).sessions if line.subject == "06")
    assert f"left out: {gone} is no longer found" in said
    assert gone not in {line.key for line in Dataset(tmp_path / "out").sessions}
