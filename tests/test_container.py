"""The Containerfile: its steps are those of the README, and they work in a fresh Debian."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import pytest

from helpers.commands import ROOT
from helpers.containers import Root, steps

STEPS = steps((ROOT / "Containerfile").read_text(encoding="utf-8"))
# What a user types where a container has an instruction of its own.
TYPED = {
    "COPY . /slim-brain": "git clone <this repository> slim-brain",
    "WORKDIR /slim-brain": "cd slim-brain",
    "ENV PATH=/slim-brain/.venv/bin:$PATH": "source .venv/bin/activate",
}


@pytest.mark.fast
def test_the_steps_are_those_of_the_readme() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8").partition("## Install")[2]
    block = text.partition("```bash\n")[2].partition("```")[0]
    typed = re.sub(r"\s+#.*", "", block).replace("sudo ", "").replace("\n", " && ").split(" && ")
    inner = [step for step in STEPS if step[0] not in ("FROM", "ENTRYPOINT")]
    found = [arguments if name == "RUN" else TYPED[f"{name} {arguments}"] for name, arguments in inner]
    assert " && ".join(found).split(" && ") == [line.strip() for line in typed if line.strip()]
    assert STEPS[0][0] == "FROM" and STEPS[-1] == ("ENTRYPOINT", '["slim-brain"]')


@pytest.mark.fast
def test_nothing_that_is_made_here_is_copied() -> None:
    kept = {line.rstrip("/") for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()}
    made = (ROOT / ".gitignore").read_text(encoding="utf-8").split()
    assert {".venv*", "runs", "build", "dist", "wandb", "docs/_build"} <= kept & {line.rstrip("/") for line in made}


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("debootstrap"), reason="needs root, and debootstrap")
def test_the_steps_work_in_a_fresh_debian(tmp_path: Path) -> None:
    """In a root made by debootstrap, of the release that the Containerfile names, with nothing of this machine."""
    suite = re.fullmatch(r"debian:(\w+)-slim", STEPS[0][1])
    assert suite is not None
    root = Root(tmp_path / "root", suite[1])
    with root.mounted():
        for name, arguments in STEPS:
            root.follow(name, arguments)
        from slim import __version__

        assert root.run("slim-brain --version") == f"slim-brain {__version__}\n"
        root.run("cd /tmp && slim-brain make-cohort --out c --subjects 4 --sessions 2 --frames 60 --voxel-mm 16")
        size = "grid.mm=16 grid.shape=[16,16,16] extractor.steps=3"
        root.run(f"cd /tmp && slim-brain make-shards c/cohort.yaml --out s {size}")
        root.run("cd /tmp && slim-brain pretrain tiny data=s run.out=r run.steps=2 run.batch=2 run.workers=0")
        root.run("cd /tmp && slim-brain export r --out e")
        root.run("cd /tmp && slim-brain embed e $(find c -name '*_bold.nii.gz' | head -1) --out z.npz")
        assert (root.folder / "tmp/z.npz").stat().st_size > 1000
