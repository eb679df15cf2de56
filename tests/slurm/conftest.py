"""A cluster for the session, cleared after each test."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from slurm.cluster import Cluster, missing


@pytest.fixture(scope="session")
def daemons() -> Iterator[Cluster]:
    if why := missing():
        pytest.skip(why)
    with Cluster() as cluster:
        yield cluster


@pytest.fixture
def cluster(daemons: Cluster) -> Iterator[Cluster]:
    yield daemons
    daemons.clear()
