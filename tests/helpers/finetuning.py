"""A small fine-tuning by its command."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from helpers.commands import Command
from helpers.pretrained import ALIGNED, write_run
from shards.core import files
from shards.format import layout

SCORE = {
    "name": "s",
    "type": "regression",
    "label": "score",
    "bootstrap": 100,
    "split": {"kind": "holdout", "shares": [0.5, 0.2, 0.3], "repeats": 2},
}


@pytest.fixture(scope="module")
def people(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small cohort, four of its six people a second time under other names and with other scores."""
    folder = tmp_path_factory.mktemp("people") / "shards"
    shutil.copytree(dataset, folder)
    sessions = layout.read_lines(folder / layout.SESSIONS)
    for number, session in enumerate(sessions[:4]):
        name = f"sub-1{number}"
        labels = session["labels"] | {"score": session["labels"]["score"] + number - 1.5}
        sessions.append(session | {"key": f"synthetic_{name}", "subject": name, "labels": labels})
    files.write_atomically(folder / layout.SESSIONS, files.dump_lines(sessions))
    manifest = layout.read_manifest(folder)
    manifest["sessions"]["train"] += 4
    files.write_atomically(folder / layout.MANIFEST, files.dump(manifest))
    return folder


@pytest.fixture(scope="module")
def pretrained(people: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("pretrained") / "run", people, ALIGNED)


def write_task(folder: Path, **changes: Any) -> Path:
    path = folder / "task.yaml"
    path.write_text(json.dumps(SCORE | changes))
    return path


def finetune(pretrained: Path, people: Path, out: Path, **changes: Any) -> list[str]:
    task = write_task(out.parent, **changes)
    words = ["tools/finetune.py", pretrained, "--data", people, "--task", task, "--out", out, "--json"]
    return [*map(str, words), *QUICK, "run.epochs=3", "run.processes=2"]


def lines(out: Path, number: int = 0) -> list[dict]:
    path = out / "finetune" / "s-finetuned" / f"seed-{number}" / "metrics.jsonl"
    text = path.read_text().splitlines() if path.exists() else []
    kept = ("step", "epoch", "loss", "lr", "grad_norm", "val_loss", "best_step")
    return [{name: json.loads(line).get(name) for name in kept} for line in text if line.endswith("}")]


@pytest.fixture(scope="module")
def whole(
    command: Command, pretrained: Path, people: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict]:
    """Two fine-tunings of three epochs in two processes, and what the command says of them."""
    out = tmp_path_factory.mktemp("whole") / "out"
    done = command(*finetune(pretrained, people, out))
    assert done.returncode == 0, done.stderr
    return out, json.loads(done.stdout.splitlines()[-1])


QUICK = ("run.wandb=disabled", "precision=fp32", "run.batch=2", "run.workers=0", "run.device=cpu")
