"""The wheel, installed outside the checkout: what is in it, the commands of the quickstart, the core, an upgrade."""

from __future__ import annotations

import json
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest

from helpers import wheels
from helpers.commands import ROOT
from helpers.wheels import Installed
from shards.cohorts.cohort_file import find_runs
from slim import SlimBrain, __version__

ARCHIVE = ROOT / "tests" / "artefacts" / "version_0_1.tar.xz"
# What a module of the version before becomes a package of, and a wheel of it that has nothing else.
BEFORE = {
    "pyproject.toml": '[build-system]\nrequires = ["setuptools"]\nbuild-backend = "setuptools.build_meta"\n'
    '[project]\nname = "slim-brain"\nversion = "0.1.0"\n'
    '[tool.setuptools.packages.find]\ninclude = ["slim*", "shards*", "launchers*"]\n',
    "slim/__init__.py": '__version__ = "0.1.0"\n',
    "slim/model.py": "VERSION = 1\n",
    "slim/plan.py": "VERSION = 1\n",
    "shards/__init__.py": "",
    "shards/convert.py": "VERSION = 1\n",
    "launchers/__init__.py": "",
    "launchers/slurm.py": "VERSION = 1\n",
}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return wheels.build(tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def core(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Installed:
    """With the core alone."""
    return Installed(tmp_path_factory.mktemp("core") / "venv", [wheel], core=True)


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export of version 0.1."""
    folder = tmp_path_factory.mktemp("old")
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(folder, filter="data")
    return folder / "export"


def test_the_wheel_holds_the_packages_their_data_and_the_command(wheel: Path) -> None:
    assert wheel.name == f"slim_brain-{__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if ".dist-info/" not in name]
        scripts = archive.read(f"slim_brain-{__version__}.dist-info/entry_points.txt").decode()
        shipped = {name: archive.read(name) for name in names if name.startswith("shards/configs/")}
    assert scripts.splitlines() == ["[console_scripts]", "slim-brain = launchers.commands.__main__:console"]
    configs = {path.relative_to(ROOT): path for path in (ROOT / "configs").rglob("*.yaml")}
    assert shipped == {f"shards/{name}": path.read_bytes() for name, path in configs.items()}
    expected = {path.relative_to(ROOT) for top in ("slim", "shards", "launchers") for path in (ROOT / top).rglob("*")}
    expected = {str(path) for path in expected if path.suffix == ".py" or path.parent.name == "templates"}
    expected |= {f"{top}/py.typed" for top in ("slim", "shards", "launchers")}
    expected = {name.removeprefix("slim/brainmarks/plugin/") for name in expected}
    assert set(names) == expected | set(shipped)


def test_the_command_finds_itself_and_what_ships(core: Installed, tmp_path: Path) -> None:
    assert core.slim_brain("--version", cwd=tmp_path) == f"slim-brain {__version__}\n"
    facts = json.loads(core.slim_brain("config", "--list", "--json", cwd=tmp_path).splitlines()[-1])
    paths = [Path(one["path"]) for ones in facts.values() for one in ones]
    assert len(paths) == len([*(ROOT / "configs").rglob("*.yaml")])
    assert all(path.is_relative_to(core.folder) for path in paths)
    text = core.slim_brain("config", "show", "task", "hcp_sex", cwd=tmp_path)
    assert text == (ROOT / "configs/downstream/hcp_sex.yaml").read_text()
    assert "next: slim-brain pretrain tiny " in core.slim_brain("plan", "tiny", "run.batch=1", cwd=tmp_path)


def test_the_core_embeds_a_scan_and_reads_a_dataset(
    core: Installed, export: Path, cohort: Path, dataset: Path, tmp_path: Path
) -> None:
    bold = find_runs(cohort / "cohort.yaml")[0].bold
    core.slim_brain("embed", export, bold, "--out", "vectors.npz", cwd=tmp_path)
    with np.load(tmp_path / "vectors.npz") as found:
        np.testing.assert_array_equal(found["vectors"], SlimBrain.from_pretrained(export).encode(bold))
    code = (
        "import shards.reader, sys; data = shards.reader.Dataset(sys.argv[1]);"
        "print(shards.reader.__file__, len(data.sessions), data.read(data.sessions[0])['windows'].shape[0])"
    )
    done = core.run("python", "-c", code, dataset, cwd=tmp_path)
    file, sessions, windows = done.stdout.split()
    assert Path(file).is_relative_to(core.folder) and (int(sessions), int(windows)) == (6, 12), done.stderr
    done = core.run("slim-brain", "pretrain", "tiny", f"data={dataset}", cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "pip install 'slim-brain[train]'" in done.stderr


def test_an_upgrade_leaves_nothing_of_the_version_before(
    wheel: Path, export: Path, cohort: Path, tmp_path: Path
) -> None:
    for name, text in BEFORE.items():
        path = tmp_path / "source" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    before = wheels.build_from(tmp_path / "source", tmp_path)
    old = Installed(tmp_path / "old", [before])
    code = "import slim, slim.model, slim.plan; print(slim.__version__, slim.model.VERSION)"
    assert old.run("python", "-c", code, cwd=tmp_path).stdout == "0.1.0 1\n"
    assert not (old.folder / "bin/slim-brain").exists()

    new = Installed(tmp_path / "new", [before, wheel])
    assert new.slim_brain("--version", cwd=tmp_path) == f"slim-brain {__version__}\n"
    code = "import slim.model.hiera, importlib.metadata as about; print(about.version('slim-brain')); import slim.plan"
    done = new.run("python", "-c", code, cwd=tmp_path)
    assert done.stdout == f"{__version__}\n" and "No module named 'slim.plan'" in done.stderr
    (packages,) = new.folder.glob("lib/python*/site-packages")
    assert not (packages / "slim/model.py").exists() and not (packages / "shards/convert.py").exists()
    assert len([*packages.glob("slim_brain-*.dist-info")]) == 1
    bold = find_runs(cohort / "cohort.yaml")[0].bold
    assert "vectors" in new.slim_brain("embed", export, bold, "--out", "z.npz", cwd=tmp_path)


@pytest.mark.slow
def test_the_commands_of_the_quickstart(wheel: Path, tmp_path: Path) -> None:
    """Those of `make quickstart`, smaller."""
    installed = Installed(tmp_path / "venv", [wheel])
    here = tmp_path / "work"
    here.mkdir()
    size = ("--subjects", 8, "--sessions", 2, "--frames", 60, "--voxel-mm", 16)
    text = installed.slim_brain("make-cohort", "--out", "cohort", *size, cwd=here)
    assert "next: slim-brain make-shards cohort/cohort.yaml --out cohort-shards" in text
    grid = ("grid.mm=16", "grid.shape=[16,16,16]", "extractor.steps=3")
    installed.slim_brain("make-shards", "cohort/cohort.yaml", "--out", "shards", *grid, cwd=here)
    size = ("data=shards", "run.out=pretrain", "run.steps=4", "run.checkpoint_every=4")
    installed.slim_brain("pretrain", "quickstart", *size, cwd=here)
    tasks = [word for name in ("group", "score", "fingerprint") for word in ("--task", f"synthetic_{name}")]
    words = ("pretrain", "--data", "shards", "--random-seeds", 1, *tasks, "--json")
    report = json.loads(installed.slim_brain("probe", *words, cwd=here).splitlines()[-1])
    assert set(report["tasks"]) == {"synthetic_group", "synthetic_score", "synthetic_fingerprint"}
    installed.slim_brain("report", "pretrain", cwd=here)
    assert (here / "pretrain/report/index.html").stat().st_size > 10_000
    assert (here / "shards/report/index.html").stat().st_size > 10_000


@pytest.mark.slow
def test_what_pip_installs_for_the_core_is_enough(wheel: Path, export: Path, cohort: Path, tmp_path: Path) -> None:
    """A real installation of the wheel and its dependencies at the tested versions; no package of an extra is there."""
    installed = Installed(tmp_path / "venv", [], alone=True)
    installed.pip("install", "--quiet", "-c", ROOT / "constraints.txt", wheel)
    found = {line.partition("==")[0].lower() for line in installed.frozen()}
    assert "torch" in found and not {"deepspeed", "webdataset", "wandb", "submitit", "matplotlib", "pillow"} & found
    bold = find_runs(cohort / "cohort.yaml")[0].bold
    installed.slim_brain("embed", export, bold, "--out", "vectors.npz", cwd=tmp_path)
    with np.load(tmp_path / "vectors.npz") as vectors:
        np.testing.assert_allclose(vectors["vectors"], SlimBrain.from_pretrained(export).encode(bold), atol=1e-6)
    installed.slim_brain("make-cohort", "--out", "c", "--subjects", 1, "--sessions", 1, "--frames", 20, cwd=tmp_path)
    assert "next: slim-brain pretrain tiny " in installed.slim_brain("plan", "tiny", "run.batch=1", cwd=tmp_path)
