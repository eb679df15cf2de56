"""A cluster for the session, cleared after each test."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from types import FrameType

import pytest

from slurm.cluster import Cluster, missing

_LIMIT = 15 * 60  # seconds of a test: a cluster that hangs must not hang the tests


@pytest.fixture(autouse=True)
def limit() -> Iterator[None]:
    def stop(number: int, frame: FrameType | None) -> None:
        raise AssertionError(f"not done after {_LIMIT} s")

    former = signal.signal(signal.SIGALRM, stop)
    signal.alarm(_LIMIT)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, former)


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
