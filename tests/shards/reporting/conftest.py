"""What several tests of the pages share."""

from __future__ import annotations

from pathlib import Path

import pytest

from shards.format.reader import Dataset


@pytest.fixture(scope="module")
def opened(dataset: Path) -> Dataset:
    return Dataset(dataset)
