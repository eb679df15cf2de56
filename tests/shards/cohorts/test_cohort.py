"""Finding runs: BIDS derivatives and file patterns on small folder trees, and one line for each invalid entry."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from shards.cohorts.cohort_file import find_runs, pattern_regex
from shards.cohorts.scan import RunSource
from shards.core.errors import ConfigError

pytestmark = pytest.mark.fast

SPACE = "space-MNI152NLin2009cAsym"


def nifti(path: Path, frames: int = 3) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nib.Nifti1Image(np.zeros((2, 2, 2, frames) if frames > 1 else (2, 2, 2), np.uint8), np.eye(4))
    nib.save(image, path)
    return path


def cohort_file(folder: Path, **settings) -> Path:
    path = folder / "cohort.yaml"
    path.write_text(yaml.safe_dump({"name": "lab", "root": "data", **settings}))
    (folder / "data").mkdir(exist_ok=True)
    return path


def pattern_file(folder: Path, pattern: str, files: list[str], **settings) -> Path:
    for name in files:
        nifti(folder / "data" / name)
    return cohort_file(folder, layout="pattern", pattern=pattern, **settings)


def fields(runs: list[RunSource]) -> list[tuple[str, str, str, str]]:
    return [(run.subject, run.session, run.task, run.run) for run in runs]


def bids(folder: Path, stem: str, mask: bool = True, confounds: bool = True, space: str = SPACE) -> Path:
    parts = stem.split("_")
    place = folder / "data" / "/".join(part for part in parts if part[:4] in ("sub-", "ses-")) / "func"
    space = f"_{space}" if space else ""
    bold = nifti(place / f"{stem}{space}_desc-preproc_bold.nii.gz")
    bold.with_name(f"{stem}{space}_desc-preproc_bold.json").write_text(json.dumps({"RepetitionTime": 2.0}))
    nifti(place / f"{stem}{space}_boldref.nii.gz", 1)
    if mask:
        nifti(place / f"{stem}{space}_desc-brain_mask.nii.gz", 1)
    if confounds:
        (place / f"{stem}_desc-confounds_timeseries.tsv").write_text("framewise_displacement\n0.1\n")
    return bold


def test_bids_derivatives_as_fmriprep_writes_them(tmp_path):
    first = bids(tmp_path, "sub-01_ses-a_task-rest_run-1")
    bids(tmp_path, "sub-01_ses-b_task-rest_run-1", mask=False, confounds=False)
    bids(tmp_path, "sub-02_ses-a_task-nback", space=SPACE)
    bids(tmp_path, "sub-02_ses-a_task-nback", space="space-T1w")  # another space of the same run
    nifti(tmp_path / "data/sub-02/ses-a/anat/sub-02_ses-a_desc-preproc_T1w.nii.gz", 1)
    nifti(tmp_path / f"data/sub-02/ses-a/func/sub-02_ses-a_task-nback_{SPACE}_desc-smooth_bold.nii.gz")
    runs = find_runs(cohort_file(tmp_path))
    assert fields(runs) == [("01", "a", "rest", "1"), ("01", "b", "rest", "1"), ("02", "a", "nback", "")]
    assert [run.key for run in runs] == [
        "lab_sub-01_ses-a_task-rest_run-1",
        "lab_sub-01_ses-b_task-rest_run-1",
        "lab_sub-02_ses-a_task-nback",
    ]
    assert runs[0].bold == first and runs[0].source == first.relative_to(tmp_path / "data").as_posix()
    assert runs[0].mask == first.with_name(first.name.replace("preproc_bold", "brain_mask"))
    assert runs[0].confounds == first.with_name("sub-01_ses-a_task-rest_run-1_desc-confounds_timeseries.tsv")
    assert runs[1].mask is None and runs[1].confounds is None
    native = find_runs(cohort_file(tmp_path, space="native"))
    assert fields(native) == [("02", "a", "nback", "")] and "space-T1w" in native[0].source


def test_bids_without_sessions_and_mixed(tmp_path):
    bids(tmp_path, "sub-01_task-rest")
    assert fields(find_runs(cohort_file(tmp_path))) == [("01", "", "rest", "")]
    bids(tmp_path, "sub-02_ses-1_task-rest")
    assert fields(find_runs(cohort_file(tmp_path))) == [("01", "", "rest", ""), ("02", "1", "rest", "")]


def test_bids_filters_keep_entities(tmp_path):
    for task in ("rest", "nback", "restoring"):
        bids(tmp_path, f"sub-01_task-{task}_dir-AP")
        bids(tmp_path, f"sub-01_task-{task}_dir-PA")
    runs = find_runs(cohort_file(tmp_path))
    assert len(runs) == 6 and runs[0].key == "lab_sub-01_task-nback_dir-AP" and not any(run.problem for run in runs)
    runs = find_runs(cohort_file(tmp_path, filters={"task": "rest", "dir": "PA"}))
    assert len(runs) == 1 and "task-rest_dir-PA" in runs[0].source
    with pytest.raises(ConfigError, match=r"no scan under.*filters"):
        find_runs(cohort_file(tmp_path, filters={"task": "motor"}))


def test_a_subject_that_is_a_whole_folder_may_hold_underscores(tmp_path):
    """ADNI: 002_S_0295."""
    source = pattern_file(
        tmp_path,
        "{subject}/{session}/*_bold.nii.gz",
        ["002_S_0295/2012-05-10/x_bold.nii.gz", "002_S_0413/2006-11-14/y_bold.nii.gz"],
    )
    assert fields(find_runs(source)) == [("002_S_0295", "2012-05-10", "", ""), ("002_S_0413", "2006-11-14", "", "")]
    assert find_runs(source)[0].key == "lab_sub-002_S_0295_ses-2012-05-10"


def test_a_subject_inside_names_ends_at_underscore_and_dot(tmp_path):
    source = pattern_file(
        tmp_path,
        "sub-{subject}_task-{task}_run-{run}_bold.nii.gz",
        [
            "sub-a-1_task-rest_run-02_bold.nii.gz",
            "sub-a_b_task-rest_run-02_bold.nii.gz",
            "sub-c_task-rest_run-1_desc_bold.nii.gz",
        ],
    )
    assert fields(find_runs(source)) == [("a-1", "", "rest", "02")]


def test_a_field_that_occurs_again_must_agree(tmp_path):
    """HCP: the subject's folder, and the run twice in the path."""
    good = "100307/MNINonLinear/Results/rfMRI_REST1_LR/rfMRI_REST1_LR.nii.gz"
    source = pattern_file(
        tmp_path,
        "{subject}/MNINonLinear/Results/rfMRI_{task}_{run}/rfMRI_{task}_{run}.nii.gz",
        [good, "100307/MNINonLinear/Results/rfMRI_REST2_LR/rfMRI_REST1_LR.nii.gz"],
    )
    runs = find_runs(source)
    assert fields(runs) == [("100307", "", "REST1", "LR")] and runs[0].source == good


def test_globs_reach_any_depth(tmp_path):
    source = pattern_file(
        tmp_path,
        "**/{subject}_func_?.nii*",
        ["a/b/s1_func_1.nii.gz", "s2_func_1.nii", "a/s3_func_10.nii.gz", "a/s4.nii.gz"],
    )
    assert fields(find_runs(source)) == [("s1", "", "", ""), ("s2", "", "", "")]


@given(subject=st.text("ab1-", min_size=1, max_size=5), run=st.text("12", min_size=1, max_size=2))
def test_a_pattern_gives_back_what_it_was_filled_with(subject, run):
    pattern = "sub-{subject}/x+y (1)/sub-{subject}_run-{run}_b.nii.gz"  # characters a regular expression would mind
    match = pattern_regex(pattern).match(pattern.format(subject=subject, run=run))
    assert match and match.groupdict() == {"subject": subject, "run": run}
    assert not pattern_regex(pattern).match(pattern.format(subject=subject, run=run) + "x")
    assert not pattern_regex("{subject}.nii").match("a/b.nii") and not pattern_regex("{subject}.nii").match("aXnii")


def test_masks_by_pattern_as_one_file_and_beside_the_cohort_file(tmp_path):
    files = ["s1_bold.nii.gz", "s2_bold.nii.gz"]
    for name in ("s1_mask.nii.gz", "deep/s2_mask.nii.gz", "group.nii.gz"):
        nifti(tmp_path / "data" / name, 1)
    nifti(tmp_path / "beside.nii.gz", 1)

    def masks(mask: str | None) -> list[Path | None]:
        return [run.mask for run in find_runs(pattern_file(tmp_path, "{subject}_bold.nii.gz", files, mask=mask))]

    root = tmp_path / "data"
    assert masks(None) == [None, None]
    assert masks("**/{subject}_mask.nii.gz") == [root / "s1_mask.nii.gz", root / "deep/s2_mask.nii.gz"]
    assert masks("group.nii.gz") == [root / "group.nii.gz"] * 2
    assert masks("beside.nii.gz") == [tmp_path / "beside.nii.gz"] * 2
    assert masks(str(root / "group.nii.gz")) == [root / "group.nii.gz"] * 2
    # one that is promised and missing: the run is refused by name when its turn comes, the others go on
    assert masks("{subject}_mask.nii.gz") == [root / "s1_mask.nii.gz", root / "s2_mask.nii.gz"]
    assert not (root / "s2_mask.nii.gz").exists()
    with pytest.raises(ConfigError, match=r"2 files for .*one file per scan"):
        masks("**/*_mask.nii.gz")
    for wrong in ("{session}_mask.nii.gz", "{}_mask.nii.gz", "{subject.x}_mask.nii.gz", "{subject"):
        with pytest.raises(ConfigError, match=r"mask: got .*expected a path with the fields subject"):
            masks(wrong)


@pytest.mark.parametrize(
    ("table", "wanted"),
    [
        ("participant_id\tage\tgroup\nsub-0050002\t30\tA\nsub-s2\tn/a\tB\n", {"age": 30, "group": "A"}),
        ("site,SUB_ID,age,group\nx,0050002,30,A\nx,s2,,B\n", {"site": "x", "age": 30, "group": "A"}),
        ("participant_id\n0050002\ns2\n", {}),
        ("\ufeffparticipant_id\tage\n0050002\t30\ns2\tn/a\n", {"age": 30}),
    ],
)
def test_labels_travel_with_the_subject(tmp_path, table, wanted):
    source = pattern_file(
        tmp_path, "{subject}.nii.gz", ["0050002.nii.gz", "s2.nii.gz", "s3.nii.gz"], participants="people.tsv"
    )
    (tmp_path / "people.tsv").write_text(table)
    first, second, third = (run.labels for run in find_runs(source))
    assert first == wanted and third == {}
    assert second.get("age") is None
    json.dumps(first)  # plain Python values
    (tmp_path / "people.tsv").rename(tmp_path / "data" / "people.tsv")  # or under root
    assert find_runs(source)[0].labels == wanted


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("name\tage\ns1\t3\n", r"people\.tsv: header: got columns name, age, expected a column participant_id"),
        ("participant_id\tage\ns1\t3\ns1\t4\n", r"people\.tsv: participant_id: got two different rows for s1"),
        ("", r"people\.tsv: got an unreadable table"),
        (None, r"cohort\.yaml: participants: got people\.tsv, which is not a file"),
    ],
)
def test_a_participants_table_that_cannot_be_meant(tmp_path, table, message):
    source = pattern_file(tmp_path, "{subject}.nii.gz", ["s1.nii.gz"], participants="people.tsv")
    if table is not None:
        (tmp_path / "people.tsv").write_text(table)
    with pytest.raises(ConfigError, match=message):
        find_runs(source)


PATTERN = {"layout": "pattern", "pattern": "{subject}.nii.gz"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"maks": "m.nii"}, r"maks: got an unknown key, expected one of .*Did you mean mask\?"),
        ({"name": "my lab"}, r"name: got 'my lab'"),
        ({"name": None}, "name: got None"),
        ({"space": "Talairach"}, "space: got 'Talairach', expected 'MNI' or 'native'"),
        ({"tr": 0}, "tr: got 0, expected greater than 0.05"),
        ({"tr": "2 s"}, "tr: got '2 s', expected a valid number"),
        ({"layout": "dicom"}, "layout: got 'dicom', expected 'bids' or 'pattern'"),
        ({"layout": "pattern"}, r"pattern: got nothing, expected a pattern with \{subject\}"),
        ({"layout": "pattern", "pattern": "bold.nii"}, r"pattern: got bold.nii, expected a pattern with \{subject\}"),
        ({"pattern": "{subject}.nii"}, "pattern: got .*, expected none with layout: bids"),
        ({**PATTERN, "filters": {"task": "rest"}}, "filters: got task, expected none with layout: pattern"),
        ({"layout": "pattern", "pattern": "{subject}_{side}.nii"}, r"pattern: got \{side\}, expected only \{subject\}"),
        ({"layout": "pattern", "pattern": "/data/{subject}.nii"}, "pattern: got .*, expected a path relative to root"),
        ({"layout": "pattern", "pattern": "**a/{subject}.nii"}, "(pattern: got .*, expected a path relative)|no scan"),
        ({"root": "nowhere"}, "root: got .*nowhere, which is not a folder"),
        ({**PATTERN, "pattern": "x/{subject}.nii"}, "root: got no scan under .*files that match"),
        ({}, "root: got no scan under .*desc-preproc_bold"),
    ],
)
def test_a_cohort_file_that_cannot_be_meant_is_told_in_one_line(tmp_path, settings, message):
    source = cohort_file(tmp_path, **settings)
    with pytest.raises(ConfigError, match=message) as caught:
        find_runs(source)
    assert "\n" not in caught.value.line() and caught.value.line().startswith(f"{source}: ")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file"),
        ("- a\n- b\n", "a list at the top level"),
        ("a: [\n", "unreadable YAML"),
        ("", "name: got nothing, expected a value"),
        (b"\xff\xfe\x00", "unreadable YAML"),
    ],
)
def test_a_file_that_is_no_cohort_file(tmp_path, content, message):
    source = tmp_path / "cohort.yaml"
    if content is not None:
        source.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError, match=message) as caught:
        find_runs(source)
    assert str(source) in caught.value.line() and "\n" not in caught.value.line()


def test_two_files_of_one_key_are_refused(tmp_path):
    source = pattern_file(tmp_path, "*/{subject}.nii.gz", ["a/s1.nii.gz", "b/s1.nii.gz"])
    (run,) = find_runs(source)
    assert run.problem is not None
    assert "a/s1.nii.gz: key: got lab_sub-s1 for 2 files, also b/s1.nii.gz, expected one file" in run.problem.line()


def test_keys_have_no_dots_or_slashes(tmp_path):
    """WebDataset ends a sample's name at the first dot."""
    source = pattern_file(tmp_path, "{subject}/{session}/x.nii.gz", ["s.1/v 2/x.nii.gz"])
    assert find_runs(source)[0].key == "lab_sub-s-1_ses-v-2"


def test_leading_zeros_of_subjects_are_kept(tmp_path):
    """ABIDE: the files say 0050002, and a table of numbers must not say 50002."""
    source = pattern_file(tmp_path, "{subject}.nii.gz", ["0050002.nii.gz"], participants="people.csv")
    (tmp_path / "people.csv").write_text("SITE,SUB_ID,SEX\nPITT,0050002,1\nPITT,0050003,2\n")
    assert find_runs(source)[0].labels == {"SITE": "PITT", "SEX": 1}
