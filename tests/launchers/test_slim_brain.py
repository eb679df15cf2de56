"""The console script: the list of commands, and the same code as the files of tools/."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.commands import ROOT, run_command
from launchers.commands.__main__ import COMMANDS, main
from launchers.environment import SLIM_BRAIN
from shards.core import cli
from shards.core.errors import ConfigError

MODULES = sorted(path.stem for path in (ROOT / "launchers" / "commands").glob("[!_]*.py"))


def test_help_lists_every_command_in_the_order_of_the_work(capsys: pytest.CaptureFixture) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    listed = [line.split()[0] for line in text.splitlines() if line.startswith("  ")]
    assert sorted(name.replace("-", "_") for name in listed) == MODULES
    work = ["make-cohort", "make-shards", "pretrain", "probe", "export", "slurm"]
    assert [name for name in listed if name in work] == work
    assert all(len(line) <= 100 and line.endswith((".", "...", ":", "")) for line in text.splitlines())
    assert len([line for line in text.splitlines() if line.startswith("  ") and line.endswith(".")]) == len(listed)


def test_help_loads_nothing_that_takes_seconds() -> None:
    code = (
        "import sys; from launchers.commands.__main__ import main; main(['--help'])\n"
        "heavy = {'torch', 'numpy', 'pydantic', 'yaml', 'rich', 'nibabel'}\n"
        "print(*sorted(heavy & set(sys.modules)), file=sys.stderr)"
    )
    done = run_command("-c", code)
    assert (done.returncode, done.stderr.strip()) == (0, ""), done.stderr


@pytest.mark.parametrize(
    ("typed", "meant"), [("make_shards", "make-shards"), ("pretrian", "pretrain"), ("fine-tune", "finetune")]
)
def test_an_unknown_command_is_one_line_with_a_suggestion(typed: str, meant: str) -> None:
    done = run_command(*SLIM_BRAIN[1:], typed, "--out", "x")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and done.stderr.endswith(f"Did you mean {meant}?\n")


def test_what_resembles_no_command_gets_the_list() -> None:
    with pytest.raises(ConfigError, match=r"COMMAND: got xyz, expected one of make-cohort, .*slurm"):
        main(["xyz"])


def test_without_a_command_the_list_is_shown_and_the_status_is_that_of_a_wrong_call(capsys) -> None:
    assert main([]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and "make-shards" in printed.err


def test_the_version_is_told(capsys: pytest.CaptureFixture) -> None:
    from slim import __version__

    assert main(["--version"]) == 0 and capsys.readouterr().out == f"slim-brain {__version__}\n"


@pytest.mark.parametrize("name", COMMANDS)
def test_help_shows_a_call_as_it_was_called(name: str, monkeypatch, capsys) -> None:
    path = "launchers/slurm.py" if name == "slurm" else f"tools/{name.replace('-', '_')}.py"
    assert (ROOT / path).is_file()
    for program, mine, other in (
        (path, f"python {path}", f"slim-brain {name}"),
        ("/somewhere/bin/slim-brain", f"slim-brain {name}", f"python {path}"),
    ):
        monkeypatch.setattr(sys, "argv", [program])
        with pytest.raises(SystemExit) as ended:
            main([name, "--help"])
        text = capsys.readouterr().out
        usage, _, example = text.partition("example:\n")
        assert ended.value.code == 0
        assert usage.startswith(f"usage: {mine} ") and example.startswith(f"  {mine} ")
        assert other not in text


@pytest.mark.parametrize(
    ("command", "call"),
    [
        (["python", "launchers/slurm.py", "shards", "c.yaml"], "python tools/make_shards.py x"),
        (["python", "tools/make_shards.py", "--slurm", "lab"], "python tools/make_shards.py x"),
        (["launchers/slurm.py", "shards"], "python tools/make_shards.py x"),  # as version 0.1 noted it
        (["slim-brain", "slurm", "shards", "c.yaml"], "slim-brain make-shards x"),
        ([], "slim-brain make-shards x"),
    ],
)
def test_a_job_answers_in_the_style_of_the_call(command: list[str], call: str, monkeypatch) -> None:
    monkeypatch.setattr(cli, "_caller", None)
    monkeypatch.setattr(sys, "argv", ["/site-packages/launchers/cluster/conversion_task.py"])
    cli.answer_as(command)
    assert cli.call_of("make-shards", "x") == call


@pytest.mark.parametrize("command", ["shards", "pretrain", "finetune", "status", "cancel"])
def test_slurm_commands_show_their_own_call(command: str, capsys) -> None:
    with pytest.raises(SystemExit):
        main(["slurm", command, "--help"])
    text = capsys.readouterr().out
    assert text.startswith(f"usage: slim-brain slurm {command} ")
    assert text.rpartition("example:\n")[2].startswith(f"  slim-brain slurm {command} ")


@pytest.mark.parametrize("file", ["tools/make_cohort.py", "launchers/slurm.py"])
def test_a_file_finds_the_packages_of_its_own_checkout(file: str, tmp_path: Path) -> None:
    """From any folder, and before those that are installed."""
    (tmp_path / "launchers").mkdir()
    (tmp_path / "launchers/__init__.py").write_text("raise SystemExit('another launchers')")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}

    def call(*words: object) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, *map(str, words)], cwd=tmp_path, env=environment, capture_output=True, text=True
        )

    assert "another launchers" in call("-m", "launchers.commands", "--help").stderr
    done = call(ROOT / file, "--help")
    assert done.returncode == 0 and f"usage: python {file} " in done.stdout, done.stderr
