"""What a public forge runs and reads: its workflow, the hooks before a commit, the citation."""

from __future__ import annotations

import re

import pytest
import yaml

from helpers.commands import ROOT
from slim import __version__

pytestmark = pytest.mark.fast


def targets(text: str) -> set[str]:
    """The targets of all calls of make in a shell script."""
    calls = re.findall(r"\bmake ((?:[a-z-]+ ?)+)", text)
    return {word for call in calls for word in call.split()}


def test_the_workflow_runs_what_ci_runs() -> None:
    jobs = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8"))["jobs"]
    steps = jobs["check"]["strategy"]["matrix"]["steps"]
    assert jobs["check"]["steps"][-1] == {"run": "${{ matrix.steps }}"}
    assert targets("\n".join(steps)) == targets((ROOT / ".ci/run").read_text(encoding="utf-8"))


def test_the_hooks_are_those_of_make_lint() -> None:
    (repo,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"]
    hooks = {hook["entry"].removeprefix(".venv/bin/").replace(" --fix", "") for hook in repo["hooks"]}
    recipe = (ROOT / "Makefile").read_text(encoding="utf-8").partition("\nlint:")[2].partition("\n\n")[0]
    calls = [re.sub(r"\s(\.|--check|\S+\.sh)(?=\s|$)", "", line.strip()) for line in recipe.splitlines()[1:]]
    assert repo["repo"] == "local" and hooks == {call.removeprefix("$(BIN)/") for call in calls}


def test_the_citation_is_of_this_version() -> None:
    about = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert about["version"] == __version__
    (paper,) = about["references"]
    assert paper["identifiers"][0]["value"] == "arXiv:2512.21881" and len(paper["authors"]) == 8
