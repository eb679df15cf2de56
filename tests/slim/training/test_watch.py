"""A run that stands still is told of once, with what it was doing."""

from __future__ import annotations

import time

from slim.training.stall import DATA, SAVE, Watch


def wait_for(told: list[str], count: int) -> None:
    end = time.monotonic() + 20
    while len(told) < count and time.monotonic() < end:
        time.sleep(0.01)
    assert len(told) == count, told


def test_a_late_step_is_told_once_and_so_is_the_next() -> None:
    told: list[str] = []
    with Watch(told.append, times=2, least=0.2) as watch:
        for _ in range(3):
            watch.step()
        watch.now(DATA)
        wait_for(told, 1)
        time.sleep(0.3)
        assert len(told) == 1
        assert "waiting for data" in told[0] and "loading process" in told[0] and "(usual: " in told[0]
        watch.step()
        watch.now(SAVE)
        wait_for(told, 2)
        assert "saving a checkpoint" in told[1]


def test_steps_as_usual_are_not_told() -> None:
    told: list[str] = []
    with Watch(told.append, times=1000, least=0.1) as watch:
        time.sleep(0.01)
        watch.step()
        time.sleep(0.5)
        watch.step()
    assert not told


def test_a_first_step_may_take_longer_but_not_for_ever() -> None:
    told: list[str] = []
    with Watch(told.append, times=5, least=0.1):
        time.sleep(0.3)
        assert not told
        wait_for(told, 1)
    assert "since the start" in told[0]
