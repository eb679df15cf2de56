"""A job that is interrupted comes back by itself, with the curve of one that was not. On a real SLURM."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import psutil
import pytest
import yaml

from helpers.commands import Command
from helpers.training import losses, metrics, pretrain
from slurm.cluster import CPUS, Cluster
from slurm.jobs import attempts, log_of, paced, slurm, submit, wait_for_end, wait_for_lines

STEPS = 60
TWO = ("--nodes", 2, "--gpus-per-node", 1)


@pytest.fixture(scope="module")
def whole(daemons: Cluster, command: Command, dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """Losses of a run of two local processes that nothing interrupts."""
    out = tmp_path_factory.mktemp("whole") / "run"
    done = pretrain(command, dataset, out, steps=STEPS)
    assert done.returncode == 0, done.stderr
    return losses(out)


def check_curve(out: Path, whole: list[float], alike: int = STEPS) -> None:
    """Every step once, with the losses of the other run: to rounding for so many steps, near them after that."""
    assert [line["step"] for line in metrics(out)] == list(range(1, STEPS + 1))
    assert losses(out)[:alike] == pytest.approx(whole[:alike], rel=1e-6)
    assert losses(out) == pytest.approx(whole, rel=2e-4)


def test_it_is_requeued_before_each_time_limit(
    cluster: Cluster, dataset: Path, whole: list[float], tmp_path: Path
) -> None:
    """SLURM's own signal, before a limit of two minutes, at least twice: it comes 40 to 100 s after the start."""
    out, site = tmp_path / "run", tmp_path / "site.yaml"
    site.write_text("time: '00:02:00'\nsignal: 20\n")
    environment = paced(tmp_path / "site", "3 3 0")  # at 2 s a calm machine needs two attempts only
    job = submit(cluster, dataset, out, *TWO, "--slurm", site, steps=STEPS, **environment)
    assert wait_for_end(cluster, job, 480) == "COMPLETED", log_of(out, job)
    ended = attempts(out, "ended")
    assert len(ended) >= 3 and ended[-1]["why"] == "finished"
    assert all("stopped by a signal" in line["why"] and line["again"] for line in ended[:-1])
    assert [line["restart"] for line in ended] == list(range(len(ended)))
    check_curve(out, whole)


def test_it_makes_way_for_a_higher_partition_and_comes_back(
    cluster: Cluster, dataset: Path, whole: list[float], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    job = submit(cluster, dataset, out, *TWO, steps=STEPS, **paced(tmp_path / "site", "1 0"))
    wait_for_lines(cluster, out, 2)
    cluster.call("srun", "-p", "high", "-N2", f"--ntasks-per-node={CPUS}", "true", timeout=120)
    assert wait_for_end(cluster, job) == "COMPLETED", log_of(out, job)
    first, last = attempts(out, "ended")
    assert "stopped by a signal" in first["why"] and first["checkpoint"] and last["why"] == "finished"
    check_curve(out, whole)


def test_a_killed_process_leads_to_another_attempt(
    cluster: Cluster, dataset: Path, whole: list[float], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    environment = paced(tmp_path / "site", "0.5 0")
    job = submit(cluster, dataset, out, *TWO, "run.checkpoint_every=8", steps=STEPS, **environment)
    wait_for_lines(cluster, out, 9)
    victim = next(process for process in tasks(out) if process.environ()["SLURM_PROCID"] == "1")
    victim.send_signal(signal.SIGKILL)
    assert wait_for_end(cluster, job) == "COMPLETED", log_of(out, job)
    first, last = attempts(out, "ended")
    assert first["failed"] and first["again"] and first["checkpoint"] >= "step-00000008"
    assert last["why"] == "finished"
    check_curve(out, whole)
    facts = json.loads(slurm(cluster, "status", out, "--json").stdout.splitlines()[-1])
    assert facts["attempts"] == 2 and facts["failures"] == 1 and facts["step"] == STEPS


def test_a_fault_that_returns_ends_the_job_with_a_word(cluster: Cluster, dataset: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    environment = paced(tmp_path / "site", "kill")
    job = submit(cluster, dataset, out, *TWO, "--max-failures", 2, **environment)
    assert wait_for_end(cluster, job) == "FAILED"
    first, last = attempts(out, "ended")
    assert first["again"] and not last["again"] and "failure 2 of 2" in last["why"]
    facts = json.loads(slurm(cluster, "status", out, "--json").stdout.splitlines()[-1])
    assert "failure 2 of 2" in facts["error"] and facts["failures"] == 2


def test_when_a_node_is_set_down_the_other_one_finishes_alone(
    cluster: Cluster, dataset: Path, whole: list[float], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    words = ("--nodes", "1-2", "--gpus-per-node", 1, "--max-failures", 9, "run.checkpoint_every=8")
    job = submit(cluster, dataset, out, *words, steps=STEPS, **paced(tmp_path / "site", "0.5 0"))
    wait_for_lines(cluster, out, 9)
    cluster.call("scontrol", "update", "NodeName=node2", "State=DOWN", "Reason=test")
    cluster.stop_node("node2")
    assert wait_for_end(cluster, job) == "COMPLETED", log_of(out, job)
    first, *_, last = attempts(out, "began")
    assert (first["nodes"], first["processes"], last["nodes"], last["processes"]) == ("node[1-2]", 2, "node1", 1)
    assert first["checkpoint"] is None and last["checkpoint"] >= "step-00000008"
    run = yaml.safe_load((out / "config.yaml").read_text())["run"]
    assert (run["batch"], run["accumulate"], run["processes"]) == (2, 2, 1)
    # Another number of processes adds in another order, and training magnifies rounding: 2e-5 at the end.
    check_curve(out, whole, alike=16)


def tasks(out: Path) -> list[psutil.Process]:
    """Processes of a run that are still there, on either node."""
    wanted = ["launchers.cluster.attempt", "task", str(out)]
    found = [p for p in psutil.process_iter(["cmdline"]) if (p.info["cmdline"] or [])[-3:] == wanted]
    return [process for process in found if os.path.basename(process.info["cmdline"][0]).startswith("python")]
