"""Wheels of this project, and environments that they are installed in, outside the checkout."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Sequence
from pathlib import Path

from helpers.commands import ROOT
from shards.core.extras import EXTRAS

_SOURCES = ("pyproject.toml", "README.md", "LICENSE", "slim", "shards", "launchers", "configs")
_BLOCK = "import sys; sys.modules.update(dict.fromkeys({names!r}))"  # None: it cannot be imported


def build(out: Path) -> Path:
    """The wheel of this checkout, built from a copy of its sources."""
    source = out / "source"
    source.mkdir(parents=True)
    for name in _SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, source / name)
    return build_from(source, out)


def build_from(source: Path, out: Path) -> Path:
    """The wheel of a folder with a pyproject.toml."""
    words = ["wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", out, source]
    _succeed([sys.executable, "-m", "pip", *words])
    (wheel,) = out.glob("*.whl")
    return wheel


class Installed:
    """An environment of its own with wheels of this project.

    Parameters
    ----------
    folder : Path
    wheels : sequence of Path
        Installed one after the other, without what they depend on.
    core : bool
        Packages of extras cannot be imported.
    alone : bool
        Nothing but what is installed here can be imported; else packages of the environment of the tests, too.
    """

    def __init__(self, folder: Path, wheels: Sequence[Path], *, core: bool = False, alone: bool = False):
        venv.create(folder, with_pip=False, symlinks=True)
        self.folder, self.python = folder, folder / "bin" / "python"
        for wheel in wheels:
            self.pip("install", "--no-deps", "--upgrade", wheel)
        packages = self._packages()
        if not alone:  # after the wheels: pip would find the version that the tests run from
            (packages / "others.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
        if core:
            (packages / "without_extras.pth").write_text(_BLOCK.format(names=sorted(EXTRAS)) + "\n")

    def _packages(self) -> Path:
        (found,) = self.folder.glob("lib/python*/site-packages")
        return found

    def pip(self, *words: object) -> str:
        return _succeed([sys.executable, "-m", "pip", "--python", self.python, *words])

    def frozen(self) -> list[str]:
        """What is installed, `NAME==VERSION` each."""
        return self.pip("freeze", "--all").splitlines()

    def run(self, *words: object, cwd: Path, **variables: str) -> subprocess.CompletedProcess:
        """A program of this environment, which is installed outside the checkout."""
        environment = {name: value for name, value in os.environ.items() if not re.match("PYTHON|VIRTUAL_ENV", name)}
        environment |= {"PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
        environment |= {"CUDA_VISIBLE_DEVICES": "", **variables}
        program, *rest = map(str, words)
        return subprocess.run(
            [str(self.folder / "bin" / program), *rest], cwd=cwd, env=environment, capture_output=True, text=True
        )

    def slim_brain(self, *words: object, cwd: Path) -> str:
        """What `slim-brain` prints, where it succeeds."""
        done = self.run("slim-brain", *words, cwd=cwd)
        assert done.returncode == 0, f"slim-brain {' '.join(map(str, words))}\n{done.stdout}{done.stderr}"
        return done.stdout


def _succeed(call: Sequence[object]) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([*map(str, call)], env=environment, cwd="/", capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
