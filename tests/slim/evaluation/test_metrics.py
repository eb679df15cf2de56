"""Scores are those of scikit-learn, intervals cover, many windows fit into memory."""

from __future__ import annotations

import json
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sk

from slim.evaluation import metrics
from slim.evaluation.results import Estimate

pytestmark = pytest.mark.fast


@pytest.mark.parametrize("classes", [2, 3])
def test_classification_metrics_are_those_of_scikit_learn(classes: int):
    rng = np.random.default_rng(classes)
    truth = rng.permutation(np.arange(40) % classes)
    probability = rng.dirichlet(np.ones(classes), 40).round(1)  # ties
    probability /= probability.sum(axis=1, keepdims=True)
    weights = metrics.bootstrap_weights(40, 20, 0)
    found = metrics.classification(truth, probability, weights)
    guess = probability.argmax(axis=1)
    for row, weight in enumerate(weights):
        area = np.mean([sk.roc_auc_score(truth == k, probability[:, k], sample_weight=weight) for k in range(classes)])
        expected = {
            "accuracy": sk.accuracy_score(truth, guess, sample_weight=weight),
            "balanced_accuracy": sk.balanced_accuracy_score(truth, guess, sample_weight=weight),
            "f1": sk.f1_score(truth, guess, average="macro", sample_weight=weight),
            "auroc": area,
        }
        assert {name: value[row] for name, value in found.items()} == pytest.approx(expected)


@settings(max_examples=50, deadline=None)
@given(st.integers(2, 60), st.integers(1, 4), st.integers(2, 4), st.integers(0, 2), st.integers(0, 2**16))
def test_auroc_of_windows_is_that_of_all_pairs(subjects: int, each: int, classes: int, digits: int, seed: int):
    """Against every pair of windows, with the weight of its subjects; ties of any number; weights in blocks."""
    rng = np.random.default_rng(seed)
    subject_U = rng.permutation(np.repeat(np.arange(subjects), each))
    truth_U = rng.integers(0, classes, len(subject_U))
    probability_UK = rng.random((len(subject_U), classes)).round(digits)
    weight_DS = metrics.bootstrap_weights(subjects, 10, seed)
    found = metrics.classification(truth_U, probability_UK, weight_DS, subject_U)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics, "_BLOCK", 3 * len(truth_U))
        blocks = metrics.classification(truth_U, probability_UK, weight_DS, subject_U)
    for name, value_D in found.items():
        np.testing.assert_array_equal(value_D, blocks[name])
    weight_DU, areas = weight_DS[:, subject_U], []
    for k in range(classes):
        value_U, is_k = probability_UK[:, k], truth_U == k
        wins = np.sign(value_U[is_k][:, None] - value_U[~is_k]) / 2 + 0.5
        with np.errstate(invalid="ignore"):
            pairs_D = weight_DU[:, is_k].sum(axis=1) * weight_DU[:, ~is_k].sum(axis=1)
            areas.append(np.einsum("di,ij,dj->d", weight_DU[:, is_k], wins, weight_DU[:, ~is_k]) / pairs_D)
    np.testing.assert_allclose(found["auroc"], np.mean(areas, axis=0), rtol=0, atol=1e-12)


def test_scores_of_many_windows_fit_into_memory():
    """32 000 windows in two classes: pairs, or a weight of each window in each draw, would take 2 and .26 GB."""
    rng = np.random.default_rng(0)
    subject_U = np.repeat(np.arange(1000), 32)
    truth_U, probability_UK = rng.integers(0, 2, 32_000), rng.dirichlet(np.ones(2), 32_000).round(3)
    tracemalloc.start()
    weight_DS = metrics.bootstrap_weights(1000, 100, 0)
    found = metrics.classification(truth_U, probability_UK, weight_DS, subject_U)["auroc"]
    one = metrics.Classification(probability_UK, np.ones((1, 1000)), subject_U)
    shuffled = metrics.permuted(one, truth_U, metrics.shuffles(subject_U, 20, 0))["auroc"]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 120e6
    for row in (0, 7):
        expected = [
            sk.roc_auc_score(truth_U == k, probability_UK[:, k], sample_weight=weight_DS[row][subject_U])
            for k in range(2)
        ]
        assert found[row] == pytest.approx(np.mean(expected), abs=1e-12)
    assert np.abs(shuffled - 0.5).max() < 0.02 and len(np.unique(shuffled)) == 20


def test_regression_metrics_are_those_of_scikit_learn():
    rng = np.random.default_rng(0)
    truth, guess = rng.normal(size=30) + 3, rng.normal(size=30)
    weights = metrics.bootstrap_weights(30, 20, 0)
    found = metrics.regression(truth, guess, weights)
    for row, weight in enumerate(weights):
        rows = np.repeat(np.arange(30), weight.astype(int))
        expected = {
            "r": np.corrcoef(truth[rows], guess[rows])[0, 1],
            "r2": sk.r2_score(truth[rows], guess[rows]),
            "mse": sk.mean_squared_error(truth[rows], guess[rows]),
        }
        assert {name: value[row] for name, value in found.items()} == pytest.approx(expected)


def test_draws_of_one_value_have_no_r_and_no_r2():
    """Of three subjects every ninth draw is one subject three times: no variance, whatever rounding makes of it."""
    rng = np.random.default_rng(0)
    weights = metrics.bootstrap_weights(3, 500, 0)
    found = metrics.regression(rng.normal(size=3) + 0.1, rng.normal(size=3), weights)
    one_value = (weights == 3).any(axis=1)
    assert one_value.sum() > 30 and np.isfinite(found["mse"]).all()
    for name in ("r", "r2"):
        assert (np.isnan(found[name]) == one_value).all(), name


def test_intervals_cover():
    """The true accuracy lies inside about 95 of 100 intervals."""
    rng = np.random.default_rng(0)
    covered = []
    for trial in range(300):
        truth = rng.integers(0, 2, 60)
        right = rng.random(60) < 0.7
        probability = np.eye(2)[np.where(right, truth, 1 - truth)]
        weights = metrics.bootstrap_weights(60, 300, trial)
        found = Estimate.of_draws(metrics.classification(truth, probability, weights)["accuracy"])
        assert found.low <= found.value <= found.high
        covered.append(found.low <= 0.7 <= found.high)
    assert 0.9 <= np.mean(covered) <= 0.98


@pytest.mark.parametrize("guess", [0.0, 0.1])
def test_undefined_scores_are_none_not_nan(guess: float):
    found = metrics.regression(np.arange(4.0), np.full(4, guess), metrics.bootstrap_weights(4, 100, 0))
    assert Estimate.of_draws(found["r"]).tree() == {"value": None, "low": None, "high": None}
    json.dumps(Estimate.of_draws(found["mse"]).tree(), allow_nan=False)


def test_fingerprint_on_constructed_data():
    rng = np.random.default_rng(0)
    who = np.repeat(np.arange(30), 2)
    traits = rng.normal(size=(30, 50))[who] + 100 * rng.normal(size=50)  # a mean that all share, far larger
    sure = metrics.fingerprint(traits + 0.1 * rng.normal(size=traits.shape), who)
    assert sure["top1"].mean() == 1 and sure["map"].mean() == 1
    blind = metrics.fingerprint(rng.normal(size=(60, 50)), who)
    assert blind["top1"].mean() < 0.15 and blind["map"].mean() < 0.25
    swapped = who.copy()
    swapped[[0, 2]] = swapped[[2, 0]]  # two sessions of two people take each other's place
    found = metrics.fingerprint(traits + 0.1 * rng.normal(size=traits.shape), swapped)
    assert (found["top1"] == np.r_[0, 0, np.ones(28)]).all()


def test_fingerprint_chance_is_the_mean_of_random_rankings():
    rng = np.random.default_rng(0)
    who = np.repeat(np.arange(5), [2, 2, 3, 4, 2])
    found = [metrics.fingerprint(rng.normal(size=(len(who), 400)), who) for _ in range(1500)]
    chance = metrics.fingerprint_chance(who)
    for name in ("top1", "map"):
        assert np.mean([each[name].mean() for each in found]) == pytest.approx(chance[name], abs=0.015)
