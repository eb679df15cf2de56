"""What version 0.1 wrote is read by this one: a dataset, a run with its checkpoint, an export, a fine-tuned run."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import numpy as np
import pytest

from helpers.commands import ROOT, Command
from helpers.pretrained import tool
from shards.format.reader import Dataset
from slim import SlimBrain

ARCHIVE = ROOT / "tests" / "artefacts" / "version_0_1.tar.xz"
FINETUNED = "finetuned/finetune/score-finetuned/seed-0"


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("old")
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(folder, filter="data")
    return folder


# As the version that wrote them read them: the mean absolute value of the windows of each session; of the first session
# the first token of the last stage, by each kind of weights.
WINDOWS = (0.016508, 0.015735, 0.016597, 0.015933, 0.014728, 0.016424, 0.01625, 0.015521, 0.016664, 0.015569)
PRETRAINED = (-0.298202, 1.670365, 0.683579, -0.528568)
TOKENS = {"run": PRETRAINED, "export": PRETRAINED, FINETUNED: (-0.303032, 1.667001, 0.684881, -0.534763)}


def test_the_dataset_is_read_to_the_last_window(old: Path) -> None:
    dataset = Dataset(old / "dataset")
    means = [float(np.abs(dataset.read(session)["windows"].astype(float)).mean()) for session in dataset.sessions]
    assert dataset.grid.mm == 16 and means == pytest.approx(WINDOWS, abs=1e-6)


@pytest.mark.parametrize("name", TOKENS)
def test_weights_encode_as_they_did(name: str, old: Path) -> None:
    model, dataset = SlimBrain.from_pretrained(old / name), Dataset(old / "dataset")
    features = model.encode_session(dataset, dataset.sessions[0])
    assert model.step == 3 and features.tokens[0, 0, :4] == pytest.approx(TOKENS[name], abs=1e-3)


@pytest.mark.parametrize("name", TOKENS)
def test_scans_are_ranked_as_they_were(name: str, old: Path) -> None:
    ranker = SlimBrain.from_pretrained(old / name).recipe.ranker
    dataset = Dataset(old / "dataset")
    assert ranker.version == 1 and ranker.identity() == dataset.manifest.ranker
    for session in dataset.sessions:
        arrays = dataset.read(session, ("roi", "roi_centre", "scores"))
        scores_W = ranker.scores(arrays["roi"], arrays["roi_centre"], 5)
        assert scores_W == pytest.approx(arrays["scores"], abs=1e-3)


def test_the_run_is_extended_from_its_checkpoint(old: Path, command: Command) -> None:
    words = (f"data={old / 'dataset'}", f"model={old / 'model.yaml'}", f"run.out={old / 'run'}")
    (old / "model.yaml").write_text(
        "{embed: 16, heads: 1, depths: [1, 1], unit: [5, 2, 2, 2], strides: [[5, 1, 1, 1]], local_stages: 1,"
        " predictor: {width: 16, depth: 1, heads: 1}}"
    )
    more = ("run.steps=5", "run.extend=constant", "run.processes=2", "run.batch=2", "run.workers=0")
    done = command(
        "tools/pretrain.py", "configs/pretrain/tiny.yaml", *words, *more, "run.wandb=disabled", "loss.sig_samples=2"
    )
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (old / "run/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]
    assert all(np.isfinite(line["loss"]) for line in lines)


def test_pages_are_drawn(old: Path) -> None:
    for name in ("dataset", "run", FINETUNED):
        assert tool("report.py", old / name).returncode == 0
        assert (old / name / "report" / "index.html").stat().st_size > 10_000
