"""The rules of the house that a machine can check."""

from __future__ import annotations

import ast
import re
import tomllib
from pathlib import Path

import pytest
import yaml
from conftest import run_command
from packaging.requirements import Requirement
from packaging.version import Version

from launchers.cluster.scheduler import SlurmSettings
from shards.cohorts.cohort_file import CohortSettings
from shards.conversion.convert import ConvertSettings
from slim.config import FinetuneSettings, PretrainSettings, load_config

ROOT = Path(__file__).parent.parent
MAY_IMPORT = {
    "shards": set(),
    "slim": {"shards"},
    "launchers": {"slim", "shards"},
    "tools": {"launchers", "slim", "shards"},
}
OURS = set(MAY_IMPORT)


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {name.name.split(".")[0] for name in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.split(".")[0])
    return found


@pytest.mark.parametrize("package", sorted(MAY_IMPORT))
def test_imports_point_one_way(package: str) -> None:
    for path in (ROOT / package).rglob("*.py"):
        assert imports(path) & OURS - {package} <= MAY_IMPORT[package], path


def test_shards_needs_no_torch_but_for_the_stream() -> None:
    assert [path.name for path in (ROOT / "shards").glob("*.py") if "torch" in imports(path)] == ["stream.py"]


def test_commands_load_what_takes_seconds_only_where_they_use_it() -> None:
    code = (
        "import sys, launchers.conversion, launchers.local, slim.inference.slim_brain\n"
        "print(*sorted({'nilearn', 'pandas', 'matplotlib', 'scipy.signal', 'sklearn', 'wandb'} & set(sys.modules)))"
    )
    done = run_command("-c", code)
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stderr


def test_no_file_is_longer_than_600_lines() -> None:
    for package in (*MAY_IMPORT, "tests"):
        for path in (ROOT / package).rglob("*.py"):
            assert len(path.read_text().splitlines()) <= 600, path


@pytest.mark.parametrize("name", ["published", "lean", "large", "tiny"])
def test_every_pretraining_configuration_is_valid_and_has_the_fixed_keys(name: str) -> None:
    path = ROOT / "configs" / "pretrain" / f"{name}.yaml"
    settings = load_config(path)
    assert settings.model_name == name
    tree = yaml.safe_load(path.read_text())
    assert {"data", "model", "view", "windows", "objective", "precision", "zero", "run"} <= set(tree)
    assert {
        "out",
        "seed",
        "steps",
        "epochs",
        "batch",
        "accumulate",
        "processes",
        "workers",
        "checkpoint_every",
        "max_seconds",
        "resume",
    } <= set(tree["run"])


@pytest.mark.parametrize("model", [PretrainSettings, FinetuneSettings, ConvertSettings, CohortSettings, SlurmSettings])
def test_every_field_of_the_settings_is_read_somewhere(model: type) -> None:
    """A field that is parsed and never read is a promise that is not kept."""
    text = "".join(path.read_text() for package in MAY_IMPORT for path in (ROOT / package).rglob("*.py"))

    def fields(model: type) -> set[str]:
        names = set()
        for name, field in model.model_fields.items():
            names.add(name)
            if hasattr(field.annotation, "model_fields"):
                names |= fields(field.annotation)
        return names

    unread = {name for name in fields(model) if not re.search(rf"\.{name}\b", text)}
    assert unread == set()


def test_the_custom_model_example_is_the_lean_preset() -> None:
    from shards.core.settings import load
    from slim.config import PRESETS, ModelSettings

    assert load(ModelSettings, ROOT / "configs" / "model" / "custom.yaml") == PRESETS["lean"]


def test_the_oldest_versions_that_are_tested_are_the_lower_bounds() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [line for line in (ROOT / "tests" / "oldest.txt").read_text().splitlines() if not line.startswith("#")]
    tested = {name: Version(version) for name, version in (line.split("==") for line in lines)}
    bounds = {}
    for text in project["dependencies"]:
        requirement = Requirement(text)
        bounds[requirement.name] = min(Version(part.version) for part in requirement.specifier if part.operator == ">=")
    torch = bounds.pop("torch")  # other builds of it are large: the tested one stands for all
    assert torch <= tested.pop("torch") and tested == bounds


def test_files_of_text_are_utf8_whatever_the_locale() -> None:
    """Without an encoding Python takes that of the locale, which in a job or a container may be ASCII."""
    for package in sorted(MAY_IMPORT):
        for path in (ROOT / package).rglob("*.py"):
            for call in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(call, ast.Call) and not any(word.arg == "encoding" for word in call.keywords):
                    assert not opens_text(call), f"{path}:{call.lineno}"


def opens_text(call: ast.Call) -> bool:
    """Whether a call is `open` of a file of text, `Path.read_text` or `Path.write_text`."""
    if isinstance(call.func, ast.Name):
        mode = call.args[1] if len(call.args) > 1 else None
        return call.func.id == "open" and not (isinstance(mode, ast.Constant) and "b" in mode.value)
    # `remote.read_text` is this project's own.
    owner = getattr(getattr(call.func, "value", None), "id", "")
    return getattr(call.func, "attr", "") in ("read_text", "write_text") and owner != "remote"
