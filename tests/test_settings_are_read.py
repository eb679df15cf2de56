"""Every setting has an effect on something: a field that is checked and never read is a promise that is not kept."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest

from helpers.commands import GRID, ROOT, run_command
from helpers.conversions import edited
from helpers.finetuning import QUICK, SCORE, people, write_task
from launchers.cluster.scheduler import SlurmSettings
from shards.cohorts.cohort_file import CohortSettings
from shards.conversion.settings import ConvertSettings
from slim.config import FinetuneSettings, PretrainSettings

__all__ = ["people"]  # a fixture

MODELS = (PretrainSettings, FinetuneSettings, ConvertSettings, CohortSettings, SlurmSettings)


def fields(model: Any, known: set[Any]) -> Iterator[str]:
    """`Class.field` of a model and of all that it holds; the class is the one that has the field first."""
    if model in known or not hasattr(model, "model_fields"):
        for part in get_args(model):
            yield from fields(part, known)
        return
    known.add(model)
    for name, field in model.model_fields.items():
        owner = next(one for one in reversed(model.__mro__) if name in getattr(one, "__pydantic_fields__", ()))
        yield f"{owner.__name__}.{name}"
        yield from fields(field.annotation, known)


@pytest.fixture(scope="module")
def read(cohort: Path, people: Path, tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """Fields that are read from a conversion to the answers of a fine-tuned export, and by a script of SLURM."""
    folder = tmp_path_factory.mktemp("read")
    (folder / "noted").mkdir()
    path = f"{ROOT / 'tests' / 'helpers' / 'reads'}:{ROOT}"
    run, task = folder / "run", write_task(folder, split=SCORE["split"] | {"repeats": 1})

    def call(*words: object, **environment: str) -> None:
        done = run_command(*words, timeout=900, PYTHONPATH=path, NOTED_READS=str(folder / "noted"), **environment)
        assert done.returncode == 0, done.stderr

    by_pattern = {
        "name": "p",
        "root": str(cohort),
        "layout": "pattern",
        "pattern": "sub-{subject}/*/func/*_bold.nii.gz",
    }
    (folder / "pattern.yaml").write_text(json.dumps(by_pattern))
    call("tools/make_shards.py", folder / "pattern.yaml", "--out", folder / "none", "--dry-run", *GRID)
    words = ("--workers", 1, "extractor.steps=2", *GRID)
    call("tools/make_shards.py", cohort / "cohort.yaml", "--out", folder / "shards", *words)
    few = ("windows.k=2", "windows.best=4", "run.epochs=2", *QUICK)
    call("tools/plan.py", "configs/pretrain/tiny.yaml", f"data={people}", *few)
    for more in ((), ("run.epochs=3", "run.extend=constant")):
        call("tools/pretrain.py", "configs/pretrain/tiny.yaml", f"data={people}", f"run.out={run}", *few, *more)

    def divide(session: dict[str, Any]) -> list[dict[str, Any]]:
        return [session | {"split": "val" if session["subject"][-1] in "123" else "train"}]

    divided = edited(people, folder / "divided", divide)
    probed = (f"run.probe.task={task}", "run.probe.every=1", "run.checkpoint_every=1", "run.probe.subjects=5")
    begun = ("windows.k=3", "windows.best=4", "run.steps=1", *QUICK, f"init={run}", "init.positions=resample", *probed)
    call(
        "tools/pretrain.py",
        "configs/pretrain/tiny.yaml",
        f"data={divided}",
        f"run.out={folder / 'second'}",
        *begun,
        *probed,
    )
    for pooling, more in (("cov", ()), ("attentive", ("freeze=1", "lora.rank=2"))):
        words = ("--data", people, "--task", task, "--out", folder / pooling, f"head.pooling={pooling}", *more)
        call("tools/finetune.py", run, *words, "run.epochs=1", *QUICK)
    tuned = folder / "cov" / "finetune" / "s-finetuned" / "seed-0"
    call("tools/export.py", tuned, "--out", folder / "export")
    scan = next(cohort.rglob("*_bold.nii.gz"))
    call("tools/embed.py", folder / "export", scan, "--out", folder / "vectors.npz")
    nodes = ("--nodes", 1, "--gpus-per-node", 1, "--dry-run")
    on_cluster = ("configs/pretrain/tiny.yaml", f"data={people}", f"run.out={folder / 'job'}", *nodes)
    call("launchers/slurm.py", "pretrain", *on_cluster, PATH="")  # no sbatch is asked
    return {line for file in (folder / "noted").iterdir() for line in file.read_text().split()}


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_every_field_of_the_settings_is_read(model: type, read: set[str]) -> None:
    assert set(fields(model, set())) - read == set()
