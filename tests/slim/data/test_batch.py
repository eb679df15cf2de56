"""From sessions to batches: what cannot be masked is refused by name."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from shards.core.errors import ConfigError, SampleCorrupt
from shards.core.settings import check
from shards.format.reader import Dataset
from shards.format.stream import Item
from slim.config import PretrainSettings
from slim.data import samples


def settings(dataset: Path, stride: int) -> PretrainSettings:
    """A model whose cells hold `stride` patches along each axis of space."""
    model = {"embed": 16, "heads": 2, "local_stages": 1, "depths": (1, 1), "unit": (5, 4, 4, 4)}
    model["strides"] = ((5, stride, stride, stride),)
    return check(PretrainSettings, {"data": str(dataset), "model": model, "run": {"out": "x"}}, "test")


def test_a_model_whose_cells_are_as_large_as_the_grid_is_refused(dataset: Path):
    with pytest.raises(ConfigError, match=r"model: strides: got \(1, 1, 1\) cells in space, expected 2 cells or more"):
        samples.geometry_for(settings(dataset, 4), [Dataset(dataset)])


def test_a_session_whose_brain_lies_in_one_cell_is_refused_by_name(dataset: Path, monkeypatch: pytest.MonkeyPatch):
    chosen, opened = settings(dataset, 2), Dataset(dataset)
    geometry = samples.geometry_for(chosen, [opened])
    item, read = Item(0, opened.sessions[0], 0), samples.read_windows
    assert len(samples.draw_sample(item, opened, geometry, chosen).mask.context_K)

    def in_one_cell(*arguments):
        sample = read(*arguments)
        cell_P = geometry.cell_of[sample.place]
        kept = cell_P == cell_P[0]
        return replace(
            sample,
            value=sample.value[:, kept],
            **{name: getattr(sample, name)[kept] for name in ("baseline", "spread", "brain", "place")},
        )

    monkeypatch.setattr(samples, "read_windows", in_one_cell)
    with pytest.raises(SampleCorrupt) as error:
        samples.draw_sample(item, opened, geometry, chosen)
    assert "got brain in 1 cell of the grid" in error.value.line()
    assert opened.sessions[0].key in error.value.line()
