"""Masks: a pure function of (seed, epoch, key), shares met, kinds right, no place favoured."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slim.config import KINDS, TokenMaskSettings
from slim.data.masking import choose, draw

pytestmark = pytest.mark.fast


def sizes(seed: int = 0, slots: int = 8, places: int = 60) -> np.ndarray:
    """Brain tokens per cell as a head has them: many full cells inside, few tokens at the rim, empty corners."""
    rng = np.random.default_rng(seed)
    place = np.minimum(64, rng.exponential(40, places).astype(int))
    place[rng.random(places) < 0.2] = 0
    place[0] = 64
    return np.tile(place * 4, (slots, 1))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.05, 0.95), st.floats(0.05, 0.95), st.floats(0.1, 1.0))
def test_shares_are_met_within_one_cell(seed: int, places: float, times: float, targets: float) -> None:
    size = sizes(seed)
    chosen = TokenMaskSettings(context_places=places, context_times=times, targets=targets)
    mask = draw(size, chosen, seed, 3, "key")
    per_place, slots = size[0], size.shape[0]
    slot, place = np.divmod(mask.context_K, size.shape[1])
    tokens = per_place[np.unique(place)].sum()
    assert abs(tokens - places * per_place.sum()) <= per_place.max()
    assert abs(len(np.unique(slot)) - times * slots) <= 1
    for number in range(3):
        cells = mask.target_K[mask.kind_K == number]
        available = kind_of_all(size, mask)[1] == number
        wanted = targets * size.ravel()[available].sum()
        assert abs(size.ravel()[cells].sum() - wanted) <= size.max()


def kind_of_all(size: np.ndarray, mask) -> tuple[np.ndarray, np.ndarray]:
    """Whether each cell is context, and its kind as a target (-1 for none), from the definition."""
    slots, places = np.divmod(mask.context_K, size.shape[1])
    in_slot, in_place = np.isin(np.arange(size.shape[0]), slots), np.isin(np.arange(size.shape[1]), places)
    context = in_slot[:, None] & in_place & (size > 0)
    kind = np.where(in_place, 0, np.where(in_slot[:, None], 1, 2))
    kind = np.where((in_slot[:, None] & in_place) | (size == 0), -1, kind)
    return context.ravel(), kind.ravel()


def test_context_and_targets_are_what_their_names_say() -> None:
    size = sizes()
    mask = draw(size, TokenMaskSettings(), 0, 0, "a")
    context, kind = kind_of_all(size, mask)
    assert np.array_equal(np.flatnonzero(context), mask.context_K)
    assert np.array_equal(kind[mask.target_K], mask.kind_K)
    assert set(mask.kind_K) == set(range(len(KINDS)))
    assert not set(mask.context_K) & set(mask.target_K)
    assert (size.ravel()[mask.context_K] > 0).all() and (size.ravel()[mask.target_K] > 0).all()


def test_pure_function_of_seed_epoch_and_key() -> None:
    size = sizes()
    one = draw(size, TokenMaskSettings(), 1, 2, "key")
    np.random.seed(0)  # noqa: NPY002 - a global generator must not matter
    again = draw(size, TokenMaskSettings(), 1, 2, "key")
    assert all(np.array_equal(getattr(one, name), getattr(again, name)) for name in vars(one))
    for other in (
        draw(size, TokenMaskSettings(), 2, 2, "key"),
        draw(size, TokenMaskSettings(), 1, 3, "key"),
        draw(size, TokenMaskSettings(), 1, 2, "yek"),
    ):
        assert not np.array_equal(one.context_K, other.context_K)


@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
def test_no_place_is_favoured_whatever_its_size(share: float) -> None:
    """Inclusion follows a binomial law with the same probability everywhere: early or late, large or small."""
    size = sizes()[0]
    size = size[size > 0]
    draws = 4000
    rng = np.random.default_rng(0)
    count = sum(choose(size, share, rng).astype(int) for _ in range(draws))
    z = (count - share * draws) / np.sqrt(draws * share * (1 - share))
    assert np.abs(z).max() < 4.5
    assert abs(np.corrcoef(size, z)[0, 1]) < 0.45
    assert abs(z.mean()) < 0.5


def test_every_place_and_slot_is_context_and_target_equally_often() -> None:
    size = sizes(places=30)
    context, target = np.zeros(size.size), np.zeros(size.size)
    draws = 3000
    for epoch in range(draws):
        mask = draw(size, TokenMaskSettings(context_places=0.5, context_times=0.5, targets=0.5), 0, epoch, "key")
        context[mask.context_K] += 1
        target[mask.target_K] += 1
    there = size.ravel() > 0
    for count in (context[there], target[there]):
        rate = count.mean() / draws
        assert np.abs(count / draws - rate).max() < 5 * np.sqrt(rate * (1 - rate) / draws)


def test_something_is_left_and_something_is_chosen() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        assert choose(np.array([5, 1]), 0.99, rng).sum() == 1
        assert choose(np.array([5, 1]), 0.01, rng).sum() == 1
        assert choose(np.array([7]), 0.5, rng).sum() <= 1
