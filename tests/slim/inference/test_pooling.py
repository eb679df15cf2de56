"""Ways to pool the tokens of a session."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from shards.core.errors import ConfigError, DatasetError
from slim.inference import vectors
from slim.inference.slim_brain import Features

pytestmark = pytest.mark.fast


def made_up(seed: int, slots: int = 12, places: int = 5, dim: int = 4) -> Features:
    rng = np.random.default_rng(seed)
    token = rng.normal(size=(slots, places, dim)) * [3, 2, 1, 0.5] + rng.normal(size=(places, dim))
    return Features(
        str(seed), token.astype(np.float32), np.arange(places) * 2, np.arange(slots) * 3.6, np.arange(slots) // 2 * 7.2
    )


def test_poolings_are_what_their_names_say():
    item = made_up(0)
    here = item.places[[1, 3]]
    x_SLC = item.tokens[:, [1, 3]]
    np.testing.assert_allclose(vectors.fixed(item, here, "mean"), x_SLC.mean((0, 1)), rtol=1e-5)
    np.testing.assert_allclose(vectors.fixed(item, here, "location"), x_SLC.mean(0).ravel(), rtol=1e-5)
    both = vectors.fixed(item, here, "mean+sd")
    np.testing.assert_allclose(both, np.r_[x_SLC.mean((0, 1)), x_SLC.std(0).mean(0)], rtol=1e-5)


def test_cov_is_the_correlation_of_components():
    item = made_up(1)
    axes = np.linalg.qr(np.random.default_rng(2).normal(size=(4, 2)))[0]
    series = (item.tokens.astype(np.float64) @ axes).reshape(12, -1)
    expected = np.corrcoef(series.T)[np.triu_indices(10, 1)]
    np.testing.assert_allclose(vectors.cov(item, item.places, axes), expected, atol=1e-5)
    still = replace(item, tokens=np.ones_like(item.tokens))
    assert not vectors.cov(still, item.places, axes).any()


def test_axes_are_those_of_largest_variance_over_time():
    items = [made_up(seed) for seed in range(4)]
    axes = vectors.principal_axes(items, items[0].places, 3)
    np.testing.assert_allclose(axes.T @ axes, np.eye(3), atol=1e-12)
    assert np.abs(axes).argmax(axis=0).tolist() == [0, 1, 2]
    moved = [replace(item, tokens=item.tokens + 100 * np.arange(5)[:, None]) for item in items]
    same = vectors.principal_axes(moved, items[0].places, 3)
    np.testing.assert_allclose(np.abs(same), np.abs(axes), atol=1e-3)
    with pytest.raises(ConfigError, match="components"):
        vectors.principal_axes(items, items[0].places, 5)


def test_axes_come_from_training_sessions_alone():
    items = [made_up(seed) for seed in range(6)]
    train = np.arange(4)
    before = vectors.pool(items, "cov", 2, train)
    items[5] = replace(items[5], tokens=items[5].tokens[..., ::-1] * 1000)
    after = vectors.pool(items, "cov", 2, train)
    np.testing.assert_array_equal(before[:5], after[:5])
    assert not np.allclose(vectors.pool(items, "cov", 2, np.arange(6))[:5], before[:5])


def test_pooling_keeps_to_places_that_all_sessions_have():
    first, second = made_up(0), made_up(1)
    second = replace(second, places=second.places + 2)  # 2 4 6 8 10 beside 0 2 4 6 8
    pooled = vectors.pool([first, second], "location", 1, np.arange(0))
    np.testing.assert_allclose(pooled[0], first.tokens[:, 1:].mean(0).ravel(), rtol=1e-5)
    np.testing.assert_allclose(pooled[1], second.tokens[:, :4].mean(0).ravel(), rtol=1e-5)
    with pytest.raises(DatasetError, match="places"):
        vectors.pool([first, replace(second, places=second.places + 1)], "mean", 1, np.arange(0))


def test_a_window_is_the_mean_of_its_slots():
    item = made_up(0)
    start_W, x_WLC = vectors.windows(item, item.places[1:])
    assert start_W.tolist() == [7.2 * number for number in range(6)] and x_WLC.dtype == np.float32
    np.testing.assert_allclose(x_WLC, item.tokens[:, 1:].reshape(6, 2, 4, 4).mean(axis=1), rtol=1e-5)
