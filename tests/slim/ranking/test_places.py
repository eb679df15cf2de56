"""No ranker prefers a place in the scan: in stationary noise, every window is chosen alike."""

from __future__ import annotations

import numpy as np
import pytest

from launchers.benches.saliency import from_fair_share
from launchers.benches.simulate import stationary
from slim.ranking.extractor_training import train_extractor
from slim.ranking.rankers import Ranker, make_ranker

RUNS, LENGTH, FRAMES, BEST = 120, 120, 5, 8
FAIR = RUNS * BEST * FRAMES / LENGTH  # 40 of 120 runs choose a window


@pytest.fixture(scope="module")
def noise() -> list[tuple[np.ndarray, np.ndarray]]:
    # By chance, one draw in sixteen has a place beyond 3 SD. In this one `variance`, the control, has none.
    return [stationary(seed, LENGTH) for seed in range(2000, 2000 + RUNS)]


def counts(ranker: Ranker, noise: list[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """How many runs have each window among their best."""
    count_W = np.zeros(LENGTH // FRAMES, dtype=int)
    for run in noise:
        count_W[np.argsort(-ranker.scores(*run, FRAMES), kind="stable")[:BEST]] += 1
    return count_W


def ranker_of(name: str, version: int | None = None) -> Ranker:
    if name != "mutual":
        return make_ranker(name, version=version)
    extractor = train_extractor([stationary(10_000 + seed, LENGTH) for seed in range(8)], steps=60)
    return make_ranker(name, extractor, version=version)


@pytest.mark.parametrize("name", ["mutual", "ridge", "variance", "random"])
def test_every_place_is_chosen_alike(name, noise):
    count_W = counts(ranker_of(name), noise)
    assert count_W.sum() == RUNS * BEST and count_W.mean() == FAIR
    assert np.abs(from_fair_share(count_W)).max() < 3, count_W


def test_version_1_of_ridge_chose_the_ends_too_rarely(noise):
    """Why there is a version 2, and that this noise shows it."""
    count_W = counts(ranker_of("ridge", version=1), noise)
    assert from_fair_share(count_W)[[0, -1]].mean() < -2, count_W
