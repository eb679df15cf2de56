"""The data of the gallery's examples: what `make quickstart` left, or else a smaller copy of it that is made here."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
# As in the Makefile's quickstart, with fewer steps: the examples show how things are done, not how well.
_STEPS = (
    "make-cohort --out {out}/cohort",
    "make-shards {out}/cohort/cohort.yaml --out {out}/shards grid.mm=8 grid.shape=[24,24,24] extractor.steps=50",
    "pretrain quickstart data={out}/shards run.out={out}/pretrain run.steps=40 run.processes=1 run.workers=0 "
    "run.wandb=disabled",
)


def quickstart_folder() -> Path:
    """The folder with `cohort`, `shards` and `pretrain`."""
    whole = ROOT / "runs" / "quickstart"
    if _is_complete(whole):
        return whole
    small = ROOT / "docs" / "_build" / "quickstart"
    if not _is_complete(small):
        for step in _STEPS:
            call = [word.format(out=small) for word in step.split()]
            print("slim-brain", *call, flush=True)
            subprocess.run([sys.executable, "-m", "launchers.commands", *call], cwd=ROOT, check=True)
    return small


def _is_complete(folder: Path) -> bool:
    return (folder / "pretrain" / "checkpoints" / "latest").exists() and (folder / "shards" / "manifest.json").exists()
