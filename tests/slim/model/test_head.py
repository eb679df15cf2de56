"""Heads on an encoder: poolings against references, and sizes that cannot be."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shards.core.errors import ConfigError
from shards.core.settings import check
from slim.config import HeadSettings
from slim.inference import vectors
from slim.inference.vectors import Features
from slim.model.head import Head

pytestmark = pytest.mark.fast


@given(st.lists(st.integers(1, 6), min_size=1, max_size=4), st.integers(0, 3), st.integers(0, 2**16))
def test_heads_pool_the_tokens_of_each_sample_by_softmax(lengths: list[int], queries: int, seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    x_MC = torch.randn(sum(lengths), 5, generator=rng)
    sample_M = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).int()
    order_M = torch.randperm(len(x_MC), generator=rng)  # tokens of samples need not lie together
    kind = {"pooling": "attentive", "queries": queries} if queries else {"pooling": "mean"}
    head = Head(check(HeadSettings, kind, "test"), 5, 2, (1, 6))
    plan: Any = SimpleNamespace(sample_M=sample_M[order_M])
    if queries:
        means = torch.stack([part.mean(dim=0).repeat(queries) for part in x_MC.split(lengths)])
        torch.testing.assert_close(head.pool(x_MC[order_M], plan, len(lengths)), means)
        head.query.data = 30 * torch.randn(queries, 5, generator=rng)
    expected = []
    for part in x_MC.split(lengths):
        share = torch.full((1, len(part)), 1 / len(part))
        if queries:
            share = (head.query @ part.T / 5**0.5).softmax(dim=1)
        expected.append((share @ part).flatten())
    torch.testing.assert_close(head.pool(x_MC[order_M], plan, len(lengths)), torch.stack(expected))


@given(
    st.lists(st.sets(st.integers(0, 5), min_size=1), min_size=1, max_size=4), st.integers(1, 3), st.integers(0, 2**16)
)
def test_cov_is_that_of_the_probe(brains: list[set[int]], components: int, seed: int) -> None:
    """Axes of largest variance over time, then correlations; places without brain correlate with nothing."""
    slots, places, rng = 4, 6, torch.Generator().manual_seed(seed)
    samples, tokens, cells = [], [], []
    for number, brain in enumerate(brains):
        cells += [slot * places + place for slot in range(slots) for place in sorted(brain)]
        samples += [number] * slots * len(brain)
        tokens.append(
            torch.randn(slots, len(brain), 5, generator=rng) + 3 * torch.randn(1, len(brain), 5, generator=rng)
        )
    order_M = torch.randperm(len(cells), generator=rng)
    x_MC = torch.cat([token.flatten(0, 1) for token in tokens])[order_M]
    plan: Any = SimpleNamespace(
        sample_M=torch.tensor(samples).int()[order_M],
        cell_M=torch.tensor(cells).int()[order_M],
        slots_B=[slots] * len(brains),
    )
    head = Head(check(HeadSettings, {"components": components}, "test"), 5, 2, (slots, 1, 2, 3))
    head.set_axes(head.scatter(x_MC, plan))
    found_BP = head.pool(x_MC, plan, len(brains))
    assert found_BP.shape == (len(brains), len(np.triu_indices(places * components, 1)[0]))
    scatter_CC = sum(np.cov(token[:, n].T, bias=True) for token in tokens for n in range(token.shape[1]))
    axis_CQ = np.linalg.eigh(scatter_CC)[1][:, ::-1][:, :components]
    assert np.abs((axis_CQ * head.axis_CQ.numpy()).sum(axis=0)) == pytest.approx(np.ones(components), abs=1e-3)
    for found_P, brain, token in zip(found_BP, brains, tokens, strict=True):
        whole_SLC = torch.zeros(slots, places, 5)
        whole_SLC[:, sorted(brain)] = token
        item = Features("a", whole_SLC.numpy(), np.arange(places), np.arange(slots), np.arange(slots))
        expected = vectors.fitted(item, np.arange(places), "cov", head.axis_CQ.double().numpy())
        np.testing.assert_allclose(found_P, expected, atol=2e-3)


def test_heads_that_cannot_be_are_told() -> None:
    with pytest.raises(ConfigError, match=r"head\.components: got 6, expected at most 5"):
        Head(check(HeadSettings, {"components": 6}, "test"), 5, 2, (4, 2, 2, 2))
    with pytest.raises(ConfigError, match=r"head\.pooling: got cov with 4498500 pairs of 1000 places"):
        Head(HeadSettings(), 5, 2, (4, 10, 10, 10))
