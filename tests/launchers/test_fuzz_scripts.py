"""SLURM settings and the scripts made from them: refused in one line, or a script that is what it is without them.

No value adds a line or a directive, whatever it holds, and bash reads each script; shellcheck finds nothing in them.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import strategies as st

from helpers.fuzzing import SLURM, TEXTS, answer, counts, hold, written
from launchers.cluster.conversion_jobs import Chain
from launchers.cluster.scheduler import SlurmSettings
from launchers.cluster.training_job import TrainingScript
from shards.core.errors import ConfigError
from shards.core.settings import check, load

SHELLCHECK = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
NASTY = (
    *("$(touch X)", "`touch X`", "'; touch X; '", '"; touch X; "', "a && b", "{0}", "{", "%j", "\\", "a\\", "#", "!"),
    *("#SBATCH --uid=0", "--uid=0", "x\n#SBATCH --uid=0", "x\r#SBATCH --uid=0", "x\u2028#SBATCH --uid=0"),
    *("~", "*", "a b", "exit", "&"),
    *("<<EOF", "if true; then", "fi", "}", ")", "(", "function f {", "export A='", 'export A="', "case x in"),
)
WORDS = st.one_of(st.sampled_from((*NASTY, *TEXTS)), st.text(min_size=1, max_size=20))
OPTIONS = st.one_of(st.sampled_from(("gres", "exclusive", "mail-user", "mail_user", "output", "nodes", "array")), WORDS)
SETTINGS = st.fixed_dictionaries(
    {},
    optional={
        **dict.fromkeys(("partition", "account", "qos", "mem", "constraint", "python"), WORDS),
        "time": st.one_of(WORDS, st.just("1:00:00")),
        "modules": st.lists(WORDS, max_size=3),
        "srun": st.lists(WORDS, max_size=3),
        "setup": st.lists(WORDS, max_size=3),
        "sbatch": st.dictionaries(OPTIONS, st.one_of(WORDS, st.booleans(), st.none(), st.integers()), max_size=3),
    },
)

FOUND = (b"partition: ''\n", b"mem: ' '\n", b"srun: ['']\n", b"modules: ['']\n")  # empty values


def scripts(settings: SlurmSettings, folder: Path) -> dict[str, str]:
    """Every script that is made with these settings: of a run on two nodes, and of the jobs of a conversion."""
    chain: Any = Chain(SimpleNamespace(folder=folder), None, settings, 4, 2)  # type: ignore[arg-type]
    found = {
        nodes: TrainingScript(settings, folder, nodes, 2, gpus, 3).text() for nodes, gpus in (("2", 2), ("2-4", 0))
    }
    return found | {stage: script.text(dependency="afterok:7") for stage, script in chain._scripts(4, True).items()}


def harmless(settings: SlurmSettings) -> SlurmSettings:
    """Settings of the same kinds, each value a plain word."""

    def word(name: str, value: Any) -> Any:
        if isinstance(value, str):
            return "1:00:00" if name == "time" else "x"
        if isinstance(value, tuple):
            return tuple("\n".join("x" for _ in part.split("\n")) for part in value)
        if isinstance(value, dict):
            return {option: "x" if isinstance(part, str) else part for option, part in value.items()}
        return value

    return SlurmSettings(**{name: word(name, value) for name, value in settings.model_dump().items()})


def directives(text: str) -> list[str]:
    """Names of the options that sbatch reads; it stops at the first line that is no comment."""
    found = []
    for line in text.split("\n"):
        if line.strip() and not line.startswith("#"):
            break
        if line.startswith(("#SBATCH", "#PBS", "#BSUB")):
            found.append(line.split("=")[0])
    return found


def hold_scripts(settings: SlurmSettings, folder: Path) -> None:
    texts = answer(lambda: scripts(settings, folder), 10**5)
    if isinstance(texts, ConfigError):
        return
    for (stage, text), plain in zip(texts.items(), scripts(harmless(settings), folder).values(), strict=True):
        assert directives(text) == directives(plain), text
        assert len(text.split("\n")) == len(plain.split("\n")), text
        body = plain.index("\nexport FOLDER=")
        assert text.count("\n", 0, text.rindex("\nexport FOLDER=")) == plain.count("\n", 0, body), text
        read = subprocess.run(["bash", "-n"], input=text.encode("utf-8"), capture_output=True)
        assert read.returncode == 0 and not read.stderr, f"{stage}: {read.stderr.decode()}\n{text}"


@counts
def test_no_setting_adds_a_line_or_a_directive(inputs: int, tmp_path: Path) -> None:
    def target(tree: dict[str, Any]) -> None:
        settings = answer(lambda: check(SlurmSettings, tree, "site.yaml"), 10**5)
        if not isinstance(settings, ConfigError):
            hold_scripts(settings, tmp_path / "run")

    hold(2 * inputs, SETTINGS, target)


@counts
def test_no_file_adds_a_line_or_a_directive(inputs: int, tmp_path: Path) -> None:
    def target(content: bytes) -> None:
        (tmp_path / "site.yaml").write_bytes(content)
        settings = answer(lambda: load(SlurmSettings, tmp_path / "site.yaml"), len(content))
        if not isinstance(settings, ConfigError):
            hold_scripts(settings, tmp_path / "run")

    hold(inputs, written(SLURM), target, FOUND)


@counts
def test_no_name_of_a_folder_adds_a_line_or_a_directive(inputs: int, tmp_path: Path) -> None:
    def target(name: str) -> None:
        hold_scripts(SlurmSettings(), tmp_path / name.replace("/", "_"))

    hold(inputs, WORDS.filter(lambda name: name not in ("", ".", "..") and len(name) < 80), target)


@pytest.mark.skipif(SHELLCHECK is None, reason="shellcheck is not on this machine")
def test_shellcheck_finds_nothing(tmp_path: Path) -> None:
    """SC2016: text in single quotes, which a shell on a node expands, is meant."""
    for tree in (SLURM[0], {}):
        for stage, text in scripts(check(SlurmSettings, tree, "test"), tmp_path / "a 'run'").items():
            words = [SHELLCHECK, "--shell=bash", "--exclude=SC2016", "--format=gcc", "-"]
            done = subprocess.run(words, input=text, capture_output=True, text=True)
            assert done.returncode == 0, f"{stage}: {done.stdout}{done.stderr}"


@pytest.mark.parametrize(
    "setup",
    [
        ["#SBATCH --partition=x"],
        ["export A=1\n#SBATCH --uid=0"],
        ["#PBS -q x"],
        ["cat <<EOF"],
        ["export A='"],
        ["if true; then"],
        ["export A=1 \\"],
        ["}"],
    ],
)
def test_lines_of_setup_that_would_swallow_or_direct_a_script_are_refused(setup: list[str], tmp_path: Path) -> None:
    settings = check(SlurmSettings, {"setup": setup}, "test")
    with pytest.raises(ConfigError, match=r"setup: got .*, expected (complete )?lines of bash") as error:
        scripts(settings, tmp_path / "run")
    assert error.value.line().isprintable()


def test_a_name_with_a_percent_sign_is_no_pattern_of_slurms(tmp_path: Path) -> None:
    for text in scripts(SlurmSettings(), tmp_path / "a%j").values():
        (line,) = [line for line in text.split("\n") if line.startswith("#SBATCH --output=")]
        assert "/a%%j/" in line
