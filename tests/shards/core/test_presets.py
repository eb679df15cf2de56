"""Configurations that ship: found by name or by path; a file and a preset of one name."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from helpers.commands import ROOT
from shards.cohorts.cohort_file import CohortSettings
from shards.core.errors import ConfigError
from shards.core.presets import KINDS, find, presets
from shards.core.settings import load, read_yaml
from slim.config import load_config
from slim.evaluation.task import load_task

pytestmark = pytest.mark.fast

OPTION = "--task"


def test_every_file_of_configs_is_found_by_its_name() -> None:
    found = {preset.path for kind in KINDS for preset in presets(kind).values()}
    assert found == set((ROOT / "configs").rglob("*.yaml"))
    for kind in KINDS:
        for name in presets(kind):
            assert find(kind, name, OPTION) == presets(kind)[name].path


def test_a_description_is_a_line_that_stands_alone() -> None:
    for kind in KINDS:
        for preset in presets(kind).values():
            first = preset.path.read_text().partition("\n")[0]
            assert preset.description and first == f"# {preset.description}"
            assert preset.description.endswith(".") and len(preset.description) <= 130, preset.path
            assert preset.description[0].isupper() or preset.description.startswith(("`", "nilearn")), preset.path


def test_names_are_read_as_what_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_config("lean", ["run.steps=3"]).run.steps == 3
    assert load_config("lean", ["model=custom"]).model == load_config("lean").model  # as the file says of itself
    assert load_task(find("task", "hcp_sex", OPTION)).split.family == "Family_ID"
    assert load(CohortSettings, find("cohort", "abide", OPTION)).dummy == 4
    assert "partition" in read_yaml(find("slurm", "example", OPTION))


def test_a_file_is_taken_before_a_preset_and_this_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ppmi").mkdir()  # a folder is no file
    assert find("task", "ppmi", OPTION) == ROOT / "configs/downstream/ppmi.yaml"
    (tmp_path / "hcp_sex").write_text("name: mine\n")
    with caplog.at_level(logging.WARNING):
        assert find("task", "hcp_sex", OPTION) == Path("hcp_sex")
    assert "hcp_sex: the file of this name is used, not the preset" in caplog.text
    caplog.clear()
    assert find("task", "./hcp_sex", OPTION) == Path("hcp_sex")
    assert find("cohort", "hcp_sex", OPTION) == Path("hcp_sex")  # no cohort has this name
    assert caplog.text == ""


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("hcp_sexx", r"^command line: --task: got hcp_sexx, expected a YAML file, or one of .*Did you mean hcp_sex\?$"),
        ("zzz", r"^command line: --task: got zzz, .*abide_age, .*slim-brain config --list"),
        ("configs/downstream/hcp_sex.yml", r"hcp_sex.yml: got no such file, .*Did you mean hcp_sex\?$"),
        ("hcp_sex.yaml", r"^hcp_sex.yaml: got no such file, .*Did you mean hcp_sex\?$"),
        ("lean", r"got lean, expected a YAML file, or one of"),  # of another kind
        ("a\0b", "got "),
        ("x" * 5000, "got "),
    ],
)
def test_an_unknown_name_is_one_line_with_the_names(given: str, told: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=told) as raised:
        find("task", given, OPTION)
    line = raised.value.line()
    assert line.isprintable() and len(line) < 4000
