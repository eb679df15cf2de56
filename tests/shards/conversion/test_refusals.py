"""What a conversion refuses: folders, cohorts and runs, each by name."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from helpers.conversions import SETTINGS, bold_files, contents, conversion, copy_cohort, renamed, same, times
from shards.conversion.splits import read_table, write_table
from shards.core import files
from shards.core.cli import DONE, REFUSED
from shards.core.errors import ConfigError, DatasetError
from shards.core.settings import digest
from shards.format import layout
from shards.format.reader import Dataset
from slim.ranking.rankers import make_ranker


def test_splits_that_were_written_down_are_kept_whatever_is_found(opened, tmp_path):
    source, _ = opened
    shutil.copytree(opened[1], tmp_path / "out")
    upside_down = dict.fromkeys(read_table(tmp_path / "out"), "test")
    write_table(tmp_path / "out", upside_down)
    with conversion([source], tmp_path / "out") as again:
        again.open()
        again.find()
        assert again.splits == upside_down
        (tmp_path / "out" / layout.SPLITS_TABLE).write_text("people\tsubject\tsplit\nlab\t01\tthird\n")
        with pytest.raises(DatasetError, match=r"splits\.tsv"):
            again.find()


def test_two_configurations_in_one_folder_are_refused(opened, tmp_path):
    source, out = opened
    before = contents(out)
    with conversion([source], out) as same_again:
        same_again.open()
    other = SETTINGS.windows.model_copy(update={"keep": 16})
    with conversion([source], out, windows=other) as wrong, pytest.raises(DatasetError, match="configuration"):
        wrong.open()
    with conversion([source], tmp_path / "half") as half:  # before anything is packed as well
        half.open()
        assert not (tmp_path / "half").exists()  # a call that is wrong in its cohorts leaves nothing behind
        half.begin()
    with (
        conversion([source], tmp_path / "half", windows=other) as wrong,
        pytest.raises(DatasetError, match="configuration"),
    ):
        wrong.open()
    assert contents(out) == before


def test_another_extractor_in_one_folder_is_refused(opened):
    """Say the folder of the extractor was lost and another was trained: scores would not be comparable."""
    source, out = opened
    with conversion([source], out) as again:
        again.open()
        again.find()
        with pytest.raises(DatasetError, match="extractor"):
            again.pack({**make_ranker("ridge").identity(), "extractor": "another"})


def test_a_dataset_is_not_made_of_fewer_cohorts(opened, cohort, tmp_path):
    _, out = opened
    other = renamed(cohort, tmp_path / "other.yaml", name="other")
    with conversion([other], out) as again:
        again.open()
        with pytest.raises(DatasetError, match="synthetic"):
            again.find()


def test_the_same_cohort_twice_is_refused(opened, tmp_path):
    source, _ = opened
    with conversion([source, source], tmp_path / "out") as twice, pytest.raises(ConfigError, match="a second time"):
        twice.find()


def test_a_file_that_two_cohorts_claim_is_refused_the_second_time(opened, cohort, tmp_path):
    other = renamed(cohort, tmp_path / "other.yaml", name="zother", people="synthetic")
    with conversion([opened[0], other], tmp_path / "out") as both:
        runs = both.find()
        problems = [run.problem.line() for run in runs if run.problem]
    assert len(runs) == 12 and len(problems) == 6
    assert "the same file as synthetic_sub-01_ses-1_task-rest" in problems[0]


def test_cohorts_of_the_same_people_share_their_splits(opened, cohort, tmp_path):
    copy = Path(shutil.copytree(cohort, tmp_path / "copy"))
    shared = renamed(copy, tmp_path / "shared.yaml", name="again", people="synthetic")
    with conversion([opened[0], shared], tmp_path / "out") as both:
        runs = both.find()
        assert len(runs) == 12 and len(both.splits) == 6 and not any(run.problem for run in runs)


@pytest.mark.parametrize("content", ["a file", "a folder with other files", "a path below a file"])
def test_a_folder_that_is_no_dataset_is_left_alone(opened, tmp_path, content):
    out = tmp_path / "out"
    if content == "a folder with other files":
        out.mkdir()
        (out / "thesis.tex").write_text("precious")
    else:
        out.write_text("precious")
    if content == "a path below a file":
        out = out / "below"
    with conversion([opened[0]], out) as wrong, pytest.raises(DatasetError, match="--out"):
        wrong.open()
        wrong.begin()


def test_a_stratum_is_divided_like_the_whole(opened, tmp_path):
    source, _ = opened
    settings = SETTINGS.split.model_copy(update={"stratify": "group"})
    with conversion([source], tmp_path / "out", split=settings) as found:
        found.find()
        assert set(found.splits) == {("synthetic", f"0{number}") for number in range(1, 7)}
    settings = SETTINGS.split.model_copy(update={"stratify": "age"})
    with (
        conversion([source], tmp_path / "out", split=settings) as wrong,
        pytest.raises(ConfigError, match=r"split\.stratify"),
    ):
        wrong.find()


def test_broken_runs_are_refused_by_name_and_the_rest_goes_on(cohort, dataset, make_shards, tmp_path, capsys):
    source, out = copy_cohort(cohort, tmp_path / "cohort"), tmp_path / "out"
    first, second, *_ = bold_files(tmp_path / "cohort")
    intact = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in (first, second)}
    first.write_bytes(b"this is no image")
    second.write_bytes(intact[second][0][:-2000])
    words = [source, "--out", out, "--ranker", "ridge", "--json"]
    assert make_shards(*words) == REFUSED
    facts = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (facts["sessions"], facts["refused"]) == (4, 2)
    failed = layout.read_lines(out / layout.FAILED)
    for line, path, why in zip(failed, (first, second), ("a NIfTI image", "a complete file"), strict=True):
        assert line["source"] == path.relative_to(tmp_path / "cohort").as_posix() and why in line["reason"]
        assert line["source"] in line["reason"] and "\n" not in line["reason"] and line["key"] in line["key"]
    kept = {session.key for session in Dataset(out).sessions}
    assert len(kept) == 4 and not kept & {line["key"] for line in failed}

    before = times(out)
    assert make_shards(*words) == REFUSED  # told again, and nothing written anew
    assert "a NIfTI image" in capsys.readouterr().out
    after = times(out)
    assert {path: at for path, at in after.items() if f"/{layout.WORK}" not in path} == {
        path: at for path, at in before.items() if f"/{layout.WORK}" not in path
    }

    for path, (content, mtime) in intact.items():
        path.write_bytes(content)
        os.utime(path, ns=(mtime, mtime))
    assert make_shards(*words) == DONE  # mended
    same(out, dataset)


def test_a_run_that_is_too_short_is_refused(cohort, make_shards, tmp_path, capsys):
    source = copy_cohort(cohort, tmp_path / "cohort", 1)
    words = [source, "--out", tmp_path / "out", "windows.minimum=13", "--json"]
    assert make_shards(*words, "--ranker", "ridge", "--dry-run") == REFUSED
    facts = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert facts["will_be_refused"] == 1 and "12 windows of 5 frames" in facts["reasons"][0]
    for _ in range(2):  # with the trained ranker, which has nothing to be trained on, too
        assert make_shards(*words) == REFUSED
        out, err = capsys.readouterr()
        assert json.loads(out.splitlines()[-1]) == {"sessions": 0, "refused": 1}
        (line,) = layout.read_lines(tmp_path / "out" / layout.FAILED)
        for text in ("12 windows of 5 frames", "at least 13", "sub-01"):
            assert text in line["reason"] and text in out
    assert "harmonise" not in err  # not read again
    assert make_shards(*words, "--retry-refused") == REFUSED
    assert "harmonise: 1/1 runs" in capsys.readouterr().err


def test_dry_run_writes_nothing_and_lists_what_was_found(cohort, make_shards, tmp_path, capsys):
    before = times(cohort)
    assert make_shards(cohort / "cohort.yaml", "--out", tmp_path / "out", "--dry-run", "--json") == DONE
    lines = capsys.readouterr().out.splitlines()
    facts = json.loads(lines[-1])
    assert {name: facts[name] for name in ("runs", "subjects", "will_be_refused")} == {
        "runs": 6,
        "subjects": 6,
        "will_be_refused": 0,
    }
    assert facts["cohorts"]["synthetic"] == {
        "runs": 6,
        "subjects": 6,
        "sessions": 6,
        "splits": {"train": 4, "val": 1, "test": 1},
        "tr": {"0.72": 6},
        "voxel_mm": {"16 x 16 x 16": 6},
        "frames": [60, 60, 60],
        "masks": {"given": 6},
        "confounds": 6,
        "labels": {"group": 6, "score": 6},
        "passed_over": [],
        "notes": [],
    }
    assert (
        sum("sub-0" in line and "60 frames, TR 0.72 s (sidecar), 16 x 16 x 16 mm, mask given" in line for line in lines)
        == 6
    )
    assert not (tmp_path / "out").exists() and times(cohort) == before


def test_a_dataset_of_other_settings_names_the_setting(opened, tmp_path):
    source, dataset = opened
    out = Path(shutil.copytree(dataset, tmp_path / "out"))
    other = SETTINGS.mask.model_copy(update={"dead": 0.5})
    told = r"configuration\.mask\.dead: got 0\.5, expected 0\.25, as for the existing sessions"
    with conversion([source], out, mask=other) as wrong, pytest.raises(DatasetError, match=told):
        wrong.open()
    # as a version wrote it that had no such setting
    manifest = layout.read_manifest(out)
    del manifest["configuration"]["settings"]["mask"]["dead"]
    manifest["configuration_hash"] = digest(manifest["configuration"])
    files.write_atomically(out / layout.MANIFEST, files.dump(manifest))
    told = r"mask\.dead: got 0\.25, expected no such setting.*into another --out"
    with conversion([source], out) as later, pytest.raises(DatasetError, match=told):
        later.open()
