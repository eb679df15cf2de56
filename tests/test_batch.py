"""From sessions to batches: what cannot be masked or drawn is refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest

from shards.errors import SampleCorrupt
from shards.reader import Dataset
from shards.settings import check
from shards.stream import Item
from slim.batch import draw_sample, geometry_for
from slim.config import PretrainSettings


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ({"depths": (1, 1), "unit": (5, 4, 4, 4), "strides": ((5, 4, 4, 4),)}, "got brain in 1 cell of the grid"),
        ({"depths": (1,), "unit": (5, 4, 4, 4), "strides": ()}, None),
    ],
)
def test_a_session_whose_brain_lies_in_one_cell_is_refused_by_name(dataset: Path, model: dict, words: str | None):
    settings = check(
        PretrainSettings,
        {"data": str(dataset), "model": {"embed": 16, "heads": 2, "local_stages": 1, **model}, "run": {"out": "x"}},
        "test",
    )
    opened = Dataset(dataset)
    item, geometry = Item(0, opened.sessions[0], 0), geometry_for(settings, [opened])
    if words is None:
        assert len(draw_sample(item, opened, geometry, settings).mask.context_K)
        return
    with pytest.raises(SampleCorrupt) as error:
        draw_sample(item, opened, geometry, settings)
    assert words in error.value.line() and opened.sessions[0]["key"] in error.value.line()
