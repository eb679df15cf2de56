"""Losses, vectors, scores and bytes of datasets stay those of tests/golden/numbers.json.

On the kind of processor that recorded them, the dataset is the same to the byte, and numbers to a millionth. Other
processors round differently from the first matrix product on: there the numbers agree to a hundredth, and the bytes are
not compared. `python tests/golden/record.py FOLDER` records them anew.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from golden import record
from helpers.conversions import write_page
from helpers.in_process import call_command
from shards.reporting import dataset_page


def call(*words: object) -> None:
    done = call_command(*words)
    assert done.returncode == 0, f"{words}: {done.stderr}"


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The numbers, by the same commands in this process, without the page of the dataset."""
    with mock.patch.object(record, "call", call), mock.patch.object(dataset_page, "write", write_page):
        return record.record(tmp_path_factory.mktemp("golden"))


@pytest.fixture(scope="module")
def expected() -> dict[str, Any]:
    return json.loads(Path(record.NUMBERS).read_text())


@pytest.fixture(scope="module")
def tolerance(expected: dict[str, Any]) -> float:
    return 1e-6 if expected["processor"] == record.processor() else 1e-2


@pytest.mark.parametrize("dataset", ["dataset", "dataset, newest ranker"])
def test_the_dataset_has_the_same_bytes(dataset: str, found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found[dataset].keys() == expected[dataset].keys()
    if expected["processor"] != record.processor():
        pytest.skip(f"recorded on another processor: {expected['processor']}")
    assert found[dataset] == expected[dataset]


@pytest.mark.parametrize("kind", ["losses", "vectors"])
def test_the_numbers_are_the_same(kind: str, found: dict, expected: dict, tolerance: float) -> None:
    assert found[kind].keys() == expected[kind].keys()
    for name, values in expected[kind].items():
        assert found[kind][name] == pytest.approx(values, rel=tolerance, abs=tolerance), name


def test_the_losses_are_of_twenty_steps_that_learn(expected: dict[str, Any]) -> None:
    assert len(expected["losses"]) == 6
    for name, values in expected["losses"].items():
        assert len(values) == 20 and values[-1] < values[1], name


def test_probes_have_the_same_scores(found: dict, expected: dict, tolerance: float) -> None:
    """A score of few subjects jumps where two of them change places: only the same processor must give the same."""
    assert found["probe"].keys() == expected["probe"].keys()
    if tolerance > 1e-6:
        pytest.skip(f"recorded on another processor: {expected['processor']}")
    assert found["probe"] == pytest.approx(expected["probe"], rel=1e-6)
