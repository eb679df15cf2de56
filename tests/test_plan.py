"""What a configuration costs, told before it is run."""

from __future__ import annotations

import json
from dataclasses import asdict

import numpy as np
import pytest
from einops import reduce

from shards.errors import ConfigError
from shards.grid import Grid
from slim.config import PRESETS, PretrainSettings
from slim.plan import Cost, cost, mni_brain

COARSE = Grid(mm=8.0, shape=(24, 24, 24))


def settings(**other: object) -> PretrainSettings:
    run = {"out": "x", "batch": 1} | other.pop("run", {})
    return PretrainSettings(data="not/there", model=PRESETS["tiny"], windows={"k": 2}, run=run, **other)


@pytest.fixture(scope="module")
def one() -> Cost:
    return cost(settings(), COARSE)


def test_what_is_told_about_a_configuration(one: Cost) -> None:
    assert json.loads(json.dumps(asdict(one))) == asdict(one)
    assert one.parameters["encoder"] == one.parameters["target"] > one.parameters["predictor"] > 0
    patches = reduce(mni_brain(COARSE), "(x a) (y b) (z c) -> x y z", "max", a=4, b=4, c=4).sum()
    assert one.tokens["grid"] == 10 * 6**3 and one.tokens["brain"] == 10 * patches
    assert 0.1 < one.tokens["context"] / one.tokens["brain"] < 0.6
    assert one.peak_memory_bytes == sum(one.memory_parts.values())
    assert one.step_flops == sum(one.flops_parts.values())
    parts = {"states", "gradients", "batch", "targets", "encoder", "predictor", "backward", "optimizer", "means"}
    assert set(one.memory_parts) <= parts and set(one.flops_parts) <= parts
    weights = 3 * (one.parameters["encoder"] + one.parameters["predictor"]) + one.parameters["target"]
    assert one.memory_parts["states"] >= 4 * weights


def test_the_default_grid_is_that_of_the_shards() -> None:
    patches = reduce(mni_brain(Grid()), "(x a) (y b) (z c) -> x y z", "max", a=4, b=4, c=4)
    assert patches.shape == (24, 24, 24) and patches.sum() == 4476


def test_more_samples_cost_more_and_have_the_same_tokens(one: Cost) -> None:
    two = cost(settings(run={"batch": 2}), COARSE)
    assert two.tokens["brain"] == one.tokens["brain"] and two.parameters == one.parameters
    assert two.peak_memory_bytes > one.peak_memory_bytes
    assert two.step_flops == pytest.approx(2 * one.step_flops, rel=0.2)


def test_micro_batches_add_their_flops_and_find_gradients_that_lie_there(one: Cost) -> None:
    two, many = (cost(settings(run={"accumulate": times}), COARSE) for times in (2, 5))
    assert two.step_flops == 2 * one.step_flops and many.step_flops == 5 * one.step_flops
    assert one.peak_memory_bytes < two.peak_memory_bytes == many.peak_memory_bytes


def test_dense_drops_nothing(one: Cost) -> None:
    dense = cost(settings(), COARSE, dense=True)
    assert dense.tokens["context"] == dense.tokens["brain"] == dense.tokens["grid"] == one.tokens["grid"]
    assert dense.peak_memory_bytes > one.peak_memory_bytes and dense.step_flops > 2 * one.step_flops
    assert dense.parameters == one.parameters


def test_a_mask_that_is_given_is_the_brain() -> None:
    brain_XYZ = np.zeros(COARSE.shape, bool)
    brain_XYZ[3:9, 4:12, 8:20] = True  # 3 x 2 x 3 patches
    found = cost(settings(), COARSE, frames=10, brain_XYZ=brain_XYZ)
    assert found.tokens["grid"] == 20 * 6**3 and found.tokens["brain"] == 20 * 18


def test_units_that_do_not_fit_the_grid_are_refused() -> None:
    with pytest.raises(ConfigError, match="unit"):
        cost(settings(), Grid(mm=8.0, shape=(20, 20, 20)))
