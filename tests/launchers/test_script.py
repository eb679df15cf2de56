"""Scripts of SLURM: no value can add a line or a command."""

from __future__ import annotations

import shlex
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers.commands import ROOT
from launchers import environment
from launchers.cluster import script as script_module
from launchers.cluster.scheduler import SlurmSettings
from launchers.cluster.script import JobFolders, Script
from launchers.cluster.training_job import TrainingScript
from shards.core.errors import ConfigError
from shards.core.settings import check

BREAKS = ["a\nid", "a\r\nb", "a\x1b[2J", "a\x00", "a\x85b", "a\u2028b", "a\x7f", "\udcff"]
TEXT = ("partition", "account", "qos", "mem", "constraint", "python")
LISTS = ("modules", "srun")


@pytest.mark.parametrize("value", BREAKS)
def test_values_with_line_breaks_or_control_characters_are_refused(value: str) -> None:
    trees = [{name: value} for name in TEXT] + [{name: ["a", value]} for name in LISTS]
    trees += [{"sbatch": {"comment": value}}, {"sbatch": {value: "a"}}, {"sbatch": {"a b": "c"}}, {"time": value}]
    for tree in trees:
        with pytest.raises(ConfigError) as error:
            check(SlurmSettings, tree, "site.yaml")
        line = error.value.line()
        assert line.startswith(f"site.yaml: {next(iter(tree))}") and line.isprintable(), line


def test_lines_of_setup_may_be_many_but_hold_no_other_control_characters() -> None:
    setup = ("module load a\nexport A=1", "\tsource b")
    assert check(SlurmSettings, {"setup": setup}, "site.yaml").setup == setup
    with pytest.raises(ConfigError, match=r"site\.yaml: setup: got .*expected text without line breaks"):
        check(SlurmSettings, {"setup": ["a\x1b[2J"]}, "site.yaml")


@pytest.mark.parametrize("value", BREAKS)
def test_a_folder_that_cannot_stand_in_a_script_is_refused(value: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="folder: got a path with one of them, expected a path without") as error:
        TrainingScript(SlurmSettings(), tmp_path / value, "1", 1, 0, 1)
    assert error.value.line().isprintable()


PLAIN = st.text(st.characters(exclude_categories=("Cc", "Cs", "Zl", "Zp")), min_size=1, max_size=30)
NASTY = st.sampled_from(
    ["$(touch X)", "`touch X`", "a'; touch X; '", 'a"; touch X; "', "a && b", "{0}", "%j", "#SBATCH"]
)
# A value of spaces alone means the default.
ANY = st.one_of(st.text(min_size=1, max_size=30), PLAIN, NASTY).filter(str.strip)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run, and its script with a word of its own in place of each value."""
    run = tmp_path_factory.mktemp("runs") / "lean"
    return run, script({name: f"VALUE-{name}-" for name in (*TEXT, "srun", "comment")}, run)


def script(values: dict[str, str], run: Path) -> str:
    tree = {name: values[name] for name in TEXT}
    tree |= {"srun": [values["srun"]], "sbatch": {"comment": values["comment"]}}
    return TrainingScript(check(SlurmSettings, tree, "test"), run, "2", 1, 0, 1).text()


@given(st.fixed_dictionaries(dict.fromkeys((*TEXT, "srun", "comment"), ANY)))
def test_no_value_adds_a_line_or_a_command(written, values: dict[str, str]) -> None:
    """A script is the same but for the values, each one quoted word of its line."""
    run, expected = written
    try:
        text = script(values, run)
    except ConfigError:
        return
    lines = len(expected.split("\n"))
    for name, value in values.items():
        assert f"VALUE-{name}-" in expected
        expected = expected.replace(f"VALUE-{name}-", shlex.quote(value))
    assert text == expected and len(text.split("\n")) == lines


@given(NASTY | PLAIN.filter(lambda name: "/" not in name and name.strip(".")))
def test_folders_reach_the_script_as_they_are(tmp_path_factory, name: str) -> None:
    """What bash makes of the lines that set FOLDER is the path itself."""
    run = tmp_path_factory.getbasetemp() / name.replace("/", "_").encode()[:60].decode(errors="ignore")
    settings = SlurmSettings(python=f"/opt/{name}/python")
    written = Script(
        settings, JobFolders(run, run, "%j.log"), run.name, 'printf "%s\\n%s\\n" "$FOLDER" "$PYTHON"', {}, {}
    ).text()
    done = subprocess.run(["bash"], input=written.encode(), capture_output=True, cwd="/")
    assert done.stdout.decode() == f"{run}\n/opt/{name}/python\n", written
    assert not done.stderr


def test_pythonpath_leads_to_a_checkout_and_not_to_installed_packages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In PYTHONPATH installed packages would come before the standard library, and before those of another Python."""
    show = 'printf "%s|%s" "${PYTHONPATH-unset}" "$SOFTWARE"'

    def seen(**variables: str) -> str:
        text = Script(
            SlurmSettings(), JobFolders(tmp_path / "run", tmp_path / "run", "%j.log"), "run", show, {}, {}
        ).text()
        return subprocess.run(["bash"], input=text, capture_output=True, text=True, env=variables).stdout

    root = str(ROOT)
    assert seen() == f"{root}|{root}" and seen(PYTHONPATH="/a:/b") == f"{root}:/a:/b|{root}"
    assert environment.with_packages({"PYTHONPATH": "/a"}) == {"PYTHONPATH": f"{root}:/a"}
    for module in (environment, script_module):
        monkeypatch.setattr(module, "ROOT", tmp_path)
    assert seen() == f"unset|{tmp_path}" and seen(PYTHONPATH="/a:/b") == f"/a:/b|{tmp_path}"
    assert environment.with_packages({"PYTHONPATH": "/a"}) == {"PYTHONPATH": "/a"}
