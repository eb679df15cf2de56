"""What README and documentation show exists: files, commands, options, settings, configurations."""

from __future__ import annotations

import ast
import json
import re
import shlex
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from importlib import import_module
from itertools import pairwise
from pathlib import Path

import pytest
import yaml

from helpers.commands import ROOT
from launchers.commands.__main__ import COMMANDS
from launchers.commands.config import MODELS
from shards.cohorts.cohort_file import CohortSettings
from shards.core.keys import keys
from shards.core.presets import presets
from shards.core.settings import check
from shards.format.layout import ARRAYS
from slim.checkpoints import run_folder
from slim.evaluation.task import Task

DOCS = ROOT / "docs"
sys.path.insert(0, str(DOCS / "_code"))
generate = import_module("generate")

GENERATED = {"_build", "commands", "configuration", "gallery"}
PAGES = [ROOT / "README.md", *sorted(path for path in DOCS.rglob("*.md") if not GENERATED & {*path.parts})]
# The kind of settings that a command takes as key=value.
SETTINGS = {
    "pretrain": "pretrain",
    "plan": "pretrain",
    "slurm pretrain": "pretrain",
    "make-shards": "shards",
    "slurm shards": "shards",
    "finetune": "finetune",
    "slurm finetune": "finetune",
    "experiments": "pretrain",
    "probe": "task",
    "explain": "task",
}


def calls() -> Iterator[tuple[str, list[str]]]:
    """Every call of slim-brain in a block of bash: where it stands, and its words."""
    for page in PAGES:
        for block in re.findall(r"```bash\n(.*?)```", page.read_text(encoding="utf-8"), re.S):
            for line in block.replace("\\\n", " ").splitlines():
                if (at := line.find("slim-brain ")) >= 0 and not line.lstrip().startswith(("#", "cd", "git", "pip")):
                    words = shlex.split(line[at:].partition(">")[0].partition(";")[0], comments=True)
                    yield f"{page.relative_to(ROOT)}: {line.strip()}", words[1:]


CALLS = [call for call in calls() if call[1] and call[1][0] not in ("COMMAND", "--help", "--version")]


def test_the_readme_is_a_page() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 150
    assert "make quickstart" in text and "make test" in text


@pytest.mark.parametrize("name", ["README.md", "CHANGELOG.md", "CONTRIBUTING.md"])
def test_links_of_the_pages_at_the_root_lead_somewhere(name: str) -> None:
    links = re.findall(r"\]\((?!http)([^)#]+)", (ROOT / name).read_text(encoding="utf-8"))
    assert [link for link in links if not (ROOT / link).exists()] == []


@pytest.mark.parametrize(("where", "words"), CALLS, ids=[where for where, _ in CALLS])
def test_commands_of_the_documentation_exist_with_their_options_and_settings(where: str, words: list[str]) -> None:
    name, *rest = words
    assert name in COMMANDS
    subs = [rest.pop(0)] if rest and rest[0] in generate.SUBCOMMANDS.get(name, ()) else []
    known = {option for action in generate.parser_of(name, *subs)._actions for option in action.option_strings}
    assert {word.partition("=")[0] for word in rest if word.startswith("--")} <= known
    kind = SETTINGS.get(" ".join([name, *subs]))
    tasks = {
        task for option, task in pairwise(rest) if option == "--task"
    }  # NAME.key=value sets a key of the task NAME
    given = {word.partition("=")[0] for word in rest if re.match(r"[a-z_.]+=", word)}
    given = {key for key in given if key.partition(".")[0] not in tasks}
    if kind:
        module, _, model = MODELS[kind].partition(":")
        assert given <= {key.name for key in keys(getattr(import_module(module), model))}
    else:
        assert given == set() or name == "bench"


def tables_of_results() -> Iterator[tuple[str, str]]:
    """The header of each table with numbers, and the line below the table."""
    for page in sorted((DOCS / "results").glob("*.md")):
        found = re.findall(r"^(\|.*)\n\|[-:| ]+\|\n((?:\|.*\n)+)\n(.*)", page.read_text(encoding="utf-8"), re.M)
        yield from (
            (f"{page.name}: {head}", below)
            for head, rows, below in found
            if re.search(r"\d", rows) and page.stem != "index"
        )
    results = (ROOT / "README.md").read_text(encoding="utf-8").partition("## Results")[2]
    yield "README.md", re.findall(r"^(?:\|.*\n)+\n(.*)", results, re.M)[0]


def test_every_table_of_results_names_its_command_and_commits() -> None:
    found = list(tables_of_results())
    assert len(found) >= 24
    commits = set()
    for where, below in found:
        made = re.fullmatch(r"Made by `[^`]+`, commits? ([0-9a-f]{7}(?:, [0-9a-f]{7})*)\.", below)
        assert made is not None, where
        commits |= set(made[1].split(", "))
    git = ["git", "-C", str(ROOT), "cat-file", "-t"]
    if subprocess.run([*git, "7e80cd4"], capture_output=True).returncode:
        pytest.skip("no history: a copy of the files, or a shallow clone")
    kinds = {subprocess.run([*git, name], capture_output=True, text=True).stdout.strip() for name in commits}
    assert kinds == {"commit"}


def blocks(language: str) -> Iterator[tuple[str, str]]:
    """Every block of a language: its page, and its text."""
    for page in PAGES:
        for text in re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), re.S):
            yield str(page.relative_to(ROOT)), text


def test_cohorts_and_tasks_of_the_documentation_are_valid() -> None:
    trees = [(page, yaml.safe_load(text)) for page, text in blocks("yaml")]
    cohorts = [check(CohortSettings, tree, page) for page, tree in trees if "root" in tree]
    tasks = [check(Task, tree, page) for page, tree in trees if "type" in tree]
    assert len(cohorts) >= 4 and len(tasks) >= 2


def test_python_of_the_documentation_compiles_and_its_imports_exist() -> None:
    found = [(page, ast.parse(text)) for page, text in blocks("python")]
    for page, tree in found:
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module:
                module = import_module(node.module)
                assert [name.name for name in node.names if not hasattr(module, name.name)] == [], page
    assert len(found) >= 6


def test_every_array_of_a_dataset_is_in_the_reference() -> None:
    page = (DOCS / "reference" / "dataset_format.md").read_text(encoding="utf-8")
    assert [name for name in ARRAYS if f"`{name}`" not in page] == []


def test_every_metric_and_every_file_of_a_run_is_in_the_reference() -> None:
    """Of a run of version 0.1 and of this version's names."""
    page = (DOCS / "reference" / "metrics.md").read_text(encoding="utf-8")
    with tarfile.open(ROOT / "tests" / "artefacts" / "version_0_1.tar.xz") as archive:
        logs = [name for name in archive.getnames() if name.endswith("/metrics.jsonl")]
        lines = [json.loads(archive.extractfile(name).read().splitlines()[-1]) for name in logs]
    assert lines and [name for line in lines for name in line if f"`{name}`" not in page] == []
    page = (DOCS / "reference" / "run_folder.md").read_text(encoding="utf-8")
    names = [value for name, value in vars(run_folder).items() if name.isupper() and isinstance(value, str)]
    assert [name for name in names if name.partition("/")[0] not in page] == []


def test_configurations_that_the_documentation_names_ship() -> None:
    found = 0
    for where, (name, *rest) in CALLS:
        words = [name, *rest] if name != "config" else []
        for word, value in pairwise(words):
            kind = {"--task": "task", "pretrain": "pretrain", "plan": "pretrain"}.get(word)
            if kind and re.fullmatch(r"[a-z_]+", value):
                assert value in presets(kind), where
                found += 1
    assert found > 15


def test_every_kind_of_configuration_has_a_page() -> None:
    assert set(generate.TITLES) == set(MODELS)
    listed = (DOCS / "reference" / "configuration.md").read_text(encoding="utf-8")
    assert [kind for kind in MODELS if f"configuration/{kind}\n" not in listed] == []


def test_every_command_has_a_page(tmp_path: Path) -> None:
    generate.write_reference(tmp_path)
    assert {path.stem for path in (tmp_path / "commands").glob("*.md")} == {*COMMANDS, "index"}
    for name in COMMANDS:
        assert f"slim-brain {name}" in (tmp_path / "commands" / f"{name}.md").read_text(encoding="utf-8")
