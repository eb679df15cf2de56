"""What a step does to a micro-batch: targets, the running means that its terms need, and what a checkpoint keeps."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from helpers.batches import GEOMETRY, V, make_batch, settings
from slim.pretrain.learner import PretrainLearner
from slim.pretrain.objective import Objective
from slim.pretrain.running_mean import PlaceMean

pytestmark = pytest.mark.fast

MEANS = {"default": ["target_mean", "context_mean"], "jepa": ["target_mean"], "mae": []}


def learner(objective: str) -> PretrainLearner:
    torch.manual_seed(0)
    chosen = settings(objective=objective)
    return PretrainLearner(chosen, Objective(chosen, GEOMETRY, V))


def train(learner: PretrainLearner, optimizer: torch.optim.Optimizer, seeds: range) -> list[float]:
    losses = []
    for seed in seeds:
        found = learner.losses(make_batch(seed, seed + 1), seed)
        found.total.backward()
        optimizer.step()
        optimizer.zero_grad()
        learner.commit(0, 2)
        losses.append(found.total.item())
    return losses


@pytest.mark.parametrize("objective", MEANS)
def test_a_checkpoint_holds_the_running_means_in_use_and_a_run_goes_on_from_it_exactly(objective: str) -> None:
    first = learner(objective)
    assert list(first.means) == MEANS[objective]
    optimizer = torch.optim.SGD(first.model.parameters(), lr=0.01)
    for _ in range(2):
        first.calibrate([make_batch(1, 2)])
    train(first, optimizer, range(2))
    state = {name: value.detach().clone() for name, value in first.state().items()}
    assert {name.split(".")[0] for name in state} == {"encoder", "target", *MEANS[objective]}

    second = learner(objective)
    second.model.load_state_dict(first.model.state_dict())  # as an engine does
    second.load(state | {"context_mean.mean": torch.zeros(1)} if objective != "default" else state)  # of older versions
    again = torch.optim.SGD(second.model.parameters(), lr=0.01)
    assert train(second, again, range(2, 5)) == train(first, optimizer, range(2, 5))
    for name, value in first.state().items():
        assert torch.equal(second.state()[name], value), name


def test_targets_are_centred_by_place_and_standardised_per_channel() -> None:
    mine, batch = learner("default"), make_batch(1, 2, 3)
    for _ in range(2):
        mine.calibrate([batch])
    given = []

    def engine(*words):
        given.extend(words)
        return mine.model(*words)

    centred_KC = mine.losses(batch, 7, engine).features["target"]
    feature_MC = mine.target.features(batch).double().numpy()
    cells, cell_M = np.unique(batch.whole.cell_M.numpy(), return_inverse=True)
    mean_MC = np.stack([feature_MC[cell_M == n].mean(axis=0) for n in range(len(cells))])[cell_M]
    sd_C = np.sqrt(((feature_MC - mean_MC) ** 2).mean(axis=0))
    expected_KC = (feature_MC - mean_MC)[batch.targets.row_K.numpy()]
    assert given[0] is batch and given[2] is mine.means["context_mean"].mean and given[3] == 7
    np.testing.assert_allclose(centred_KC, expected_KC, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(given[1], expected_KC / np.maximum(sd_C, 0.1), rtol=1e-4, atol=1e-4)
    assert not given[1].requires_grad


def test_calibrating_measures_means_of_the_untrained_encoder_over_all_batches() -> None:
    mine, batches = learner("default"), [make_batch(1, 2), make_batch(3)]
    for _ in range(2):
        mine.calibrate(batches)
    for name, features in (
        ("target_mean", [(mine.target.features(batch), batch.whole) for batch in batches]),
        ("context_mean", [(mine.model.encoder(batch.voxels, batch.context), batch.context) for batch in batches]),
    ):
        size = mine.means[name].mean.shape
        expected = PlaceMean(*size, 0.95, torch.device("cpu"))
        x_MC, cell_M = torch.cat([x.detach() for x, _ in features]), torch.cat([plan.cell_M for _, plan in features])
        for _ in range(2):
            expected.observe(x_MC, cell_M)
            expected.commit()
        for kind in ("mean", "variance", "seen"):
            assert torch.allclose(getattr(mine.means[name], kind), getattr(expected, kind), atol=1e-5), (name, kind)


def test_nothing_is_drawn_from_generators_that_a_checkpoint_would_have_to_hold() -> None:
    mine = learner("default")
    optimizer = torch.optim.SGD(mine.model.parameters(), lr=0.01)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    mine.calibrate([make_batch(1, 2)])
    train(mine, optimizer, range(2))
    after = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    assert torch.equal(before[0], after[0]) and before[1:] == after[1:]
