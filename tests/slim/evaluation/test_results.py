"""The report of probes on disk: read as it stands, and written with the same fields as by version 0.1."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helpers.commands import ROOT
from helpers.tasks import SCORE, cases_of, sessions, task
from slim.checkpoints.run_folder import PROBE
from slim.evaluation import probe
from slim.evaluation.linear import Linear
from slim.evaluation.results import Estimate, Report

pytestmark = pytest.mark.fast


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """A folder with a report of version 0.1, whose R² has an end of 4.8e15."""
    with tarfile.open(ROOT / "tests" / "artefacts" / "version_0_1.tar.xz") as archive:
        archive.extract("finetuned/report.json", tmp_path, filter="data")
    return tmp_path / "finetuned"


def test_a_report_of_version_0_1_is_read_and_written_to_the_byte(old: Path, tmp_path: Path) -> None:
    report = Report.read(old / PROBE)
    result = report.results["score"]
    assert (result.facts.type, result.facts.pooling, result.facts.test_subjects) == ("regression", "cov", 3)
    assert result.facts.split is not None and result.facts.split.kind == "holdout"
    found = result.estimate("finetuned", "mse")
    assert found is not None and found.interval == pytest.approx((0.142758, 2.134833), abs=1e-6)
    (tmp_path / "copy").mkdir()
    report.write(tmp_path / "copy")
    assert (tmp_path / "copy" / PROBE).read_bytes() == (old / PROBE).read_bytes()


def fields(tree: Any) -> Any:
    """A JSON tree with its numbers and words left out."""
    if isinstance(tree, dict):
        return {name: fields(value) for name, value in tree.items()}
    return [fields(value) for value in tree] if isinstance(tree, list) else None


def test_a_new_report_has_the_fields_of_version_0_1(old: Path, tmp_path: Path) -> None:
    chosen = task(SCORE | {"split": {"kind": "holdout"}})
    cases = cases_of(chosen, sessions(24, score=lambda subject: float(subject % 5)))
    noise_NP = np.random.default_rng(0).normal(size=(len(cases.sessions), 3))
    result = probe.run_task(chosen, cases, {"ours": Linear(lambda train: noise_NP)}, "task.yaml")
    probe.write_report(tmp_path, [result])
    new, before = (json.loads((folder / PROBE).read_text(encoding="utf-8")) for folder in (tmp_path, old))
    assert new.keys() == before.keys()
    assert fields(new["tasks"]["s"]["ours"]) == fields(before["tasks"]["score"]["finetuned"])
    of_method = before["facts"]["score"].pop("finetuned")
    assert of_method["settings"]["run"]["steps"] == 3
    assert new["facts"]["s"].pop("differences") == {}  # only a probe has them
    assert len(new["facts"]["s"].pop("tested")) == 16  # new since
    assert fields(new["facts"]["s"]) == fields(before["facts"]["score"])


def test_several_seeds_are_averaged_draw_by_draw() -> None:
    rng = np.random.default_rng(0)
    seeds = [rng.normal(size=1001) for _ in range(3)]
    found = Estimate.of_draws(*seeds, p=0.2)
    mean = sum(seeds) / 3
    low, high = sorted(mean[1:])[25], sorted(mean[1:])[-26]
    assert found.tree() == {
        "value": pytest.approx(mean[0]),
        "low": pytest.approx(low, abs=0.02),
        "high": pytest.approx(high, abs=0.02),
        "p": 0.2,
        "seeds": [seed[0] for seed in seeds],
    }
