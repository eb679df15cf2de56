"""What the jobs of a conversion do, one after another on this machine; on a real SLURM see tests/slurm."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from helpers.conversions import bold_files, conversion, copy_cohort, make_unreadable, same
from launchers.cluster import conversion_task
from launchers.cluster.scheduler import last_error
from shards.core import cli
from shards.core.cli import DONE, REFUSED, RESUME, WRONG
from shards.core.errors import DatasetError

CALL = ["python", "launchers/slurm.py", "shards", "cohort.yaml"]
JOBS = {"rank": "7", "rank again": "8", "pack": "9"}


def submit(source: Path, out: Path, tasks: int) -> list[list[str]]:
    """As the command does, but for the submission."""
    with conversion([source], out) as made:
        made.open()
        made.find()
        made.begin()
        parts = conversion_task.hand_on(made, tasks)
    (out / conversion_task.PLACE / conversion_task.JOB).write_text(json.dumps({"jobs": JOBS, "command": CALL}))
    return parts


@pytest.fixture
def job(monkeypatch: pytest.MonkeyPatch, make_shards):
    """A job in this process, with what it writes; the page is not drawn."""

    def call(*words: object) -> int:
        monkeypatch.setattr(sys, "argv", ["part", *map(str, words)])
        monkeypatch.setattr(cli, "_caller", None)
        monkeypatch.setenv("SLURM_JOB_ID", "7")
        return conversion_task.main()

    return call


def test_tasks_in_any_order_and_a_pack_write_what_one_process_writes(cohort, dataset, job, tmp_path):
    out = tmp_path / "out"
    parts = submit(cohort / "cohort.yaml", out, 4)
    assert [len(keys) for keys in parts] == [2, 2, 1, 1] and conversion_task.tasks_of(out) == parts
    assert not list(out.rglob("*.pickle"))
    assert [job("rank", out, task) for task in (2, 0, 3)] == [DONE] * 3
    assert conversion_task.counts(out) == {"runs": 6, "ranked": 4, "refused": 0, "harmonised": 0, "left": 2}
    (out / conversion_task.PLACE / "rank-7_1.log").write_text("error: first\n")
    (out / conversion_task.PLACE / "rank-8_1.log").write_text("error: node2: killed\nand more\n")
    assert job("pack", out) == RESUME
    ended = conversion_task.outcome(out, "pack")
    expected = f"task 1, 2 of its 2 scans remain: node2: killed (see {out}/work/slurm/rank-8_1.log)"
    assert ended.failed == [expected] and ended.error.startswith("2 of 6 scans remain")
    assert job("rank", out, 1) == DONE
    assert job("pack", out) == DONE
    ended = conversion_task.outcome(out, "pack")
    assert ended.next.endswith(f"python tools/pretrain.py CONFIG.yaml data={out}")  # as the jobs were submitted
    same(out, dataset)
    assert submit(cohort / "cohort.yaml", out, 4) == [] and conversion_task.outcome(out, "pack") is None


def test_refused_runs_are_no_failures_and_changed_ones_are(cohort, job, tmp_path):
    source, out = copy_cohort(cohort, tmp_path / "cohort", 3), tmp_path / "out"
    make_unreadable(bold_files(tmp_path / "cohort")[0])
    submit(source, out, 1)
    assert job("rank", out, 0) == DONE
    assert conversion_task.counts(out) == {"runs": 3, "ranked": 2, "refused": 1, "harmonised": 0, "left": 0}
    bold = bold_files(tmp_path / "cohort")[1]
    bold.write_bytes(bold.read_bytes() + b" ")
    assert job("pack", out) == RESUME
    assert conversion_task.outcome(out, "pack").failed == [
        "synthetic_sub-02_ses-1_task-rest changed during the conversion"
    ]
    submit(source, out, 1)
    assert job("rank", out, 0) == DONE and job("pack", out) == REFUSED


def test_the_processes_of_a_conversion_hold_it_together_and_others_stay_out(cohort, job, tmp_path, monkeypatch):
    source, out = cohort / "cohort.yaml", tmp_path / "out"
    submit(source, out, 1)
    with conversion([source], out) as one, conversion([source], out) as two, conversion([source], out) as stranger:
        one.lock.acquire("job 7 of a cluster", shared=True)
        two.lock.acquire("job 7 of a cluster", shared=True)
        with pytest.raises(DatasetError, match="a folder that job 7 of a cluster is writing to"):
            stranger.open()
        one.close()
        with pytest.raises(DatasetError, match="one conversion at a time"):
            stranger.open()
        two.close()
        stranger.open()
        with pytest.raises(DatasetError, match="one conversion at a time"):
            one.lock.acquire(shared=True)
        monkeypatch.setattr(conversion_task, "_PATIENCE", 0)
        assert job("rank", out, 0) == WRONG
        assert "one conversion at a time" in conversion_task.outcome(out, "0").error


def test_a_defect_is_an_outcome_too(job, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert job("rank", tmp_path, 0) == WRONG
    assert "conversion.json: got no such file" in conversion_task.outcome(tmp_path, "0").error
    monkeypatch.setattr(conversion_task, "work", lambda *_: 1 / 0)
    assert job("rank", tmp_path, 0) == 70
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("error: internal error: ZeroDivisionError: ") and said.endswith(")")
    assert conversion_task.outcome(tmp_path, "0").error in said
    assert "Traceback" in Path(said.rpartition("the traceback is in ")[2][:-1]).read_text()


def test_the_last_error_of_a_log_is_found_after_any_label():
    limit = "slurmstepd: error: *** JOB 7 ON node1 CANCELLED AT 2026-11-25T22:00:00 DUE TO TIME LIMIT ***"
    assert last_error(["error: first", "0: error: of a process", "more"]) == "of a process"
    assert "DUE TO TIME LIMIT" in last_error(["error: first", limit])
