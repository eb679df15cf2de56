"""Attention finds what a mean hides, and falls back to the mean; nothing leaks into a fit, padding least of all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from helpers.records import session_record
from shards.core.settings import check
from slim.evaluation import attentive, probe
from slim.evaluation.attentive import Attentive
from slim.evaluation.division import make_splits
from slim.evaluation.linear import Linear
from slim.evaluation.splits import Fold
from slim.evaluation.task import Cases, Task
from slim.inference import vectors
from slim.inference.slim_brain import Features
from slim.model import pooling

PLACES, DIM = 12, 10  # channels 0 to 4 tell the place, 5 tells an event, the rest are noise
TASK = {"name": "t", "label": "x", "bootstrap": 100, "split": {"folds": 4, "repeats": 1}}


def made_up(subjects: int, each: int = 1, seed: int = 0) -> tuple[list[Features], np.ndarray]:
    """Sessions of 5 to 8 slots with nothing planted, and the subject of each; a person's noise is alike."""
    rng = np.random.default_rng(seed)
    code_LC = rng.normal(size=(PLACES, 5))
    made = []
    for subject in range(subjects):
        person_LC = 0.5 * rng.normal(size=(PLACES, DIM))
        for visit in range(each):
            token_SLC = rng.normal(size=(rng.integers(5, 9), PLACES, DIM)) + person_LC
            token_SLC[:, :, :5] = code_LC + 0.3 * token_SLC[:, :, :5]
            token_SLC[:, :, 5] = 0
            slots = len(token_SLC)
            made.append(
                Features(
                    f"{subject}-{visit}", token_SLC.astype(np.float32), np.arange(PLACES), *[np.arange(slots) * 3.6] * 2
                )
            )
    return made, np.repeat(np.arange(subjects), each)


def in_places(item: Features, value: float) -> None:
    """One place gains what another loses: the mean over places is as it was."""
    item.tokens[:, 3, 6] += 3 * value
    item.tokens[:, 7, 6] -= 3 * value


def in_an_event(item: Features, value: float) -> None:
    """A few tokens of one slot, told by a channel; the other slots take it off the mean again."""
    item.tokens[2, :3, 5] = 4
    item.tokens[2, :3, 6] += 2 * value
    item.tokens[:, :, 6] -= 2 * value * 3 / item.tokens[:, :, 0].size


def question(kind: str, subject_N: np.ndarray, truth_S: np.ndarray) -> tuple[Task, Cases]:
    subjects = [("c", str(number)) for number in range(len(truth_S))]
    classes = [str(k) for k in np.unique(truth_S)] if kind == "classification" else []
    sessions = [session_record(key=str(row)) for row in range(len(subject_N))]
    return check(Task, TASK | {"type": kind}, "t"), Cases(sessions, subject_N, subjects, truth_S, classes)


def answers(kind: str, subjects: int) -> np.ndarray:
    return np.arange(subjects) % 2 if kind == "classification" else np.linspace(-1.7, 1.7, subjects)


def first_fold(kind: str, subject_N: np.ndarray) -> Fold:
    truth_S = answers(kind, subject_N.max() + 1)
    task, cases = question(kind, subject_N, truth_S)
    split = make_splits(task, cases, "")[0][0]
    train, test = split.train, split.test
    return Fold(kind, len(cases.classes), train, test, truth_S[subject_N[train]], subject_N[train], 0)


def by_mean(sessions: list[Features]) -> Linear:
    pooled = vectors.pool(sessions, "mean", 1, np.arange(0))
    return Linear(lambda train: pooled)


# what it finds


@pytest.mark.parametrize("kind", ["classification", "regression"])
@pytest.mark.parametrize("plant", [in_places, in_an_event])
def test_finds_what_the_mean_hides(plant: Callable[[Features, float], None], kind: str):
    sessions, subject_N = made_up(48)
    truth_S = answers(kind, 48)
    for item, subject in zip(sessions, subject_N, strict=True):
        plant(item, 2.0 * truth_S[subject] - 1 if kind == "classification" else truth_S[subject])
    task, cases = question(kind, subject_N, truth_S)
    result = probe.run_task(task, cases, {"ours": Attentive(sessions), "random": by_mean(sessions)}, "")
    if kind == "classification":
        assert result.estimates["ours"]["auroc"].value > 0.9 and result.estimates["random"]["auroc"].value < 0.7
    else:
        assert result.estimates["ours"]["r"].value > 0.7 and result.estimates["random"]["r"].value < 0.4


def test_shuffled_answers_give_chance():
    sessions, subject_N = made_up(40, each=2)
    method, rng = Attentive(sessions), np.random.default_rng(0)
    found = []
    for _ in range(3):
        task, cases = question("classification", subject_N, rng.permutation(np.arange(40) % 2))
        found.append(probe.score(task, cases, make_splits(task, cases, ""), method)["auroc"][0])
    assert 0.35 < np.mean(found) < 0.65


@pytest.mark.parametrize("kind", ["classification", "regression"])
def test_untrained_it_is_the_probe_of_the_mean(kind: str, monkeypatch: pytest.MonkeyPatch):
    sessions, subject_N = made_up(24, each=2)
    fold = first_fold(kind, subject_N)
    monkeypatch.setattr(attentive, "STEPS", (0,))
    np.testing.assert_allclose(Attentive(sessions).predict(fold), by_mean(sessions).predict(fold), atol=1e-4)


def test_more_than_two_classes():
    sessions, subject_N = made_up(36)
    truth_S = np.arange(36) % 3
    for item, answer in zip(sessions, truth_S, strict=True):
        item.tokens[:, 3, 6 + answer] += 3
    task, cases = question("classification", subject_N, truth_S)
    result = probe.run_task(task, cases, {"ours": Attentive(sessions)}, "")
    assert result.estimates["ours"]["auroc"].value > 0.9


# what it is


@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=4), seed=st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_is_multi_head_attention_of_constant_queries(lengths: list[int], seed: int):
    """Against torch's own: its projections of queries and keys as one vector a head, those of values afterwards."""
    g = torch.Generator().manual_seed(seed)
    heads, dim, size = 3, 12, 4
    reference = nn.MultiheadAttention(dim, heads, bias=False, batch_first=True).double().requires_grad_(False)
    for weight in reference.parameters():
        weight.normal_(generator=g)
    query_C = torch.randn(dim, generator=g, dtype=torch.float64)
    token_BTC = torch.randn(len(lengths), max(lengths), dim, generator=g, dtype=torch.float64)
    valid_BT = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    expected, _ = reference(query_C.expand(len(lengths), 1, dim), token_BTC, token_BTC, ~valid_BT)

    of_query, of_key, of_value = reference.in_proj_weight.unflatten(0, (3, heads, size))
    query_1AC = torch.einsum("ae,aec->ac", of_query @ query_C, of_key)[None] / size**0.5
    gathered_BAC = pooling.attentive(query_1AC, token_BTC, valid_BT)[:, 0]
    value_BC = torch.einsum("bac,aec->bae", gathered_BAC, of_value).flatten(1)
    torch.testing.assert_close(value_BC @ reference.out_proj.weight.T, expected[:, 0])


@given(lengths=st.lists(st.integers(1, 9), min_size=2, max_size=4), seed=st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_padding_never_matters(lengths: list[int], seed: int):
    g = torch.Generator().manual_seed(seed)
    query_MAC = torch.randn(2, 3, 5, generator=g)
    token_BTC = torch.randn(len(lengths), max(lengths), 5, generator=g)
    valid_BT = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    together = pooling.attentive(query_MAC, torch.where(valid_BT[:, :, None], token_BTC, 1e6), valid_BT)
    for row, length in enumerate(lengths):
        alone = pooling.attentive(query_MAC, token_BTC[row : row + 1, :length], valid_BT[row : row + 1, :length])
        torch.testing.assert_close(together[row], alone[0], rtol=1e-5, atol=1e-5)


def test_a_session_is_pooled_alike_alone_and_beside_longer_ones():
    sessions, subject_N = made_up(24)
    assert len({len(item.tokens) for item in sessions}) > 1
    method, fold = Attentive(sessions), first_fold("classification", subject_N)
    query_MAC = method.fit(fold, fold.inner())[-1]
    together = method.pool(query_MAC, np.arange(24))
    for row in range(24):
        np.testing.assert_allclose(method.pool(query_MAC, np.array([row]))[0], together[row], rtol=1e-4, atol=1e-5)


def test_more_sessions_than_a_batch_holds(monkeypatch: pytest.MonkeyPatch):
    sessions, subject_N = made_up(48)
    truth_S = answers("classification", 48)
    for item, subject in zip(sessions, subject_N, strict=True):
        in_places(item, 2.0 * truth_S[subject] - 1)
    method, rows = Attentive(sessions), np.arange(48)
    query_MAC = torch.randn(2, 3, DIM, generator=torch.Generator().manual_seed(0))
    at_once = method.pool(query_MAC, rows)
    monkeypatch.setattr(attentive, "_BATCH", 17)
    np.testing.assert_allclose(method.pool(query_MAC, rows), at_once, rtol=1e-5, atol=1e-5)
    task, cases = question("classification", subject_N, truth_S)
    assert probe.score(task, cases, make_splits(task, cases, ""), method)["auroc"][0] > 0.85


def test_the_order_of_tokens_does_not_matter():
    sessions, subject_N = made_up(24)
    fold, rng = first_fold("regression", subject_N), np.random.default_rng(0)
    mixed = []
    for item in sessions:
        token_TC = item.tokens.reshape(-1, DIM)
        mixed.append(replace(item, tokens=rng.permutation(token_TC).reshape(item.tokens.shape)))
    query_MAC, again_MAC = (Attentive(each).fit(fold, fold.inner())[1] for each in (sessions, mixed))
    assert query_MAC.abs().max() > 0.01
    torch.testing.assert_close(again_MAC, query_MAC, rtol=1e-2, atol=1e-4)
    np.testing.assert_allclose(
        Attentive(mixed).pool(query_MAC, fold.test), Attentive(sessions).pool(query_MAC, fold.test), atol=1e-5
    )


def test_channels_may_have_any_unit():
    sessions, subject_N = made_up(24)
    fold = first_fold("regression", subject_N)
    unit_C = np.logspace(-2, 2, DIM, dtype=np.float32)
    other = [replace(item, tokens=item.tokens * unit_C + 3 * unit_C) for item in sessions]
    np.testing.assert_allclose(Attentive(other).predict(fold), Attentive(sessions).predict(fold), atol=1e-3)


# what it must not see


def test_the_seed_decides_and_the_global_generator_is_left_alone():
    sessions, subject_N = made_up(24)
    fold = first_fold("classification", subject_N)
    torch.manual_seed(5)
    state, numpy_state = torch.random.get_rng_state(), np.random.get_state()[1].tolist()  # noqa: NPY002
    first = Attentive(sessions).predict(fold)
    assert torch.equal(state, torch.random.get_rng_state())
    assert numpy_state == np.random.get_state()[1].tolist()  # noqa: NPY002
    torch.manual_seed(6)
    np.testing.assert_array_equal(Attentive(sessions).predict(fold), first)
    inner_n = fold.inner()
    one, other = (Attentive(sessions).fit(replace(fold, seed=seed), inner_n)[-1] for seed in (0, 1))
    assert not torch.equal(one, other)


@pytest.mark.parametrize("kind", ["classification", "regression"])
def test_test_sessions_never_influence_the_fit(kind: str):
    sessions, subject_N = made_up(24)
    fold = first_fold(kind, subject_N)
    before, guess = Attentive(sessions).fit(fold, fold.inner()), Attentive(sessions).predict(fold)
    changed, *kept = fold.test
    sessions[changed] = replace(sessions[changed], tokens=sessions[changed].tokens[:3] * 1000)
    after, other = Attentive(sessions).fit(fold, fold.inner()), Attentive(sessions).predict(fold)
    assert all(torch.equal(one, two) for one, two in zip(before, after, strict=True))
    assert not np.allclose(other[0], guess[0])
    np.testing.assert_allclose(other[1:], guess[1:], rtol=1e-5)
    assert len(kept) == len(other) - 1


@pytest.mark.parametrize("kind", ["classification", "regression"])
def test_a_member_never_sees_its_inner_fold(kind: str):
    sessions, subject_N = made_up(32, each=2)
    fold = first_fold(kind, subject_N)
    inner_n = fold.inner()
    assert inner_n.max() == 4 and all(len(set(inner_n[fold.subject_n == who])) == 1 for who in fold.subject_n)
    before = Attentive(sessions).fit(fold, inner_n)[-1]
    for row in fold.train[inner_n == 1]:
        sessions[row] = replace(sessions[row], tokens=sessions[row].tokens[:, ::-1] * 3 + 1)
    answer_n = fold.answer_n.copy()
    answer_n[inner_n == 1] = 1 - answer_n[inner_n == 1]
    after = Attentive(sessions).fit(replace(fold, answer_n=answer_n), inner_n)[-1]
    assert len(before) == 6
    torch.testing.assert_close(after[1], before[1], rtol=1e-3, atol=1e-5)
    for member in (0, 2, 3, 4, 5):
        assert (after[member] - before[member]).abs().max() > 0.01
