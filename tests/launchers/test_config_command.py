"""`slim-brain config`: what ships, printed and listed; and commands that take its names."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from helpers.commands import ROOT
from launchers.commands import config, plan
from launchers.commands.__main__ import main
from shards.core.cli import status_of


def test_the_list_has_every_file_with_its_first_line(capsys: pytest.CaptureFixture) -> None:
    assert config.main(["--list", "--json"]) == 0
    text, _, facts = capsys.readouterr().out.rstrip("\n").rpartition("\n")
    told = [one for ones in json.loads(facts).values() for one in ones]
    assert {Path(one["path"]) for one in told} == set((ROOT / "configs").rglob("*.yaml"))
    for one in told:
        first = Path(one["path"]).read_text().partition("\n")[0]
        assert first == f"# {one['description']}"
        assert any(line.split()[:1] == [one["name"]] and one["description"] in line for line in text.splitlines())


def test_a_shown_configuration_is_a_file_to_start_from(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert config.main(["show", "cohort", "hcp"]) == 0
    text = capsys.readouterr().out
    assert text == (ROOT / "configs/cohorts/hcp.yaml").read_text() and yaml.safe_load(text)["name"] == "hcp"


def test_without_words_it_shows_its_help(capsys: pytest.CaptureFixture) -> None:
    assert config.main([]) == 2
    assert "slim-brain config explain KIND [KEY]" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["pretrain", "leen"], r"CONFIG: got leen, .*Did you mean lean?"),
        (["plan", "leen"], r"CONFIG: got leen, .*Did you mean lean?"),
        (["probe", "run", "--data", "d", "--task", "hcp_sexx"], "--task: got hcp_sexx, .*Did you mean hcp_sex?"),
        (["finetune", "run", "--data", "d", "--task", "ppmj"], "--task: got ppmj, .*Did you mean ppmi?"),
        (["explain", "run", "--data", "d", "--task", "ppmj"], "--task: got ppmj, .*Did you mean ppmi?"),
        (["make-shards", "abidee", "--out", "d"], "COHORT: got abidee, .*Did you mean abide?"),
        (["make-shards", "abide", "--out", "d", "--slurm", "exampl"], "--slurm: got exampl, .*Did you mean example?"),
        (["slurm", "pretrain", "leen", "--nodes", "1", "--gpus-per-node", "1"], "CONFIG: got leen, .*mean lean?"),
        (
            ["slurm", "pretrain", "lean", "--nodes", "1", "--gpus-per-node", "1", "--slurm", "exampl"],
            "--slurm: got exampl, .*Did you mean example?",
        ),
        (["config", "show", "task", "hcp_sexx"], "NAME: got hcp_sexx, .*Did you mean hcp_sex?"),
        (["config", "explain", "pretrain", "run.step"], "KEY: got run.step, .*Did you mean run.steps?"),
    ],
)
def test_an_unknown_name_is_one_line_with_a_suggestion(words, told, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    assert status_of(lambda: main(words)) == 2
    line = capsys.readouterr().err
    before, _, after = told.partition(".*")
    assert line.count("\n") == 1 and before in line and line.endswith(f"{after}\n")


def test_a_name_and_its_path_are_the_same_configuration(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)

    def facts(given: str) -> dict:
        assert plan.main([given, "run.batch=1", "run.steps=10", "--gpu-memory", "80GB", "--json"]) == 0
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    assert facts("tiny") == facts(str(ROOT / "configs/pretrain/tiny.yaml"))
