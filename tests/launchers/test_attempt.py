"""An attempt of a job whose dataset is away for a moment, in this process: it comes back, and is no mistake."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest

from helpers.pretrained import ALIGNED, write_run
from launchers.cluster import attempt
from shards.core.cli import DONE, RESUME, WRONG, status_of
from slim.checkpoints.checkpoint import tag


@pytest.fixture
def run(dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    data = shutil.copytree(dataset, tmp_path / "data")
    run = write_run(tmp_path / "run", data, ALIGNED)
    shutil.rmtree(run / "checkpoints" / tag(7))
    (run / "slurm").mkdir()
    for name, value in {"WORLD_SIZE": "1", "SLURM_JOB_ID": "12", "SLURM_JOB_NODELIST": "n1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("OUTCOME", str(run / "slurm" / "outcome-12-0"))
    return run


def call(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    monkeypatch.setattr(sys, "argv", ["attempt", *map(str, words)])
    return status_of(attempt.main)


def test_a_dataset_that_is_away_when_a_job_begins_ends_an_attempt_not_the_job(run, monkeypatch, capsys) -> None:
    data = run.parent / "data"
    data.rename(run.parent / "away")
    config = (run / "config.yaml").read_bytes()
    assert call(monkeypatch, "begin", run) == RESUME
    said = capsys.readouterr().err
    assert f"stopped: the dataset {data} cannot be reached (No such file or directory)" in said
    assert len(said.splitlines()) == 1 and (run / "config.yaml").read_bytes() == config
    assert call(monkeypatch, "end", run, 3) == DONE  # the script reads what is printed
    assert capsys.readouterr().out == f"{attempt.AGAIN}\n"
    assert call(monkeypatch, "begin", run) == RESUME and call(monkeypatch, "end", run, 2) == DONE
    assert capsys.readouterr().out == f"{RESUME}\n"  # the second time in a row, of two
    (run.parent / "away").rename(data)
    assert call(monkeypatch, "begin", run) == DONE
    assert [line.event for line in attempt.attempts(run)] == ["ended", "ended", "began"]


def test_a_dataset_that_is_another_one_is_a_mistake(run, monkeypatch, capsys) -> None:
    (run.parent / "data" / "manifest.json").write_text(json.dumps({"format": 1}))
    assert call(monkeypatch, "begin", run) == WRONG
    assert capsys.readouterr().err.startswith("error: ")
