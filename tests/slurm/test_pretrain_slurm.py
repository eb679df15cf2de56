"""Pretraining over two nodes of a real SLURM: to its end, what it leaves, and every wrong call in one line."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from helpers.commands import Command
from helpers.training import losses, pretrain, weights
from slurm.cluster import Cluster
from slurm.jobs import attempts, paced, pretrain_words, slurm, submit, wait_for_end, wait_for_lines


def test_two_nodes_give_the_curve_of_two_local_processes(
    cluster: Cluster, command: Command, dataset: Path, tmp_path: Path
) -> None:
    local, out = tmp_path / "local", tmp_path / "run"
    done = pretrain(command, dataset, local, "zero.stage=2")
    assert done.returncode == 0, done.stderr
    words = pretrain_words(dataset, out, "zero.stage=2", "--nodes", 2, "--gpus-per-node", 1, "--follow", "--json")
    done = slurm(cluster, *words)
    assert done.returncode == 0, done.stderr
    assert losses(out) == pytest.approx(losses(local), rel=1e-6)
    assert "pretrain: 6/6 steps" in done.stderr
    facts = json.loads(done.stdout.splitlines()[-1])
    assert facts["status"] == 0 and facts["step"] == facts["steps"] == 6
    job = facts["job"]
    (began,) = attempts(out, "began")
    assert began["nodes"] == "node[1-2]" and began["processes"] == 2
    about = json.loads((out / "slurm" / "job.json").read_text())
    text = (out / "config.yaml").read_text()
    assert f"# commit {about['commit']}\n" in text and yaml.safe_load(text)["run"]["out"] == str(out)
    assert "#SBATCH --nodes=2" in (out / "slurm" / f"{job}_submission.sh").read_text()
    assert not list((out / "slurm").glob("outcome-*"))

    done = slurm(cluster, "status", out, "--json")
    facts = json.loads(done.stdout.splitlines()[-1])
    assert (facts["state"], facts["attempts"], facts["failures"], facts["last_end"]) == ("COMPLETED", 1, 0, "finished")


def test_a_dry_run_prints_the_script_and_leaves_nothing(cluster: Cluster, dataset: Path, tmp_path: Path) -> None:
    site = tmp_path / "site.yaml"
    site.write_text(
        "partition: short\ntime: '00:05:00'\nmodules: [cuda/12]\nsetup: ['export SITE=\"a b\"']\nmem: 2G\nsignal: 30\n"
        "srun: [--container-image=image.sqsh]\nsbatch: {mail-type: END}\n"
    )
    out = tmp_path / "run"
    flags = ("--nodes", "1-2", "--gpus-per-node", 2, "--slurm", site, "--time", "00:06:00", "--dry-run")
    done = slurm(cluster, *pretrain_words(dataset, out, *flags))
    assert done.returncode == 0, done.stderr
    for line in (
        "#SBATCH --nodes=1-2",
        "#SBATCH --cpus-per-task=4",
        "#SBATCH --gpus-per-node=2",
        "#SBATCH --partition=short",
        "#SBATCH --time=00:06:00",
        "#SBATCH --mem=2G",
        "#SBATCH --signal=USR2@30",
        "#SBATCH --mail-type=END",
        "module load cuda/12",
        'export SITE="a b"',
    ):
        assert line in done.stdout.splitlines(), line
    (chosen,) = [line for line in done.stdout.splitlines() if "--container-image=image.sqsh" in line]
    assert chosen.startswith("SRUN=(")
    calls = re.findall(r"\bsrun --(?:[^\n]*\\\n)*[^\n]*", done.stdout)
    assert len(calls) == 3 and all('"${SRUN[@]}"' in call for call in calls)
    last = done.stdout.splitlines()[-1]
    assert re.search(r"Job \d+ to start at .* in partition short", last)
    assert not out.exists()
    assert cluster.call("squeue", "-h") == ""


@pytest.mark.parametrize(
    ("words", "needles"),
    [
        (("--nodes", 2, "--gpus-per-node", 1, "--partition", "debgu"), ("debgu", "debug, high, short", "debug?")),
        (("--nodes", 2, "--gpus-per-node", 3), ("--gpus-per-node: got 3", "at most 2")),
        (("--nodes", 3, "--gpus-per-node", 1), ("--nodes: got 3", "at most 2")),
        (("--nodes", "2-1", "--gpus-per-node", 1), ("--nodes: got 2-1",)),
        (("--nodes", 2, "--gpus-per-node", 1, "--time", "soon"), ("time: got 'soon'", "12:00:00")),
        (("--nodes", 2, "--gpus-per-node", 1, "--time", "00:01:30"), ("signal", "less than time, 90 seconds")),
        (("--nodes", 2, "--gpus-per-node", 0), ("--gpus-per-node: got 0",)),
        (
            ("--nodes", 2, "--tasks-per-node", 1, "--partition", "short", "--time", "01:00:00"),
            ("--time: got", "10 min"),
        ),
        (("--nodes", 1, "--tasks-per-node", 1, "--mem", "1T"), ("sbatch: got",)),
        (("--nodes", 1, "--tasks-per-node", 1, "--mem", "much"), ("sbatch: got", "--mem")),
        (("--nodes", 1, "--tasks-per-node", 1, "--constraint", "h100"), ("sbatch: got", "feature")),
        (("--nodes", 1, "--tasks-per-node", 1, "run.batch=0"), ("run.batch",)),
        (("--nodes", 1), ("--gpus-per-node --tasks-per-node",)),
    ],
)
def test_a_wrong_call_is_one_line_and_submits_nothing(
    cluster: Cluster, dataset: Path, tmp_path: Path, words: tuple, needles: tuple[str, ...]
) -> None:
    done = slurm(cluster, *pretrain_words(dataset, tmp_path / "run", *words))
    assert done.returncode == 2, done.stdout + done.stderr
    (line,) = done.stderr.strip().splitlines()
    assert all(needle in line for needle in needles), line
    assert cluster.call("squeue", "-h") == "" and not (tmp_path / "run").exists()


def test_without_slurm_only_a_script_can_be_written(cluster: Cluster, dataset: Path, tmp_path: Path) -> None:
    words = pretrain_words(dataset, tmp_path / "run", "--nodes", 2, "--gpus-per-node", 1)
    nowhere = str(tmp_path / "bin")
    done = slurm(cluster, *words, PATH=nowhere)
    assert done.returncode == 2
    assert "no such command on this machine" in done.stderr and len(done.stderr.splitlines()) == 1
    done = slurm(cluster, *words, "--dry-run", PATH=nowhere)
    assert done.returncode == 0, done.stderr
    assert "#SBATCH --nodes=2" in done.stdout and "not tested on a cluster" in done.stderr


def test_what_only_a_node_can_tell_is_told_at_submission_if_one_is_free(
    cluster: Cluster, dataset: Path, tmp_path: Path
) -> None:
    """No Python there, a folder that one of them does not see."""
    out = cluster.hidden / "run" if cluster.own_hosts else tmp_path / "run"
    asked = ("--nodes", 2, "--tasks-per-node", 1)
    done = slurm(cluster, *pretrain_words(dataset, out, *asked, "--python", "/nowhere/python"))
    assert done.returncode == 2, done.stderr
    assert re.fullmatch(r"error: \w+: (/nowhere/python: got no such command|.*: got no such folder), .*\n", done.stderr)
    if cluster.own_hosts:
        done = slurm(cluster, *pretrain_words(dataset, out, *asked))
        assert done.returncode == 2, done.stderr
        assert done.stderr.startswith(f"error: node2: {out}: got no such folder") and done.stderr.count("\n") == 1
    assert not out.exists() and not list(out.parent.glob(".seen*"))


def test_what_only_a_node_can_tell_ends_the_job_with_one_line(cluster: Cluster, dataset: Path, tmp_path: Path) -> None:
    """Both nodes are busy at submission: told by the job's first lines, and not requeued."""
    out = cluster.hidden / "run" if cluster.own_hosts else tmp_path / "run"
    python = () if cluster.own_hosts else ("--python", "/nowhere/python")
    cluster.call("sbatch", "-N2", "--exclusive", "--output=/dev/null", "--wrap", "sleep 25")
    cluster.wait(lambda: set(cluster.states().values()) == {"allocated"}, 60, "busy nodes")
    done = slurm(cluster, *pretrain_words(dataset, out, "--nodes", 2, "--tasks-per-node", 1, "--follow", *python))
    assert done.returncode == 2, done.stderr
    if cluster.own_hosts:
        assert f"error: node2: {out}: got no such folder" in done.stderr and "error: node1" not in done.stderr
    facts = json.loads(slurm(cluster, "status", out, "--json").stdout.splitlines()[-1])
    assert facts["state"] == "FAILED" and "got no such" in facts["error"]
    assert cluster.call("squeue", "-h") == ""


def test_a_mistake_that_a_process_finds_is_not_tried_again(cluster: Cluster, dataset: Path, tmp_path: Path) -> None:
    words = pretrain_words(
        dataset, tmp_path / "run", "run.device=cuda", "--nodes", 2, "--tasks-per-node", 1, "--follow"
    )
    done = slurm(cluster, *words)
    assert done.returncode == 2, done.stderr
    assert "run.device: got cuda, but no GPU" in done.stderr and "Traceback" not in done.stderr
    (ended,) = attempts(tmp_path / "run", "ended")
    assert ended["status"] == 2 and not ended["again"]


def test_status_and_cancel(cluster: Cluster, dataset: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    done = slurm(cluster, "status", out)
    assert done.returncode == 2 and "job.json: got no such file" in done.stderr
    asked = ("--nodes", 2, "--tasks-per-node", 1)
    job = submit(cluster, dataset, out, *asked, steps=1000, **paced(tmp_path / "site", "0.5"))
    wait_for_lines(cluster, out, 2)
    done = slurm(cluster, "status", out, "--json")
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout.splitlines()[-1])
    assert facts["state"] == "RUNNING" and facts["step"] >= 2 and facts["steps"] == 1000
    done = slurm(cluster, *pretrain_words(dataset, out, *asked))
    assert done.returncode == 2 and f"a run with an unfinished job: {job}" in done.stderr
    done = slurm(cluster, "cancel", out, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["state"] == "CANCELLED"
    assert wait_for_end(cluster, job, 30) == "CANCELLED"
    cluster.wait(lambda: cluster.call("squeue", "-h") == "", 30, "empty queue")
    assert "CANCELLED" in slurm(cluster, "status", out).stdout
    assert weights(out)  # it saved when it was asked to end
