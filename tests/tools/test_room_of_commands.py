"""A command whose results would find no room says so before its work, and leaves nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers.commands import ROOT
from helpers.pretrained import ALIGNED, tool, write_run
from shards.core import room
from shards.core.cli import RESUME


@pytest.fixture
def run(dataset: Path, tmp_path: Path) -> Path:
    return write_run(tmp_path / "run", dataset, ALIGNED)


@pytest.mark.parametrize("command", ["probe", "explain", "report"])
def test_no_room_is_told_before_the_work(
    command: str, run: Path, dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = tmp_task(run.parent)
    words = {
        "probe": ("probe.py", run, "--data", dataset, "--task", task),
        "explain": ("explain.py", run, "--data", dataset, "--task", task),
        "report": ("report.py", run),
    }[command]
    before = sorted(path for path in run.rglob("*"))
    monkeypatch.setattr(room, "has_room", lambda *_: False)
    done = tool(*words)
    assert done.returncode == RESUME and "Traceback" not in done.stderr
    assert done.stderr.count("\n") == 1 and "no space left" in done.stderr
    left = [path for path in run.rglob("*") if path not in before and path.is_file()]
    assert not left, left


def tmp_task(folder: Path) -> Path:
    """The shipped task of the score, for six subjects."""
    path = folder / "task.yaml"
    text = (ROOT / "configs/downstream/synthetic_score.yaml").read_text()
    path.write_text(text.replace("folds: 5", "folds: 6").replace("repeats: 3", "repeats: 1"))
    return path
