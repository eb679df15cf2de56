"""Ways to pool the tokens of a session."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from sklearn.decomposition import PCA

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
    np.testing.assert_allclose(vectors.fitted(item, item.places, "cov", axes), expected, atol=1e-5)
    still = replace(item, tokens=np.ones_like(item.tokens))
    assert not vectors.fitted(still, item.places, "cov", axes).any()


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


def test_patterns_are_the_principal_components_of_whole_slots():
    items = [made_up(seed) for seed in range(6)]
    items[2] = replace(items[2], tokens=items[2].tokens[:7], slot_times=items[2].slot_times[:7])
    place_L = items[0].places
    found = vectors.principal_patterns(items, place_L, 4)
    assert found.shape == (5, 4, 4) and found.dtype == np.float32
    centred_MP = np.concatenate([(item.tokens - item.tokens.mean(axis=0)).reshape(-1, 20) for item in items])
    reference = PCA(4, svd_solver="full").fit(centred_MP.astype(np.float64))
    pattern_PQ = found.reshape(20, 4)
    cosine = np.abs(np.sum(pattern_PQ * reference.components_.T, axis=0))
    np.testing.assert_allclose(cosine, 1, atol=1e-4)  # in the same order
    assert (pattern_PQ[np.abs(pattern_PQ).argmax(axis=0), range(4)] > 0).all()
    x_SQ = items[1].tokens.reshape(12, 20).astype(np.float64) @ pattern_PQ
    expected = np.corrcoef(x_SQ.T)[np.triu_indices(4, 1)]
    np.testing.assert_allclose(vectors.fitted(items[1], place_L, "patterns", found), expected, atol=1e-5)
    # a place that is not asked for does not count, and neither do the means of sessions
    more = [replace(item, tokens=item.tokens + 50 * seed, places=item.places) for seed, item in enumerate(items)]
    fewer = vectors.principal_patterns(more, place_L[:3], 4)
    cut = [replace(item, tokens=item.tokens[:, :3], places=place_L[:3]) for item in items]
    np.testing.assert_allclose(fewer, vectors.principal_patterns(cut, place_L[:3], 4), atol=2e-3)
    np.testing.assert_array_equal(vectors.principal_patterns(items, place_L, 4), found)


def test_there_are_no_more_patterns_than_the_data_can_have():
    items = [made_up(seed) for seed in range(2)]  # 24 slots, 20 places and channels
    assert vectors.pool(items, "patterns", 19, np.arange(2)).shape == (2, 19 * 18 // 2)
    for count in (20, None):
        with pytest.raises(ConfigError, match=r"components: got (20|64) patterns, expected at most 19, because"):
            vectors.pool(items, "patterns", count, np.arange(2))


@pytest.mark.parametrize("name", ["cov", "patterns"])
def test_components_come_from_training_sessions_alone(name):
    items = [made_up(seed) for seed in range(6)]
    train = np.arange(4)
    before = vectors.pool(items, name, 2, train)
    items[5] = replace(items[5], tokens=items[5].tokens[..., ::-1] * 1000)
    after = vectors.pool(items, name, 2, train)
    np.testing.assert_array_equal(before[:5], after[:5])
    assert not np.allclose(vectors.pool(items, name, 2, np.arange(6))[:5], before[:5])


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
