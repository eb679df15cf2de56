"""The model in the real suite: `make test-brainmarks` installs it and runs this file."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from helpers import brainmarks
from helpers.in_process import call_command
from helpers.pretrained import ALIGNED, write_run
from shards.cohorts.cohort_file import find_runs
from slim.inference.slim_brain import SlimBrain

FRAMES = 30
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


def evaluate(module: str, *words: object, export: Path, data: Path, home: Path, cwd: Path) -> tuple[str, pd.DataFrame]:
    """What an evaluation prints, and its table."""
    common = (f"model_kwargs.source={export}", "device=cpu", "amp=false", "num_workers=2", "batch_size=4")
    done = call(
        module,
        *(words[: words.index("--")]),
        "--overrides",
        *common,
        *(words[words.index("--") + 1 :]),
        cwd=cwd,
        PYTHONPATH=data / "plugin",
        SYNTHETIC_ROOT=data,
        TEMPLATEFLOW_HOME=home,
        HF_DATASETS_CACHE=cwd / "cache",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (table,) = cwd.rglob("eval_table.csv")
    return done.stdout, pd.read_csv(table)


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
def test_logistic_regression_gives_its_table(
    representation: str, export: Path, data: Path, home: Path, tmp_path: Path
) -> None:
    words = ("slim_brain", representation, "synthetic_group", "--", "n_trials=2", "cv_folds=2", "Cs=3")
    text, table = evaluate("main_logistic", *words, export=export, data=data, home=home, cwd=tmp_path)
    assert table["split"].tolist() == ["train", "test"] * 3 and set(table["repr"]) == {representation}
    assert table[["acc", "f1", "bacc"]].stack().between(0, 1).all() and np.isfinite(table["C"]).all()
    channels = SlimBrain.from_pretrained(export).encoder.dim
    shape = re.search(r"train features: \((\d+), (\d+)\)", text)
    assert shape is not None and int(shape[1]) == SPLITS["train"]
    assert (int(shape[2]) == channels) == (representation == "patch")


def test_the_attention_probe_gives_its_table(export: Path, data: Path, home: Path, tmp_path: Path) -> None:
    short = ("epochs=1", "warmup_epochs=0", "steps_per_epoch=3", "accum_iter=1", "lr_scale_grid=[0.1,1.0]")
    width = "classifier_kwargs.embed_dim=64"  # its heads have 64 channels, the encoder of this test 32
    words = ("slim_brain", "patch", "attn", "synthetic_group", "--", *short, width)
    memory = f"model_kwargs.memory={tmp_path / 'memory'}"
    _, table = evaluate("main_probe", *words, memory, export=export, data=data, home=home, cwd=tmp_path)
    assert {"train", "validation", "test"} <= set(table["split"]) and table["acc"].between(0, 1).all()
    assert len([*(tmp_path / "memory").rglob("output.pkl")]) == PEOPLE  # each scan was converted once


def test_fine_tuning_with_lora_gives_its_table(export: Path, data: Path, home: Path, tmp_path: Path) -> None:
    short = ("epochs=1", "warmup_epochs=0", "steps_per_epoch=2", "accum_iter=1")
    words = ("slim_brain", "patch", "linear", "synthetic_group", "--", *short)
    memory = f"model_kwargs.memory={tmp_path / 'memory'}"
    _, table = evaluate("main_finetune", *words, memory, export=export, data=data, home=home, cwd=tmp_path)
    assert {"train", "validation", "test"} <= set(table["split"]) and table["acc"].between(0, 1).all()
