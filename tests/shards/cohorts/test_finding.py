"""Finding runs in folders as labs have them: odd names, links, filters, echoes; and who has a row in the table."""

from __future__ import annotations

import gzip
import os
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import yaml

from shards.cohorts.cohort_file import Cohort, find_cohort
from shards.conversion.session import SessionSettings, survey
from shards.core.errors import ConfigError, RunRefused

pytestmark = pytest.mark.fast

MNI = "_space-MNI152NLin6Asym"
ANNEX = "../../.git/annex/objects/0F/qk/MD5E-s1--0.nii.gz"
IMAGE = nib.Nifti1Image(np.zeros((2, 2, 2, 60), np.uint8), np.diag([80, 80, 80, 1]))
IMAGE.header.set_xyzt_units("mm", "sec")
IMAGE = IMAGE.to_bytes()


def touch(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(IMAGE, 1) if path.name.endswith(".gz") else IMAGE)
    return path


def bids(root: Path, sub: str, *names: str, ses: str = "") -> list[Path]:
    """Files of a subject, by what their names hold between the session and `_bold.nii.gz`."""
    folder = root / f"sub-{sub}" / (f"ses-{ses}" if ses else "") / "func"
    stem = f"sub-{sub}" + (f"_ses-{ses}" if ses else "")
    return [touch(folder / f"{stem}_{name}_bold.nii.gz") for name in names]


def find(folder: Path, root: Path | None = None, **settings) -> Cohort:
    path = folder / "cohort.yaml"
    path.write_text(yaml.safe_dump({"name": "lab", "root": str(root or folder / "d"), **settings}, allow_unicode=True))
    return find_cohort(path)


def pattern(folder: Path, text: str, **settings) -> Cohort:
    return find(folder, layout="pattern", pattern=text, **settings)


def names(cohort: Cohort) -> list[str]:
    return [run.key.removeprefix("lab_sub-") for run in cohort.runs]


def told(cohort: Cohort) -> str:
    return " | ".join(cohort.notes)


REST = f"task-rest{MNI}_desc-preproc"


def test_labels_with_hyphens_are_different_people(tmp_path):
    for number in (1, 2, 3):
        bids(tmp_path / "d", f"A-0{number}", f"task-rest-eyes-open{MNI}_desc-preproc", ses="pre-op")
    runs = find(tmp_path).runs
    assert [(run.subject, run.session, run.task) for run in runs] == [
        (f"A-0{number}", "pre-op", "rest-eyes-open") for number in (1, 2, 3)
    ]


def test_brackets_and_other_marks_in_folders_are_text(tmp_path):
    root = tmp_path / "study [2024] {a} (b)"
    bids(root, "01", REST)
    assert names(find(tmp_path, root)) == ["01_task-rest"]
    for subject in ("S01[rescan]", "S02", "S03 *"):
        touch(tmp_path / "d" / subject / "bold.nii.gz")
        (tmp_path / "d" / subject / "conf_1.tsv").write_text("x\n")
        touch(tmp_path / "d" / subject / "mask [a].nii.gz")
    runs = pattern(
        tmp_path, "{subject}/bold.nii.gz", confounds="{subject}/conf_*.tsv", mask="{subject}/mask [a].nii.gz"
    ).runs
    assert [run.subject for run in runs] == ["S01[rescan]", "S02", "S03 *"]
    for run in runs:
        assert run.confounds == run.bold.with_name("conf_1.tsv") and run.mask == run.bold.with_name("mask [a].nii.gz")


def test_hidden_files_and_unfinished_downloads_are_left_out(tmp_path):
    func = bids(tmp_path / "d", "01", REST)[0].parent
    (func / f"._sub-01_{REST}_bold.nii.gz").write_bytes(b"\x00\x05\x16\x07Mac OS X")
    touch(func / f"sub-01_task-other{MNI}_desc-preproc_bold.nii.gz.part")
    (tmp_path / "d" / ".git" / "sub-02" / "func").mkdir(parents=True)
    assert names(find(tmp_path)) == ["01_task-rest"]
    found = pattern(tmp_path, "**/*{subject}_task-*_bold.nii*")
    assert len(found.runs) == 1 and not found.passed_over and "unfinished downloads are left out" in told(found)


def test_links_are_followed_and_loops_are_not(tmp_path):
    for subject in ("S1", "S2"):
        touch((tmp_path / "d" if subject == "S1" else tmp_path / "store") / subject / "func" / f"{subject}_bold.nii.gz")
    (tmp_path / "d" / "S2").symlink_to("../store/S2")
    (tmp_path / "d" / "S1" / "up").symlink_to("..")
    (tmp_path / "d" / "S1" / "self").symlink_to("self")
    for text in ("**/{subject}_bold.nii.gz", "*/func/{subject}_bold.nii.gz", "**/func/{subject}_bold.nii.gz"):
        assert names(pattern(tmp_path, text)) == ["S1", "S2"], text
    bids(tmp_path / "store", "03", REST)
    (tmp_path / "d" / "sub-03").symlink_to("../store/sub-03")
    assert names(find(tmp_path)) == ["03_task-rest"]


def test_content_that_was_not_fetched_refuses_its_run_and_names_the_file(tmp_path):
    bold, other, third, fourth = (bids(tmp_path / "d", f"0{n}", REST)[0] for n in range(1, 5))
    bold.unlink()
    bold.symlink_to(ANNEX)
    other.with_name(other.name.replace("preproc_bold", "brain_mask")).symlink_to(ANNEX)
    third.with_name("sub-03_task-rest_desc-confounds_timeseries.tsv").symlink_to(ANNEX)
    fourth.with_name(fourth.name.replace("nii.gz", "json")).symlink_to(ANNEX)
    runs = find(tmp_path).runs
    assert len(runs) == 4
    for run, name in zip(runs, (bold.name, "brain_mask", "confounds_timeseries.tsv", "bold.json"), strict=True):
        with pytest.raises(RunRefused, match=rf"{name}.*datalad get") as caught:
            survey(run, SessionSettings())
        assert "not on this machine" in caught.value.line()


def test_names_that_no_file_system_or_table_takes(tmp_path):
    root = tmp_path / "d"
    touch(root / ("S" * 110) / ("visit" + "x" * 120) / "bold.nii.gz")
    touch(root / ("S" * 110) / ("visit" + "x" * 119 + "y") / "bold.nii.gz")
    touch(root / "S2" / "v1" / "bold.nii.gz")
    latin = os.fsencode(root) + b"/M\xfcller/v1"
    os.makedirs(latin)
    shutil.copy(root / "S2/v1/bold.nii.gz", latin + b"/bold.nii.gz")
    touch(root / "a\nb" / "v1" / "bold.nii.gz")
    runs = pattern(tmp_path, "{subject}/{session}/bold.nii.gz").runs
    assert len(runs) == len({run.key for run in runs}) == 5
    assert all(len(f".{run.key}.zarr.zip.1234567.tmp".encode()) < 256 for run in runs)
    refused = {run.subject: run.problem.line() for run in runs if run.problem}
    assert sorted(refused) == ["M\\xfcller", "a\\nb"]
    for line in refused.values():
        assert "Rename the file or its folder" in line and "\n" not in line
        line.encode("utf-8")


def test_one_image_packed_and_unpacked_has_a_hint_that_helps(tmp_path):
    packed = bids(tmp_path / "d", "01", REST)[0]
    packed.with_suffix("").write_bytes(IMAGE)
    (run,) = find(tmp_path).runs
    assert run.problem is not None and "delete one of the two" in run.problem.line()
    (run,) = find(tmp_path, filters={"extension": ".nii.gz"}).runs
    assert run.problem is None and run.bold == packed


def test_both_files_of_a_pair_are_one_run(tmp_path):
    nib.save(nib.Nifti1Pair(np.zeros((2, 2, 2, 5), np.uint8), np.eye(4)), touch(tmp_path / "d" / "S1_bold.img"))
    (run,) = pattern(tmp_path, "{subject}_bold.*").runs
    assert run.problem is None and run.bold.name == "S1_bold.img"


@pytest.mark.parametrize(
    ("filters", "kept"),
    [
        ({"ses": 1}, ["01_ses-01", "02_ses-1"]),  # YAML reads `ses: 01` as the number
        ({"ses": "01"}, ["01_ses-01"]),
        ({"session": "ses-01"}, ["01_ses-01"]),
        ({"session": [1, "2*"]}, ["01_ses-01", "01_ses-2b", "02_ses-1"]),
        ({"ses": "?"}, ["02_ses-1", "02_ses-3"]),
        ({"resolution": 2}, ["02_ses-3"]),
        ({"res": ""}, ["01_ses-01", "01_ses-2b", "02_ses-1"]),
        ({"res": None, "subject": "02"}, ["02_ses-1"]),
        ({"desc": "denoised"}, ["03_ses-1"]),
        ({"description": ["denoised", "smoothAROMAnonaggr"]}, ["03_ses-1", "03_ses-2"]),
    ],
)
def test_filters_by_number_name_list_and_glob(tmp_path, filters, kept):
    root = tmp_path / "d"
    for sub, ses, res in (("01", "01", ""), ("01", "2b", ""), ("02", "1", ""), ("02", "3", "_res-2")):
        bids(root, sub, f"task-rest{MNI}{res}_desc-preproc", ses=ses)
    bids(root, "03", f"task-rest{MNI}_desc-denoised", ses="1")
    bids(root, "03", f"task-rest{MNI}_desc-smoothAROMAnonaggr", ses="2")
    assert [name.removesuffix("_task-rest") for name in names(find(tmp_path, filters=filters))] == kept


def test_derivatives_of_other_packages_have_their_masks(tmp_path):
    (bold,) = bids(tmp_path / "d", "01", f"task-rest{MNI}_res-2_desc-denoised")
    mask = touch(bold.with_name(f"sub-01_task-rest{MNI}_res-2_desc-brain_mask.nii.gz"))
    table = bold.with_name("sub-01_task-rest_desc-confounds_timeseries.tsv")
    table.write_text("x\n")
    (run,) = find(tmp_path, filters={"desc": "denoised"}).runs
    assert (run.mask, run.confounds) == (mask, table)


def test_echoes_beside_their_combination_are_no_scans(tmp_path):
    root = tmp_path / "d"
    bids(root, "01", *(f"task-rest{echo}_desc-preproc" for echo in ("", "_echo-1", "_echo-2", "_echo-3")))
    bids(root, "02", *(f"task-rest_echo-{echo}_desc-preproc" for echo in (1, 2)))
    bids(root, "03", "task-rest_part-mag_desc-preproc", "task-rest_part-phase_desc-preproc")
    found = find(tmp_path, space="native")
    assert names(found) == ["01_task-rest", "02_task-rest_echo-1", "03_task-rest"]
    assert "3 single echoes" in told(found) and [run.problem is not None for run in found.runs] == [False, True, False]
    assert "2 echoes of one scan without a combined image" in found.runs[1].problem.line()
    chosen = find(tmp_path, space="native", filters={"echo": 2})
    assert names(chosen) == ["01_task-rest_echo-2", "02_task-rest_echo-2"] and not any(r.problem for r in chosen.runs)


def test_bidsignore_and_subjects_without_a_run_are_told(tmp_path):
    root = tmp_path / "d"
    for sub in ("01", "02", "03"):
        bids(root, sub, REST)
    bids(root, "04", "task-rest_space-T1w_desc-preproc")
    (root / "sub-05").mkdir()
    (root / ".bidsignore").write_text("# pilots\nsub-03/\n**/*task-pilot*\n")
    found = find(tmp_path)
    assert names(found) == ["01_task-rest", "02_task-rest"]
    assert "1 images are left out by .bidsignore" in told(found)
    assert "no scan in MNI space that matches the filters, for 3 subjects (spaces found: T1w (1)): 03, 04, 05" in told(
        found
    )


@pytest.mark.parametrize(
    ("make", "settings", "message"),
    [
        (lambda d: bids(d / "derivatives" / "fmriprep", "01", REST), {}, r"give that folder as `root`"),
        (
            lambda d: [bids(d, "01", "task-rest"), bids(d / "derivatives" / "fmriprep", "01", REST)],
            {},
            r"derivatives/fmriprep: give that folder as `root`",
        ),
        (lambda d: bids(d, "01", "task-rest"), {"space": "native"}, r"found: none \(1\)\).*look like raw data"),
        (lambda d: bids(d, "01", "task-rest_space-T1w_desc-preproc"), {}, r"found: T1w \(1\)\).*Set `space: native`"),
        (lambda d: bids(d, "01", f"task-rest{MNI}_desc-denoised"), {}, r"found: denoised \(1\)\).*filters: \{desc: "),
        (lambda d: bids(d, "01", REST), {"filters": {"task": "nback"}}, r"found: rest \(1\)\), expected task: nback"),
        (lambda d: bids(d, "01", REST), {"filters": {"run": 1}}, r"found: none \(1\)\), expected run: 1"),
        (lambda d: bids(d, "01", REST), {"filters": {"runn": 1}}, r"filters: got .*expected BIDS entities such as sub"),
        (lambda d: touch(d / "x.nii.gz"), {}, r"Give the folder that contains the folders sub-\*"),
    ],
)
def test_nothing_found_says_what_there_is_instead(tmp_path, make, settings, message):
    (tmp_path / "d").mkdir()
    make(tmp_path / "d")
    with pytest.raises(ConfigError, match=message) as caught:
        find(tmp_path, **settings)
    assert "\n" not in caught.value.line()


def people(folder: Path, table: str, scans: list[tuple[str, str]]) -> Cohort:
    for sub, ses in scans:
        touch(folder / "d" / sub / (ses or "0") / "b.nii.gz")
    (folder / "p.tsv").write_text(table)
    return pattern(folder, "{subject}/{session}/b.nii.gz", participants="p.tsv")


def ages(cohort: Cohort) -> dict[str, object]:
    return {f"{run.subject}/{run.session}": run.labels.get("age") for run in cohort.runs}


def test_ids_that_lost_or_gained_zeros_are_matched_where_one_candidate_exists(tmp_path):
    table = "participant_id\tage\nsub-1\t20\nsub-0050002\t30\n7.0\t40\nsub-008\t50\n08\t60\nx9\t70\n"
    scans = [(sub, "1") for sub in ("01", "1", "50002", "007", "8", "x09", "10")]
    found = people(tmp_path, table, scans)
    assert ages(found) == {
        "01/1": None,  # sub-1 is somebody else
        "1/1": 20,
        "50002/1": 30,
        "007/1": 40,
        "8/1": None,  # two rows could be meant
        "x09/1": None,
        "10/1": None,
    }
    assert "no row in p.tsv, so no labels, for 4 subjects: 01, 10, 8, x09" in told(found)
    assert "by number, because no name is equal: 007 for 7.0, 50002 for 0050002" in told(found)
    assert "rows of p.tsv without a scan: 3 subjects (008, 08, x9)" in told(found)


def test_sessions_are_matched_by_name_then_by_number_and_never_by_chance(tmp_path):
    table = "participant_id\tsession_id\tage\na\tses-01\t20\na\tses-02\t21\nb\t\t30\nc\t1\t40\n"
    found = people(tmp_path, table, [("a", "1"), ("a", "02"), ("a", "3"), ("b", "5"), ("c", "1")])
    assert ages(found) == {"a/02": 21, "a/1": 20, "a/3": None, "b/5": 30, "c/1": 40}
    assert "no row in p.tsv for the session, so no labels, for 1 scans: a 3" in told(found)


def test_text_of_a_table_is_only_text(tmp_path):
    """Labels go through JSON lines: no character of theirs ends a line there."""
    from shards.core import files
    from shards.format import layout

    note = "fell\u2028asleep\u0085at\x0b the end"
    found = people(tmp_path, f"participant_id\tnote\tsite\na\t{note}\tNone\n", [("a", "1")])
    assert found.runs[0].labels == {"note": note, "site": "None"}
    (tmp_path / "lines.jsonl").write_text(files.dump_lines([found.runs[0].labels] * 2), encoding="utf-8")
    assert layout.read_lines(tmp_path / "lines.jsonl") == [found.runs[0].labels] * 2


TABLE = "participant_id\tage\tSurname\tdate_of_birth\tzipCode\temail\tsite_name\tbirth_order\tDOB\tmailing\n"


def test_personal_columns_stay_behind_and_labels_are_chosen(tmp_path):
    touch(tmp_path / "d" / "a" / "b.nii.gz")
    (tmp_path / "p.tsv").write_text(TABLE + "a\t20\tDoe\t2000-01-01\t12345\ta@b.c\tX\t2\t1.1.2000\t1\n")

    def labels(**settings) -> tuple[dict, str]:
        found = pattern(tmp_path, "{subject}/b.nii.gz", participants="p.tsv", **settings)
        return found.runs[0].labels, told(found)

    default, words = labels()
    assert default == {"age": 20, "site_name": "X", "birth_order": 2, "mailing": 1}
    expected = "look like personal data are left out: Surname, date_of_birth, zipCode, email, DOB; list them in"
    assert expected in words
    assert labels(labels=["age", "birth_*"]) == ({"age": 20, "birth_order": 2}, "")
    assert labels(labels=[]) == ({}, "")
    with pytest.raises(ConfigError, match=r"p\.tsv: header: got no column sex among age, Surname"):
        labels(labels=["sex"])
    labels(labels=["age"])  # a split needs more
    needed = find_cohort(tmp_path / "cohort.yaml", needed={"DOB", "elsewhere"})
    assert needed.runs[0].labels == {"age": 20, "DOB": "1.1.2000"}
