"""Samples of short sessions: fewer frames than the grid, without repetition or padding."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import batches
from helpers.batches import GEOMETRY, V, make_sample, masked
from shards.core.errors import ConfigError, SampleCorrupt
from shards.core.settings import check
from slim.config import KINDS, PRESETS, DrawSettings, HeadSettings, PretrainSettings, TokenMaskSettings
from slim.data.collate import collate
from slim.data.masking import draw
from slim.data.samples import cell_sizes, read_windows, window_groups
from slim.inference import vectors
from slim.inference.vectors import Features
from slim.model.geometry import Geometry
from slim.model.head import Head
from slim.pretrain.learner import PretrainLearner
from slim.pretrain.objective import Objective
from slim.ranking.rankers import make_ranker

pytestmark = pytest.mark.fast

FRAMES = GEOMETRY.tokens[0]


@given(st.integers(1, 8), st.integers(1, 7), st.integers(1, 8), st.integers(1, 8))
def test_a_slot_belongs_to_the_window_with_the_middle_of_its_frames(cell: int, frames: int, k: int, windows: int):
    """By the frames themselves, for any number of windows up to k."""
    windows = min(windows, k)
    geometry = Geometry((k * frames * cell, 2), (cell, 1), ((cell, 1),))
    found_S = geometry.window_of_slot(frames, windows)
    slots = [range(windows * frames)[at : at + cell] for at in range(0, windows * frames, cell)]
    assert len(found_S) == geometry.slots(windows * frames) == len(slots)
    assert found_S.tolist() == [int((slot[0] + slot[-1] + 1) / 2 // frames) for slot in slots]
    assert found_S.max() < windows


@given(st.integers(1, 12), st.integers(1, 12))
def test_fewer_than_k_windows_are_one_group_without_repetition(k: int, count: int):
    groups = window_groups(count, k)
    read = [window for group in groups for window in range(count)[group.windows][group.repeated :]]
    assert read == list(range(count))
    if count <= k:
        assert [(group.windows, group.repeated) for group in groups] == [(slice(0, count), 0)]


@settings(max_examples=60, deadline=None)
@given(st.integers(1, FRAMES), st.integers(0, 999), st.floats(0.05, 0.95), st.floats(0.05, 0.95))
def test_masks_hold_only_cells_with_frames(frames: int, seed: int, places: float, times: float):
    sample = make_sample(seed % 7, frames=frames)
    size_SL = cell_sizes(GEOMETRY, sample.place, frames)
    assert size_SL.sum() == frames * len(sample.place)
    mask = draw(size_SL, TokenMaskSettings(context_places=places, context_times=times, targets=1), seed, 0, "key")
    cells = np.concatenate([mask.context_K, mask.target_K])
    assert len(np.unique(cells)) == len(cells) and (size_SL.ravel()[cells] > 0).all()
    assert len(mask.context_K) and len(mask.target_K)
    if GEOMETRY.slots(frames) == 1:  # there is no other time to predict
        assert {KINDS[kind] for kind in mask.kind_K} == {"cross_location"}
        assert len(cells) == np.count_nonzero(size_SL)


def test_rebuilt_rows_of_missing_frames_are_left_out():
    samples = [masked(make_sample(4, frames=3)), masked(make_sample(5)), masked(make_sample(6, frames=5))]
    batch = collate(samples, GEOMETRY, 100)
    assert batch.targets is not None
    places, seen = int(np.prod(GEOMETRY.tokens[1:])), set()
    for g, k in enumerate(batch.targets.rebuilt_G.tolist()):
        sample = samples[int(batch.targets.sample_K[k])]
        for e, token in enumerate(np.flatnonzero(GEOMETRY.cell_of == int(batch.targets.cell_K[k]))):
            frame, place = divmod(int(token), places)
            at = np.flatnonzero(sample.place == place)
            row, there = int(batch.targets.value_GE[g, e]), bool(len(at)) and frame < len(sample.second)
            assert (row >= 0) == (int(batch.targets.patch_GE[g, e]) >= 0) == there
            seen.add((bool(len(at)), there))
            if there:
                np.testing.assert_array_equal(batch.voxels.value_RV[row], sample.value[frame, at[0]])
    assert (True, False) in seen  # a patch with brain in a frame that is missing


def test_losses_of_a_mixed_batch_are_the_means_over_its_samples():
    """Each sample alone gives the same outputs, so the loss of the batch is a mean of those of its samples."""
    chosen = batches.settings(loss={"sig": 0})
    torch.manual_seed(0)
    model = Objective(chosen, GEOMETRY, V)
    learner = PretrainLearner(chosen, model)
    samples = [masked(make_sample(1)), masked(make_sample(2, frames=3)), masked(make_sample(3, frames=1))]

    def outputs(*chosen_samples):
        batch = collate(list(chosen_samples), GEOMETRY, 100)
        with torch.no_grad():
            context_MC = model.encoder(batch.voxels, batch.context)
            return model.predictor(context_MC, batch), batch, learner.losses(batch, 0)

    together_KW, batch, losses = outputs(*samples)
    alone = [outputs(sample) for sample in samples]
    for number, (found_KW, _, _) in enumerate(alone):
        torch.testing.assert_close(together_KW[batch.targets.sample_K == number], found_KW, rtol=1e-4, atol=1e-5)
    each = torch.stack([item.total for _, _, item in alone])
    assert torch.isfinite(each).all()
    jepa = torch.stack([item.logs["loss_jepa"] for _, _, item in alone])
    torch.testing.assert_close(losses.logs["loss_jepa"], jepa.mean(), rtol=1e-4, atol=1e-5)


def test_the_time_of_a_slot_is_the_mean_of_its_own_frames():
    sample = make_sample(1, frames=5)
    batch = collate([sample, make_sample(2)], GEOMETRY, None)
    slot = GEOMETRY.cell[0]
    found_S = batch.voxels.second_BT[0].unflatten(0, (-1, slot)).mean(dim=1)
    for number in range(GEOMETRY.slots(5)):
        own = sample.second[number * slot : (number + 1) * slot]
        assert float(found_S[number]) == pytest.approx(float(own.mean()), rel=1e-6)


@pytest.mark.parametrize("frames", [(8, 8), (8, 5), (4, 8), (8, 3)])
def test_cov_of_a_head_is_that_of_the_slots_of_each_sample(frames: tuple[int, int]):
    """The same as the probe's, from the tokens alone: a missing slot is not a slot of zeros."""
    rng = torch.Generator().manual_seed(1)
    samples = [make_sample(seed, frames=count) for seed, count in enumerate(frames)]
    samples[1] = dataclasses.replace(samples[1], place=samples[0].place)
    whole = collate(samples, GEOMETRY, None).whole
    x_MC = torch.randn(len(whole.cell_M), 6, generator=rng)
    head = Head(check(HeadSettings, {"components": 2}, "test"), 6, 2, GEOMETRY.cells)
    head.set_axes(head.scatter(x_MC, whole))
    found_BP = head.pool(x_MC, whole, 2)
    places = int(np.prod(GEOMETRY.cells[1:]))
    scatter_CC = np.zeros((6, 6))
    for number in range(2):
        mine = whole.sample_M == number
        slots = GEOMETRY.slots(frames[number])
        token_SLC = x_MC[mine][whole.cell_M[mine].argsort()].unflatten(0, (slots, -1))
        place_L = whole.cell_M[mine].sort().values[: token_SLC.shape[1]].numpy() % places
        item = Features("a", token_SLC.numpy(), place_L, np.arange(slots), np.arange(slots))
        expected = vectors.fitted(item, place_L, "cov", head.axis_CQ.numpy())
        series_P = np.zeros((places, 2), bool)
        series_P[place_L] = True
        row, column = np.triu_indices(places * 2, 1)
        both = series_P.ravel()[row] & series_P.ravel()[column]
        np.testing.assert_allclose(found_BP[number].numpy()[both], expected, atol=1e-4)
        centred = (token_SLC - token_SLC.mean(dim=0)).flatten(0, 1).double().numpy()
        scatter_CC += centred.T @ centred
    np.testing.assert_allclose(head.scatter(x_MC, whole).numpy(), scatter_CC, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["ridge", "variance", "median-variance", "leave-one-out", "uniform", "random"])
def test_the_only_window_of_a_scan_has_a_finite_score(name: str):
    rng = np.random.default_rng(0)
    parts = make_ranker(name).parts(rng.standard_normal((12, 7)), rng.uniform(-50, 50, (12, 3)), 5)
    for value_W in parts.values():
        assert value_W.shape == (1,) and np.isfinite(value_W).all()


def test_minimum_is_at_most_k():
    assert DrawSettings(k=8).least == 8 and DrawSettings(k=8, minimum=1).least == 1
    with pytest.raises(ConfigError, match=r"windows\.minimum: got 9, expected at most windows\.k, 8"):
        tree = {"data": "x", "model": PRESETS["tiny"], "run": {"out": "x"}, "windows": {"minimum": 9}}
        check(PretrainSettings, tree, "test")


def test_a_session_without_windows_is_refused():
    class Nothing:
        key = "lab_sub-01"

    with pytest.raises(SampleCorrupt, match="lab_sub-01: n_kept: got 0"):
        read_windows(None, Nothing(), [])  # type: ignore[arg-type]
