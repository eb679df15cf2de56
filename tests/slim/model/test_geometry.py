"""Geometry and the presets: the published sizes, and one-line refusals of impossible ones."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from shards.core.errors import ConfigError
from slim.config import PRESETS, ModelSettings
from slim.model.geometry import Geometry
from slim.model.hiera import Hiera
from slim.model.ragged import plan

pytestmark = pytest.mark.fast

PUBLISHED = (40, 24, 24, 24)


def test_published_sizes() -> None:
    sizes = PRESETS["published"]
    geometry = Geometry(PUBLISHED, sizes.unit, sizes.strides)
    assert np.prod(geometry.tokens) == 552_960
    assert len(np.unique(geometry.unit_of)) == 135 and np.bincount(geometry.unit_of).max() == 4096
    assert np.prod(geometry.cells) == 2160 and geometry.cell == (4, 4, 4, 4)
    with torch.device("meta"):
        model = Hiera(sizes, geometry, 64, "global")
    positions = model.space.numel() + model.time.numel()
    everything = sum(p.numel() for p in model.parameters())
    assert model.dim == 512
    assert abs(everything - positions - 22.45e6) < 0.01 * 22.45e6
    assert abs(positions - 0.89e6) < 0.01 * 0.89e6


def test_large_has_about_200_million_parameters() -> None:
    sizes = PRESETS["large"]
    with torch.device("meta"):
        model = Hiera(sizes, Geometry(PUBLISHED, sizes.unit, sizes.strides), 64, "both")
    assert 180e6 < sum(p.numel() for p in model.parameters()) < 220e6


def test_lean_units_are_windows() -> None:
    sizes = PRESETS["lean"]
    geometry = Geometry(PUBLISHED, sizes.unit, sizes.strides)
    assert geometry.cell == (5, 4, 4, 4) and geometry.cells == (8, 6, 6, 6)


@pytest.mark.parametrize("tokens", [(8,), (4, 8), (2, 4, 6), (4, 2, 4, 6)])
def test_any_number_of_dimensions(tokens: tuple[int, ...]) -> None:
    """Units and pooled tokens are contiguous after sorting, and are boxes of the grid."""
    geometry = Geometry(tokens, (2,) * len(tokens), ((2,) * len(tokens),))
    order = geometry.in_order
    assert sorted(order) == list(range(np.prod(tokens)))
    for ids in (geometry.unit_of[order], geometry.cell_of[order]):
        changes = np.count_nonzero(np.diff(ids))
        assert changes == len(np.unique(ids)) - 1
    places = np.indices(tokens).reshape(len(tokens), -1)
    expected = np.ravel_multi_index(tuple(places // 2), tuple(t // 2 for t in tokens))
    assert np.array_equal(geometry.cell_of, expected)
    places = int(np.prod(tokens[1:]))
    assert np.array_equal(geometry.frame_in_order * places + geometry.space_in_order, order)
    whole = plan(geometry, [np.arange(places)])
    assert sorted(whole.cell_M.tolist()) == list(range(expected.max() + 1))
    assert np.array_equal(whole.cell_M, geometry.cell_in_order)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (((40, 24, 24, 23), (8, 8, 8, 8), ((2, 2, 2, 2),)), ("unit[3]", "8", "23")),
        (((40, 24, 24, 24), (8, 8, 8, 8), ((2, 2, 2, 3),)), ("axis 3", "3", "8")),
        (((40, 24, 24, 24), (8, 8, 8), ((2, 2, 2, 2),)), ("unit", "3 axes", "4")),
        (((40, 24, 24, 24), (8, 8, 8, 8), ((2, 2, 2, 0),)), ("strides[0]", "0")),
    ],
)
def test_impossible_sizes_are_refused_with_both_numbers(arguments: tuple, words: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError) as error:
        Geometry(*arguments)
    assert all(word in error.value.line() for word in words)


def test_model_settings_refuse_what_does_not_fit() -> None:
    good = PRESETS["tiny"].model_dump()
    for wrong in (
        {"embed": 30, "heads": 4},
        {"depths": ()},
        {"local_stages": 9},
        {"strides": ((5, 1, 1, 1), (1, 2, 1, 1), (1, 1, 2, 1))},
        {"predictor": {"width": 10, "heads": 4, "depth": 1}},
    ):
        with pytest.raises(ValueError, match=r"."):
            ModelSettings(**{**good, **wrong})
