"""Train, validation and test by people and families; classes made of a column; permutations."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from helpers.tasks import GROUP, SCORE, WHO, cases_of, sessions, task
from shards.core.errors import ConfigError
from slim.evaluation import baselines, linear, metrics, probe
from slim.evaluation.division import make_splits
from slim.evaluation.linear import PENALTIES, Linear
from slim.evaluation.splits import TaskSplitSettings, divide

pytestmark = pytest.mark.fast

HOLDOUT = {"kind": "holdout", "repeats": 3}


@settings(max_examples=60, deadline=None)
@given(
    st.integers(10, 60),
    st.integers(1, 4),
    st.sampled_from(["folds", "holdout"]),
    st.sampled_from(["classification", "regression", "state"]),
    st.integers(0, 5),
)
def test_families_stay_together_and_everybody_is_somewhere(subjects: int, size: int, kind: str, of: str, seed: int):
    rng = np.random.default_rng(seed)
    family_S = rng.permutation(np.arange(subjects) // size)
    truth_S = rng.integers(0, 2, subjects) if of != "regression" else rng.normal(size=subjects)
    subject_N = np.repeat(np.arange(subjects), 2)
    chosen = TaskSplitSettings(kind=kind, folds=3, repeats=2, seed=seed)
    for splits in divide(chosen, of, truth_S, family_S, subject_N):
        for split in splits:
            sides = [set(family_S[subject_N[rows]]) for rows in (split.train, split.val, split.test)]
            assert not (sides[0] & sides[1] or sides[0] & sides[2] or sides[1] & sides[2])
            rows = np.concatenate([split.train, split.val, split.test])
            assert np.array_equal(np.sort(rows), np.arange(2 * subjects))
        if kind == "folds":
            assert np.array_equal(np.sort(np.concatenate([split.test for split in splits])), np.arange(2 * subjects))


def test_shares_are_met_and_seeds_differ():
    chosen = task(GROUP | {"split": HOLDOUT})
    found = cases_of(chosen, sessions(100, 2, group=lambda s: "AAAB"[s % 4]))
    repeats = make_splits(chosen, found, "")
    assert [len(part) for part in repeats] == [1, 1, 1]
    tests = []
    for (split,) in repeats:
        assert (len(split.train), len(split.val), len(split.test)) == (140, 20, 40)
        of_test = found.truth_S[np.unique(found.subject_N[split.test])]
        assert of_test.sum() == 5  # a quarter of 20
        tests.append(set(split.test))
    assert tests[0] != tests[1] != tests[2]


def test_a_family_that_is_named_is_never_divided():
    chosen = task(GROUP | {"split": HOLDOUT | {"family": "home"}})
    dataset = sessions(60, 2, group=lambda s: "AB"[s % 2], home=lambda s: f"f{s // 4}" if s < 40 else None)
    found = cases_of(chosen, dataset)
    assert len(np.unique(found.family_S)) == 10 + 20
    for (split,) in make_splits(chosen, found, ""):
        homes = [{found.subjects[s][1] for s in found.subject_N[rows]} for rows in (split.train, split.test)]
        assert not {int(s) // 4 for s in homes[0] if int(s) < 40} & {int(s) // 4 for s in homes[1] if int(s) < 40}
    with pytest.raises(ConfigError, match=r"split\.family: got house"):
        cases_of(task(GROUP | {"split": HOLDOUT | {"family": "house"}}), dataset)
    with pytest.raises(ConfigError, match="family"):
        task(GROUP | {"split": {"kind": "dataset", "family": "home"}})


def test_the_penalty_is_chosen_on_validation_subjects_alone(monkeypatch: pytest.MonkeyPatch):
    """Test answers changed: the same choice. Validation answers are what it rests on; both fit the last model."""
    chosen = task(SCORE | {"split": HOLDOUT | {"repeats": 1}})
    found = cases_of(chosen, sessions(50, 2, score=lambda s: float((7 * s) % 50)))
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(100, 40)) + found.truth_S[found.subject_N][:, None] / 40
    ((split,),) = make_splits(chosen, found, "")
    fold, _ = probe.make_fold(chosen, found, split)
    assert set(fold.train[fold.inner() == 0]) == set(split.val) and set(fold.inner()) == {0, -1}
    loss_L = linear.held_out_losses(fold, [vectors[fold.train]], fold.inner())
    expected = []
    for penalty in PENALTIES:
        x, z = linear.standardised_axes(vectors[split.train], vectors[split.val])
        of_train, of_val = (fold.answer_n[np.searchsorted(fold.train, rows)] for rows in (split.train, split.val))
        gram = x.T @ x + penalty * np.eye(x.shape[1])
        guess = of_train.mean() + z @ np.linalg.solve(gram, (x - x.mean(0)).T @ (of_train - of_train.mean()))
        expected.append(((guess - of_val) ** 2).mean())
    np.testing.assert_allclose(loss_L, expected, rtol=1e-6)


def test_classes_are_made_of_values_or_of_numbers():
    dataset = sessions(12, 1, dx=lambda s: [0, 1, 2.0, "pending"][s % 4], age=lambda s: [8, 12, 30, -9999][s % 4])
    named = cases_of(task(GROUP | {"label": "dx", "classes": {"well": ["0"], "ill": ["1", "2"]}}), dataset)
    assert named.classes == ["ill", "well"] and named.left_out == {"of another class": 3}
    assert (named.truth_S == 0).sum() == 6
    parted = cases_of(task(GROUP | {"label": "age", "edges": [12, 18], "missing": ["-9999"]}), dataset)
    assert parted.classes == ["below 12", "from 12 to 18", "from 18"] and parted.left_out == {"without the label": 3}


@pytest.mark.parametrize(
    ("tree", "told"),
    [
        (SCORE | {"edges": [1, 2]}, "edges: got a value, expected nothing: a regression has none"),
        (GROUP | {"edges": [2, 1]}, "ascend"),
        (GROUP | {"edges": [1], "classes": {"a": ["1"]}}, "edges: got .*, expected either classes or edges"),
        (WHO | {"confounds": ["age"]}, "confounds"),
        (GROUP | {"split": {"kind": "holdout", "shares": [0.5, 0.5, 0.5]}}, "shares"),
    ],
)
def test_a_wrong_task_is_told(tree: dict[str, Any], told: str):
    with pytest.raises(ConfigError, match=told):
        task(tree)


def test_confounds_are_numbers_or_one_hot_and_missing_ones_leave_a_session_out():
    dataset = sessions(8, 1, group=lambda s: "AB"[s % 2], age=lambda s: s / 2, site=lambda s: "xyz"[s % 3])
    dataset.sessions[3].labels["age"] = "n/a"
    dataset.sessions = [
        session.model_copy(update={"mean_fd_mm": 0.1 * number}) for number, session in enumerate(dataset.sessions)
    ]
    found = cases_of(task(GROUP | {"confounds": ["age", "site", "mean_fd_mm"]}), dataset)
    assert found.left_out == {"without age": 1}
    vector_NF = baselines.confounds(found.sessions, ("age", "site", "mean_fd_mm"))
    assert vector_NF.shape == (7, 1 + 3 + 1) and vector_NF[1].tolist() == pytest.approx([0.5, 0, 1, 0, 0.1])


def test_shuffles_stay_inside_their_group():
    group = np.array([0, 1, 0, 1, 2, 0])
    for order in metrics.shuffles(group, 50, 0):
        assert sorted(order) == list(range(6)) and np.array_equal(group[order], group)
    assert len({tuple(order) for order in metrics.shuffles(np.zeros(6, int), 50, 0)}) > 40


def test_p_is_that_of_scipy():
    rng = np.random.default_rng(0)
    truth = rng.normal(size=40)
    guess = 0.3 * truth + rng.normal(size=40)
    orders = metrics.shuffles(np.zeros(40, int), 4000, 0)
    ones = np.ones((1, 40))
    shuffled = metrics.permuted(lambda t: metrics.regression(t, guess, ones), truth, orders)
    observed = metrics.regression(truth, guess, ones)
    expected = stats.pearsonr(truth, guess, alternative="greater").pvalue
    assert metrics.p_value("r", observed["r"][0], shuffled["r"]) == pytest.approx(expected, abs=0.015)
    assert metrics.p_value("mse", observed["mse"][0], shuffled["mse"]) == pytest.approx(expected, abs=0.015)
    assert metrics.p_value("r", np.nan, shuffled["r"]) is None


def test_p_of_what_is_not_there_is_uniform_and_of_what_is_there_small():
    chosen = task(GROUP | {"split": {"folds": 3, "repeats": 1}})
    found = cases_of(chosen, sessions(40, 1, group=lambda s: "AB"[s % 2]))
    rng = np.random.default_rng(0)
    values = []
    for _ in range(20):
        noise = rng.normal(size=(40, 8))
        found.truth_S = rng.permutation(found.truth_S)
        result = probe.run_task(chosen, found, {"ours": Linear(lambda train, x=noise: x)}, "")
        values.append(result.estimates["ours"]["auroc"].p)
    assert 0.25 < np.mean(values) < 0.75
    planted = rng.normal(size=(40, 8)) + 2 * found.truth_S[found.subject_N][:, None]
    result = probe.run_task(chosen, found, {"ours": Linear(lambda train: planted)}, "")
    assert result.estimates["ours"]["auroc"].p == 0.01


def test_fingerprints_have_a_p_too():
    rng = np.random.default_rng(0)
    chosen = task(WHO)
    found = cases_of(chosen, sessions(20, 2))
    person = rng.normal(size=(20, 30))[found.subject_N]
    for vectors, low, high in ((person, 0.01, 0.01), (rng.normal(size=(40, 30)), 0.02, 1.0)):
        result = probe.run_task(chosen, found, {"ours": Linear(lambda train, x=vectors: x)}, "")
        assert low <= result.estimates["ours"]["map"].p <= high
