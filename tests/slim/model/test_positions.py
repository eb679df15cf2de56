"""What positions start as: every place its own, neighbours alike, the size of an embedded patch.

Legend: L places of a grid; A its axes; C channels.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from slim.config import PRESETS
from slim.model.embedding import sinusoids
from slim.model.geometry import geometry_of
from slim.model.hiera import Hiera

pytestmark = pytest.mark.fast


@given(st.lists(st.integers(1, 9), min_size=1, max_size=3), st.integers(8, 70))
def test_every_place_has_its_own_and_all_are_of_one_length(shape: list[int], dim: int) -> None:
    table_LC = sinusoids(shape, dim)
    assert table_LC.shape == (np.prod(shape), dim)
    used = dim // (2 * len(shape)) * 2 * len(shape)
    assert torch.allclose(table_LC.square().sum(dim=1), torch.tensor(used / 2)) and not table_LC[:, used:].any()
    apart_LL = torch.cdist(table_LC.double(), table_LC.double()) + torch.eye(len(table_LC))
    assert apart_LL.min() > 0.1


@given(st.integers(4, 40), st.sampled_from([32, 64, 96]))
def test_neighbours_look_more_alike_than_places_far_apart(size: int, dim: int) -> None:
    table_LC = sinusoids([size], dim)
    like_LL = table_LC @ table_LC.T
    far = max(like_LL.diagonal(steps).mean() for steps in range(size // 2, size))
    assert like_LL.diagonal(1).mean() > far


def test_axes_do_not_share_channels() -> None:
    table_XYC = sinusoids([4, 5], 16).view(4, 5, 16)
    assert torch.equal(table_XYC[:, :1, :8].expand(4, 5, 8), table_XYC[..., :8])
    assert torch.equal(table_XYC[:1, :, 8:].expand(4, 5, 8), table_XYC[..., 8:])


@pytest.mark.parametrize("preset", ["tiny", "lean"])
def test_an_encoder_begins_with_them_whatever_the_seed(preset: str) -> None:
    sizes = PRESETS[preset]
    geometry = geometry_of(sizes, (40, 8, 8, 8))
    models = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        models.append(Hiera(sizes, geometry, 64, "both"))
    for model in models:
        assert torch.equal(model.space, sinusoids((8, 8, 8), sizes.embed))
        assert torch.equal(model.time, sinusoids((40,), sizes.embed))
        assert model.space.requires_grad and not model.seconds.linear.weight.any()
    assert not torch.equal(models[0].blocks[0].fc1.weight, models[1].blocks[0].fc1.weight)
