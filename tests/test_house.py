"""The rules of the house that a machine can check."""

from __future__ import annotations

import ast
import re
import tomllib
from collections import defaultdict
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version

from helpers.commands import ROOT, run_command
from slim.config import load_config

MAY_IMPORT = {
    "shards": set(),
    "slim": {"shards"},
    "launchers": {"slim", "shards"},
    "tools": {"launchers", "slim", "shards"},
}
OURS = set(MAY_IMPORT)
# The packages of each, in the order of the method: each imports only those before it.
ORDER = {
    "shards": ("core", "format", "cohorts", "preprocessing", "conversion", "reporting", "synthetic"),
    "slim": (
        *("model_settings", "config", "ranking", "model", "data", "checkpoints", "training", "pretrain", "planning"),
        *("inference", "evaluation", "brainmarks", "finetune", "explain", "reporting"),
    ),
    "launchers": (
        *(
            "environment",
            "arguments",
            "outcome",
            "run_probe",
            "job",
            "run_setup",
            "local",
            "conversion",
            "finetuning",
            "given_data",
        ),
        *("cluster", "experiments", "benches", "commands"),
    ),
}


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


def modules_imported(path: Path) -> set[str]:
    """Modules of this project that a file imports, anywhere in it: `slim.model.hiera`, also as `from slim.model`."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] in OURS:
            found |= {f"{node.module}.{name.name}" for name in node.names}
        elif isinstance(node, ast.Import):
            found |= {name.name for name in node.names if name.name.split(".")[0] in OURS}
    return found


@pytest.mark.parametrize("top", ORDER)
def test_packages_import_only_those_before_them(top: str) -> None:
    order, checked = ORDER[top], 0
    for path in (ROOT / top).rglob("*.py"):
        package = path.relative_to(ROOT / top).parts[0].removesuffix(".py")
        if package not in order:  # documented paths: a few lines each
            assert package in ("__init__", "features", "reader", "slurm"), path
            continue
        for module in modules_imported(path):
            _, other, *_ = [*module.split("."), ""]
            if module.startswith(f"{top}.") and other in order:
                assert order.index(other) <= order.index(package), f"{path} imports {module}"
                checked += 1
    assert checked > 40


def test_the_order_of_packages_is_drawn() -> None:
    page = (ROOT / "docs" / "contributing" / "architecture.md").read_text(encoding="utf-8")
    for top, packages in ORDER.items():
        assert f"**{top}**: {' → '.join(packages)}\n" in page


def test_inference_needs_nothing_of_training() -> None:
    code = (
        "import pkgutil, importlib, sys, slim.inference as package\n"
        "for module in pkgutil.iter_modules(package.__path__):\n"
        "    importlib.import_module(f'slim.inference.{module.name}')\n"
        "heavy = ('deepspeed', 'wandb', 'submitit', 'webdataset', 'slim.training', 'slim.pretrain', 'slim.planning')\n"
        "print(*sorted(name for name in heavy if name in sys.modules))"
    )
    done = run_command("-c", code)
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stdout + done.stderr


def test_no_test_imports_a_test() -> None:
    names = {path.stem for path in (ROOT / "tests").rglob("test_*.py")}
    for path in (ROOT / "tests").rglob("*.py"):
        assert not imports(path) & names, path
        assert "conftest" not in imports(path), path


def test_shards_needs_no_torch_but_for_the_stream() -> None:
    assert [path.name for path in (ROOT / "shards").rglob("*.py") if "torch" in imports(path)] == ["stream.py"]


def test_commands_load_what_takes_seconds_only_where_they_use_it() -> None:
    code = (
        "import sys, launchers.conversion, launchers.local, slim.inference.slim_brain\n"
        "print(*sorted({'nilearn', 'pandas', 'matplotlib', 'scipy.signal', 'sklearn', 'wandb'} & set(sys.modules)))"
    )
    done = run_command("-c", code)
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stderr


def test_each_class_has_a_name_of_its_own() -> None:
    """Of the three packages together; `Bench` is what `slim-brain bench` looks for in each module of `benches`."""
    places: dict[str, list[str]] = defaultdict(list)
    for package in ("shards", "slim", "launchers"):
        for path in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.ClassDef) and node.name != "Bench":
                    places[node.name].append(path.relative_to(ROOT).as_posix())
    assert len(places) > 200
    assert {name: found for name, found in places.items() if len(found) > 1} == {}


def test_untyped_trees_are_few() -> None:
    """`dict[str, Any]` is for trees of JSON and YAML that enter or leave, and for the states of optimizers."""
    packages = ("shards", "slim", "launchers", "tools")
    texts = [path.read_text(encoding="utf-8") for package in packages for path in (ROOT / package).rglob("*.py")]
    assert 0 < sum(text.count("dict[str, Any]") for text in texts) < 40


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


def test_the_custom_model_example_is_the_lean_preset() -> None:
    from shards.core.settings import load
    from slim.config import PRESETS, ModelSettings

    assert load(ModelSettings, ROOT / "configs" / "model" / "custom.yaml") == PRESETS["lean"]


def test_the_oldest_versions_that_are_tested_are_the_lower_bounds() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [line for line in (ROOT / "tests" / "oldest.txt").read_text().splitlines() if not line.startswith("#")]
    tested = {name: Version(version) for name, version in (line.split("==") for line in lines)}
    bounds = {}
    extras = project["optional-dependencies"]
    for text in [*project["dependencies"], *extras["train"], *extras["lora"], *extras["slurm"], *extras["report"]]:
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


def test_the_listing_of_packages_is_whole() -> None:
    rows = re.findall(r"^\| `([\w/]+)` \| (\d+) \| (\d+) \| (.*) \|$", (ROOT / "CONTRIBUTING.md").read_text(), re.M)
    assert {name for name, *_ in rows} == {
        folder.relative_to(ROOT).as_posix()
        for top in ("shards", "slim", "launchers")
        for folder in (ROOT / top, *(path.parent for path in (ROOT / top).glob("*/__init__.py")))
    }
    for name, files, lines, modules in rows:
        found = sorted(path for path in (ROOT / name).glob("*.py") if not path.stem.startswith("__"))
        assert modules.split(", ") == [path.stem for path in found] and int(files) == len(found), name
        count = sum(len(path.read_text(encoding="utf-8").splitlines()) for path in found)
        assert abs(count - int(lines)) <= max(200, count // 4), f"{name} has {count} lines"
