"""Fine-tuning on a real SLURM: a job for each division, the numbers of this machine, tested by the usual command."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from helpers.commands import Command
from helpers.finetuning import finetune, lines, people, pretrained, whole, write_task
from slurm.cluster import Cluster
from slurm.jobs import slurm

__all__ = ["people", "pretrained", "whole"]  # fixtures


def test_jobs_train_what_the_command_then_tests(
    cluster: Cluster, command: Command, pretrained: Path, people: Path, whole: tuple[Path, dict], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    tool, run, *words = finetune(pretrained, people, out)
    words = [word for word in words if word != "run.processes=2"]
    submission = ["finetune", run, *words, "--nodes", 2, "--tasks-per-node", 1]
    done = slurm(cluster, *submission, "--dry-run")
    assert done.returncode == 0 and "#SBATCH --nodes=2" in done.stdout, done.stderr
    assert not out.exists()

    done = slurm(cluster, *submission, "--follow")
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout.splitlines()[-1])
    assert facts["status"] == [0, 0] and len(set(facts["job"])) == 2
    assert "next: python tools/finetune.py" in done.stdout
    for number in range(2):
        for mine, theirs in zip(lines(out, number), lines(whole[0], number), strict=True):
            assert mine == pytest.approx(theirs, rel=1e-6)
    done = slurm(cluster, "status", facts["run"][0], "--json")
    assert json.loads(done.stdout.splitlines()[-1])["state"] == "COMPLETED" and "tools/finetune.py" in done.stdout

    done = command(tool, run, *words)
    assert done.returncode == 0, done.stderr
    mine, theirs = (json.loads((folder / "report.json").read_text())["tasks"]["s"] for folder in (out, whole[0]))
    assert mine["finetuned"]["r"]["value"] == pytest.approx(theirs["finetuned"]["r"]["value"], rel=1e-6)


def test_a_wrong_call_is_one_line_and_leaves_nothing(
    cluster: Cluster, pretrained: Path, people: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    for changes, flags, needle in (
        ({}, ("--nodes", 3, "--tasks-per-node", 1), "--nodes: got 3"),
        ({}, ("--nodes", 1, "--tasks-per-node", 1, "model.embed=8"), "model"),
        ({"split": {"kind": "folds", "folds": 3}}, ("--nodes", 1, "--tasks-per-node", 1), "split.kind: got folds"),
    ):
        task = write_task(tmp_path, **changes)
        words = ("finetune", pretrained, "--data", people, "--task", task, "--out", out, *flags)
        done = slurm(cluster, *words)
        assert done.returncode == 2 and needle in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert not out.exists() and cluster.call("squeue", "-h") == ""
