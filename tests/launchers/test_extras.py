"""Packages of the extras: who needs them says so at once, in one line; who does not works without them."""

from __future__ import annotations

import json
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from helpers.commands import ROOT, run_command
from launchers.commands.__main__ import COMMANDS, NEEDS, main
from shards.core.cli import status_of
from shards.core.extras import EXTRAS, ExtraMissing, require

# A process in which no package of an extra can be imported; the rest is given as calls of `slim-brain`, a JSON list.
CORE = f"""
import contextlib, io, json, sys
for name in {sorted(EXTRAS)!r}:
    sys.modules[name] = None
from launchers.commands.__main__ import main
from shards.core.cli import status_of
for words in json.loads(sys.argv[1]):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = status_of(lambda: main(words))
        except SystemExit as ended:
            status = ended.code
    print(json.dumps([status, out.getvalue(), err.getvalue()]))
"""


def core(*calls: list[str], timeout: float = 300) -> list[tuple[int, str, str]]:
    """Status, stdout and stderr of each call, with the core alone."""
    done = run_command("-c", CORE, json.dumps([*calls]), timeout=timeout)
    assert done.returncode == 0, done.stderr
    return [tuple(json.loads(line)) for line in done.stdout.splitlines()]


def test_the_table_is_that_of_the_package() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    imported = {"pillow": "PIL"}
    for name in set(EXTRAS.values()):
        packages = {Requirement(text).name for text in extras[name]}
        assert {imported.get(package, package) for package in packages} == {m for m, e in EXTRAS.items() if e == name}
    whole = Requirement(extras["all"][0])
    assert whole.name == "slim-brain" and whole.extras == set(EXTRAS.values())


@pytest.mark.parametrize("name", NEEDS)
def test_a_missing_package_is_one_line_with_its_extra(name: str, monkeypatch, capsys) -> None:
    for module in NEEDS[name]:
        monkeypatch.setitem(sys.modules, module, None)
    extras = ",".join(sorted({EXTRAS[module] for module in NEEDS[name]}))
    assert status_of(lambda: main([name])) == 2
    told = f"got no such package, expected an installed one. Install it: pip install 'slim-brain[{extras}]'"
    assert capsys.readouterr().err == f"error: {', '.join(NEEDS[name])}: {told}\n"


def test_what_is_there_is_not_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    require("json", "deepspeed")
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ExtraMissing, match=r"^wandb: .*'slim-brain\[train\]'$"):
        require("deepspeed", "wandb")


def test_help_needs_no_extra() -> None:
    for name, (status, out, err) in zip(COMMANDS, core(*([name, "--help"] for name in COMMANDS)), strict=True):
        assert (status, err) == (0, "") and out.startswith(f"usage: slim-brain {name} "), name


def test_what_needs_no_extra_runs_without_and_the_rest_says_which(tmp_path: Path) -> None:
    cohort, out = tmp_path / "cohort", tmp_path / "run"
    size = ["--subjects", "1", "--sessions", "1", "--frames", "20", "--voxel-mm", "16"]
    slurm = ["slurm", "pretrain", "tiny", f"run.out={out}", "--nodes", "1", "--gpus-per-node", "1", "--dry-run"]
    made, planned, submitted, shards = core(
        ["make-cohort", "--out", str(cohort), *size],
        ["plan", "tiny", "run.batch=1", "run.steps=3", "--gpu-memory", "80GB", "--json"],
        slurm,
        ["make-shards", str(cohort / "cohort.yaml"), "--out", str(tmp_path / "shards")],
    )
    assert made[0] == 0 and (cohort / "cohort.yaml").is_file(), made[2]
    assert planned[0] == 0 and json.loads(planned[1].splitlines()[-1])["steps"] == 3, planned[2]
    assert submitted[0] == 2 and submitted[2].count("\n") == 1 and "'slim-brain[slurm]'" in submitted[2], submitted[2]
    assert shards[0] == 2 and "webdataset, matplotlib: " in shards[2] and "'slim-brain[report,train]'" in shards[2]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cohort"]
