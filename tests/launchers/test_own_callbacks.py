"""Callbacks that a user names in SLIM_CALLBACKS."""

from __future__ import annotations

from pathlib import Path

import pytest

from launchers.job import own_callbacks
from shards.core.errors import ConfigError

pytestmark = pytest.mark.fast

MODULE = """
from slim.training.callbacks import Callback
class Plain(Callback):
    pass
def with_words(word):
    return Callback()
def number():
    return 3
"""


@pytest.fixture(autouse=True)
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mylab_callbacks.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)


def test_they_are_made_in_the_order_of_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLIM_CALLBACKS", raising=False)
    assert own_callbacks() == []
    monkeypatch.setenv("SLIM_CALLBACKS", "mylab_callbacks:Plain, slim.training.callbacks:StallWatch")
    assert [type(callback).__name__ for callback in own_callbacks()] == ["Plain", "StallWatch"]


@pytest.mark.parametrize(
    ("named", "told"),
    [
        ("absent_module:Plain", "No module named 'absent_module'"),
        ("mylab_callbacks:absent", "has no attribute 'absent'"),
        ("mylab_callbacks", "expected module:function"),
        (":Plain", "expected module:function"),
        ("mylab_callbacks:with_words", "missing 1 required positional argument"),
        ("mylab_callbacks:number", "returns a int, expected a Callback"),
        ("runs/one/code.py:Plain", "No module named"),
    ],
)
def test_names_that_make_no_callback_are_refused_in_one_line(
    monkeypatch: pytest.MonkeyPatch, named: str, told: str
) -> None:
    monkeypatch.setenv("SLIM_CALLBACKS", named)
    with pytest.raises(ConfigError) as refused:
        own_callbacks()
    line = refused.value.line()
    assert told in line and "SLIM_CALLBACKS" in line and named in line and "\n" not in line
