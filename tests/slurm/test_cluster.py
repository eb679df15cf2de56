"""The cluster that the other tests run on."""

from __future__ import annotations

import multiprocessing
import os
import pwd
import subprocess
import sys

import psutil
import pytest

from helpers.commands import ROOT
from slurm.cluster import NODES, Cluster


def test_two_nodes_run_a_job_together(cluster: Cluster) -> None:
    names = cluster.call("srun", "-N2", "printenv", "SLURMD_NODENAME").splitlines()
    assert sorted(names) == sorted(NODES)
    hosts = cluster.call("srun", "-N2", "hostname").splitlines()
    assert (sorted(hosts) == sorted(NODES)) == cluster.own_hosts


def test_a_node_that_is_killed_is_missed_and_comes_back(cluster: Cluster) -> None:
    cluster.stop_node("node2")
    cluster.wait(lambda: cluster.states()["node2"].startswith("down"), 90, "node down")
    assert cluster.states()["node1"] == "idle"
    cluster.clear()
    assert cluster.call("srun", "-w", "node2", "echo", "back") == "back"


def test_a_second_cluster_beside_it_leaves_nothing(cluster: Cluster) -> None:
    with Cluster() as second:
        assert second.states() == dict.fromkeys(NODES, "idle")
        second.call("sbatch", "--output=/dev/null", "--wrap", "sleep 1000")
        second.wait(lambda: "sleep" in _commands(second), 20, "job")
        prefix, commands = second.prefix, _commands(second)
        assert {"munged", "slurmctld", "slurmd"} <= commands
    assert not prefix.exists() and _commands(second) == set()
    assert cluster.call("srun", "true") == ""


def _commands(cluster: Cluster) -> set[str]:
    return {process.name() for process in cluster.processes() if process.status() != psutil.STATUS_ZOMBIE}


@pytest.mark.skipif(os.geteuid() != 0, reason="then all tests are run by one")
def test_an_ordinary_user_can_have_one(daemons: Cluster) -> None:
    child = multiprocessing.get_context("fork").Process(target=_as_nobody)
    child.start()
    child.join(60)
    assert child.exitcode == 0


def _as_nobody() -> None:
    nobody = pwd.getpwnam("nobody")
    os.chdir("/")
    os.setgroups([])
    os.setgid(nobody.pw_gid)
    os.setuid(nobody.pw_uid)
    with Cluster() as cluster:
        assert not cluster.own_hosts
        assert cluster.call("srun", "-N2", "id", "-un").splitlines() == ["nobody", "nobody"]


def test_it_can_be_brought_up_by_hand(daemons: Cluster) -> None:
    done = subprocess.run(
        [sys.executable, "tests/slurm/cluster.py"], cwd=ROOT, input="", capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("export SLURM_CONF=")
