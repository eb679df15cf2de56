"""How jobs and processes ended, as they noted it in JSON."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.commands import ROOT
from launchers import job
from launchers.cluster.is_done import is_done
from shards.core.cli import CRASHED
from shards.core.errors import Stopped


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"status":0}', True),  # however the JSON is spaced
        ('{"facts": {}, "status": 0}\n', True),
        ('{"status": 3}', False),
        ('{"status": 3, "facts": {"status": 0}}', False),
        ('{"status": false}', False),
        ("[0]", False),
        ("", False),
    ],
)
def test_a_job_is_done_where_its_outcome_says_so(text: str, expected: bool, tmp_path: Path) -> None:
    outcome = tmp_path / "outcome.json"
    assert not is_done(outcome)
    outcome.write_text(text)
    assert is_done(outcome) is expected


def test_a_script_is_told_by_the_exit_status(tmp_path: Path) -> None:
    outcome = tmp_path / "0.json"
    command = [sys.executable, "-m", "launchers.cluster.is_done", str(outcome)]
    assert subprocess.run(command, cwd=ROOT).returncode == 1
    outcome.write_text('{"status": 0}')
    assert subprocess.run(command, cwd=ROOT).returncode == 0


@pytest.mark.parametrize("then", ["", "make room"])
def test_what_to_do_next_is_said_once(then: str, tmp_path: Path) -> None:
    """By the process that stopped, or else by the launcher, whatever the words."""
    told = {"status": CRASHED, "stopped": str(Stopped("the same command failed", then)), "then": then, "ended": 1.0}
    (tmp_path / "0.json").write_text(json.dumps(told))
    with pytest.raises(Stopped) as stop:
        job.judge(tmp_path, 1)
    added = then or "the same command continues from the last complete checkpoint"
    assert str(stop.value) == f"process 0: the same command failed; {added}"


def test_a_stop_keeps_what_it_says_on_its_way_from_another_process() -> None:
    stop = pickle.loads(pickle.dumps(Stopped("no space left", "make room")))
    assert (str(stop), stop.why, stop.then) == ("no space left; make room", "no space left", "make room")
