"""The model in the real suite: `make test-brainmarks` installs it and runs this file."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from helpers import brainmarks
from helpers.in_process import call_command
from helpers.pretrained import ALIGNED, write_run
from shards.cohorts.cohort_file import find_runs
from slim.inference.slim_brain import SlimBrain

FRAMES = 20
SPLITS = {"train": 10, "validation": 6, "test": 8}  # people
PEOPLE = sum(SPLITS.values())

# A dataset of the suite, which finds it as it finds the model: in its namespace package, on the path.
DATASET = """
from brainmarks.datasets.base import HFDataset, get_dataset_root, load_arrow_dataset
from brainmarks.datasets.registry import register_dataset

ROOT = get_dataset_root("synthetic")


@register_dataset
def synthetic_group(space: str, **kwargs):
    folder = f"{ROOT}/synthetic.{space}.arrow"
    splits = ("train", "validation", "test")
    return {name: HFDataset(load_arrow_dataset(f"{folder}/{name}", **kwargs), target_key="group") for name in splits}
"""


def _installed() -> bool:
    """Whether the suite itself is there; the plugin alone makes `brainmarks` a package, too."""
    try:
        return importlib.util.find_spec("brainmarks.models.registry") is not None
    except ModuleNotFoundError:
        return False


pytestmark = pytest.mark.skipif(not _installed(), reason="needs brainmarks: make test-brainmarks")


@pytest.fixture(scope="module")
def export(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("suite")
    return SlimBrain.from_pretrained(write_run(folder / "run", dataset, ALIGNED)).save_pretrained(folder / "export")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of templateflow, with a mask of few voxels."""
    return brainmarks.write_template(tmp_path_factory.mktemp("few") / "templateflow")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The synthetic cohort as a dataset of the suite: samples in Arrow files, and the module that registers them."""
    from datasets import Array2D, Dataset, Features, Value

    folder = tmp_path_factory.mktemp("data")
    words = ("--subjects", PEOPLE, "--sessions", 1, "--frames", FRAMES, "--voxel-mm", 16)
    done = call_command("tools/make_cohort.py", "--out", folder / "cohort", *words)
    assert done.returncode == 0, done.stderr
    mask_XYZ, wide = brainmarks.template().mask_XYZ, brainmarks.FEW
    kinds = {"bold": Array2D((FRAMES, wide), "float16"), "tr": Value("float32"), "group": Value("int32")}
    kinds |= {name: Array2D((1, wide), "float32") for name in ("mean", "std")}
    runs = iter(find_runs(folder / "cohort" / "cohort.yaml"))
    for split, people in SPLITS.items():
        rows = []
        for run in (next(runs) for _ in range(people)):
            value_TV = brainmarks.flat(brainmarks.on_template(run.bold), mask_XYZ)
            rows.append(brainmarks.sample(value_TV, 0.72, group=int(run.labels["group"] == "B")))
        assert {row["group"] for row in rows} == {0, 1}
        made = Dataset.from_list(rows, features=Features(kinds))
        made.save_to_disk(folder / "synthetic.mni.arrow" / split)
    plugin = folder / "plugin" / "brainmarks" / "datasets" / "synthetic.py"
    plugin.parent.mkdir(parents=True)
    plugin.write_text(DATASET)
    return folder


def call(module: str, *words: object, cwd: Path, **variables: object) -> subprocess.CompletedProcess:
    """A module of the suite, from a folder that is not the checkout."""
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "SLIM_BRAINMARKS_SOURCE")}
    quiet = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled"}
    environment = kept | quiet | {name: str(value) for name, value in variables.items()}
    words = (sys.executable, "-m", f"brainmarks.{module}", *map(str, words))
    return subprocess.run(words, cwd=cwd, env=environment, capture_output=True, text=True, timeout=1200)


@pytest.fixture
def evaluate(export: Path, data: Path, home: Path, tmp_path: Path) -> Callable[..., tuple[str, pd.DataFrame]]:
    """Evaluate a representation of the synthetic cohort: what the suite prints, and its table."""

    def evaluated(module: str, *words: str, **overrides: object) -> tuple[str, pd.DataFrame]:
        kwargs = {"source": export, "memory": data / "memory"}
        overrides |= {"device": "cpu", "amp": "false", "num_workers": 2, "batch_size": 4}
        given = [f"{name}={value}" for name, value in overrides.items()]
        given += [f"model_kwargs.{name}={value}" for name, value in kwargs.items()]
        places = {"PYTHONPATH": data / "plugin", "SYNTHETIC_ROOT": data, "TEMPLATEFLOW_HOME": home}
        words = ("slim_brain", *words, "synthetic_group", "--overrides", *given)
        done = call(module, *words, cwd=tmp_path, HF_DATASETS_CACHE=tmp_path / "cache", **places)
        assert done.returncode == 0, done.stdout + done.stderr
        (table,) = tmp_path.rglob("eval_table.csv")
        return done.stdout, pd.read_csv(table)

    return evaluated


def test_the_smoke_test_of_the_suite_passes(export: Path, tmp_path: Path) -> None:
    """Two scans of 16 and of 160 frames of noise, on as many voxels as the template has."""
    home = brainmarks.write_template(tmp_path / "templateflow", brainmarks.VOXELS)
    done = call("models.test_models", "slim_brain", cwd=tmp_path, TEMPLATEFLOW_HOME=home, SLIM_BRAINMARKS_SOURCE=export)
    assert re.search(r"\b2 passed\b", done.stdout) and "failed" not in done.stdout, done.stdout + done.stderr


def test_without_a_source_one_line_says_what_to_do(tmp_path: Path, home: Path, data: Path) -> None:
    words = ("slim_brain", "patch", "synthetic_group", "--overrides", "device=cpu")
    done = call("main_logistic", *words, cwd=tmp_path, TEMPLATEFLOW_HOME=home, PYTHONPATH=data / "plugin")
    assert done.returncode == 2 and done.stderr.endswith("or set SLIM_BRAINMARKS_SOURCE\n"), done.stderr
    assert "Traceback" not in done.stderr and "error: model_kwargs: source: got nothing" in done.stderr


@pytest.mark.parametrize("representation", ["patch", "cls"])
def test_logistic_regression_gives_its_table(representation: str, evaluate, export: Path) -> None:
    text, table = evaluate("main_logistic", representation, n_trials=2, cv_folds=2, Cs=3)
    assert table["split"].tolist() == ["train", "test"] * 3 and set(table["repr"]) == {representation}
    assert table[["acc", "f1", "bacc"]].stack().between(0, 1).all() and np.isfinite(table["C"]).all()
    channels = SlimBrain.from_pretrained(export).encoder.dim
    shape = re.search(r"train features: \((\d+), (\d+)\)", text)
    assert shape is not None and int(shape[1]) == SPLITS["train"]
    assert (int(shape[2]) == channels) == (representation == "patch")


def test_the_attention_probe_gives_its_table(evaluate, data: Path) -> None:
    short = {"epochs": 1, "warmup_epochs": 0, "steps_per_epoch": 3, "accum_iter": 1, "lr_scale_grid": "[0.1,1.0]"}
    heads = {"classifier_kwargs.embed_dim": 64}  # one head of the probe; the encoder of this test has 32 channels
    _, table = evaluate("main_probe", "patch", "attn", **short, **heads)
    assert {"train", "validation", "test"} <= set(table["split"]) and table["acc"].between(0, 1).all()
    assert len([*(data / "memory").rglob("output.pkl")]) == PEOPLE  # each scan was converted once, by whichever test


def test_fine_tuning_with_lora_gives_its_table(evaluate) -> None:
    _, table = evaluate("main_finetune", "patch", "linear", epochs=1, warmup_epochs=0, steps_per_epoch=2, accum_iter=1)
    assert {"train", "validation", "test"} <= set(table["split"]) and table["acc"].between(0, 1).all()
