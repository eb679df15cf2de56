"""The callbacks that every run has."""

from __future__ import annotations

import threading

import pytest

from slim.training.callbacks import StallWatch, Start

pytestmark = pytest.mark.fast


def watches() -> int:
    return sum(thread.name == "watch" for thread in threading.enumerate())


def test_no_stall_is_watched_for_once_the_steps_are_done() -> None:
    """The mirror may copy for minutes after the last step."""
    watch = StallWatch()
    watch.on_start(Start(step=0, steps=1, warn=print))
    assert watches() == 1
    watch.on_finish()
    assert watches() == 0
    watch.on_end()
