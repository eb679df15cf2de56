"""What a run writes down about itself: the commit of this software, and who was seen in training."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from launchers.local import git_commit


def git(folder: Path, *words: str) -> str:
    who = ("-c", "user.name=somebody", "-c", "user.email=somebody@example.org")
    done = subprocess.run(["git", "-C", str(folder), *who, *words], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def repository(folder: Path, *tracked: str) -> str:
    """A repository with one commit of these files: its name."""
    for name in tracked:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("first")
    git(folder, "init", "-q")
    git(folder, "add", *tracked)
    git(folder, "commit", "-q", "-m", "first")
    return git(folder, "rev-parse", "HEAD")


def test_the_commit_is_that_of_this_software(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not of the repository of a study that it happens to be installed in, nor of one that the environment names."""
    commit = repository(tmp_path / "slim-brain", "launchers/local.py", "slim/probe.py")
    source = tmp_path / "slim-brain/launchers/local.py"
    assert git_commit(source) == commit
    (tmp_path / "slim-brain/note.txt").write_text("of no commit")
    assert git_commit(source) == commit
    (tmp_path / "slim-brain/slim/probe.py").write_text("changed")
    assert git_commit(source) == f"{commit}+"

    repository(tmp_path / "study", "paper.tex")
    installed = tmp_path / "study/.venv/lib/site-packages/launchers/local.py"
    installed.parent.mkdir(parents=True)
    installed.write_text("first")
    assert git_commit(installed) == "unknown"
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "study/.git"))
    assert git_commit(source) == f"{commit}+"
    monkeypatch.setenv("PATH", str(tmp_path))  # no git
    assert git_commit(source) == "unknown"


def test_a_copy_in_another_repository_has_the_commit_that_holds_it(tmp_path: Path) -> None:
    commit = repository(tmp_path, "third_party/slim-brain/launchers/local.py", "ours.py")
    (tmp_path / "ours.py").write_text("changed")  # no change of this software
    assert git_commit(tmp_path / "third_party/slim-brain/launchers/local.py") == commit
