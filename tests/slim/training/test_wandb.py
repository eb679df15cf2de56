"""What wandb is told of a run: neither the machine's name nor the address of a repository."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from helpers.commands import ROOT

SCRIPT = """
import sys
from pathlib import Path
from slim.training.metrics import Monitor
monitor = Monitor(Path(sys.argv[1]), 0, "offline", {"lr": 0.1})
monitor.log({"step": 1, "loss": 2.0})
monitor.close()
"""
HOST, REMOTE = "host-of-a-hospital", "https://git.hospital.example/secret.git"


@pytest.mark.parametrize("asked", [False, True])
def test_wandb_gets_no_host_and_no_remote_unless_asked(tmp_path, asked):
    if subprocess.run(["unshare", "--uts", "true"], capture_output=True).returncode:
        pytest.skip("no right to give a process a host name of its own")
    for words in (("init", "-q", "."), ("remote", "add", "origin", REMOTE)):
        subprocess.run(["git", *words], cwd=tmp_path, check=True)
    run = tmp_path / "run"
    run.mkdir()
    (tmp_path / "train.py").write_text(SCRIPT)
    command = f'hostname {HOST} && exec "{sys.executable}" train.py "{run}"'
    env = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    env |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    env |= {"WANDB_HOST": HOST, "WANDB_DISABLE_GIT": "false"} if asked else {}
    done = subprocess.run(
        ["unshare", "--uts", "sh", "-c", command], cwd=tmp_path, env=env, capture_output=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    (record,) = run.rglob("*.wandb")
    content = record.read_bytes()
    assert b"loss" in content and (HOST.encode() in content) == asked
