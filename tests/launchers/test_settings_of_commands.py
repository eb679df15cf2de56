"""`key=value` words: commands that read a configuration or a task take them, and the others refuse them in one line."""

from __future__ import annotations

from pathlib import Path

import pytest

from launchers.commands.__main__ import COMMANDS, main
from shards.core.cli import Parser, status_of
from shards.core.errors import ConfigError
from shards.core.presets import find
from slim.evaluation.task import load_tasks, overrides_of_tasks

pytestmark = pytest.mark.fast

WITHOUT = ("make-cohort", "train-extractor", "embed", "reconstruct", "report", "export", "slurm status", "config show")


def helped(command: str, capsys: pytest.CaptureFixture) -> str:
    with pytest.raises(SystemExit):
        main([*command.split(), "--help"])
    return capsys.readouterr().out


@pytest.mark.parametrize("command", [*sorted({*COMMANDS} - {"slurm", "config"}), *WITHOUT[-2:], "slurm pretrain"])
def test_help_says_whether_a_command_takes_settings(command: str, capsys: pytest.CaptureFixture) -> None:
    assert ("[key=value ...]" in helped(command, capsys)) == (command not in WITHOUT)


@pytest.mark.parametrize("command", WITHOUT)
def test_a_command_without_settings_names_its_options(command: str, capsys: pytest.CaptureFixture) -> None:
    options = {
        word.strip("[],")
        for word in helped(command, capsys).partition("\n\n")[0].split()
        if word.strip("[]").startswith("--")
    }
    assert status_of(lambda: main([*command.split(), "x", "--json", "run.steps=3"])) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1
    assert printed.err.startswith("error: command line: run.steps=3: got a setting, expected no key=value: slim-brain ")
    assert all(option in printed.err for option in options), options


def parser() -> Parser:
    made = Parser("probe", "Of a test.", "RUN")
    made.add_argument("runs", nargs="+")
    made.add_settings("keys")
    made.add_argument("--out")
    return made


def test_settings_stand_anywhere_and_values_of_options_are_none() -> None:
    args = parser().parse_args(["a=1", "run", "--out", "x=2", "b.c=[3, 4]", "more", "--json", "d=e=f"])
    assert (args.runs, args.out, args.settings) == (["run", "more"], "x=2", ["a=1", "b.c=[3, 4]", "d=e=f"])
    assert parser().parse_args(["run", "--", "a=1"]).settings == []


def test_a_file_is_no_setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("sub=01").touch()
    args = parser().parse_args(["sub=01", "ses=02", "folder/sub=01", "s3://bucket/run=2"])
    assert args.runs == ["sub=01", "folder/sub=01", "s3://bucket/run=2"] and args.settings == ["ses=02"]


def test_a_key_is_for_all_tasks_or_for_the_named_one() -> None:
    paths = [find("task", name, "") for name in ("hcp_sex", "ppmi")]
    (sex, of_sex), (ppmi, of_ppmi) = load_tasks(paths, ["pooling=mean", "hcp_sex.bootstrap=200", "ppmi.pooling=cov"])
    assert (sex.pooling, sex.bootstrap, ppmi.pooling) == ("mean", 200, "cov")
    assert (of_sex, of_ppmi) == (["pooling=mean", "bootstrap=200"], ["pooling=mean", "pooling=cov"])
    assert ppmi.bootstrap == load_tasks(paths[1:], [])[0][0].bootstrap
    with pytest.raises(ConfigError, match=r"^command line: poling: got an unknown key, .*Did you mean pooling\?$"):
        load_tasks(paths, ["ppmi.poling=cov"])


def test_a_key_of_the_settings_is_no_name(tmp_path: Path) -> None:
    paths = [tmp_path / "a.yaml", tmp_path / "b.yaml"]
    for path, name in zip(paths, ("run", "run.2"), strict=True):
        path.write_text(f"name: {name}")
    words = ["run.epochs=3", "run.2.label=age"]
    assert overrides_of_tasks(paths, words) == ([["epochs=3"], ["label=age"]], [])
    assert overrides_of_tasks(paths, words, ["run"]) == ([[], []], words)
