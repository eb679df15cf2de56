"""Rankers: their formulas, what they must not depend on, and whether they find planted events."""

from __future__ import annotations

import json
import multiprocessing
import pickle
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from scipy.stats import iqr
from sklearn.linear_model import Ridge

from launchers.benches.simulate import SNR, simulate
from shards.core.errors import ConfigError, RunRefused
from slim.ranking.extractor import Extractor, standardise
from slim.ranking.extractor_training import train_extractor
from slim.ranking.rankers import make_ranker
from slim.ranking.saliency import (
    calmness,
    even_folds,
    folds,
    frame_standing,
    frame_weights,
    rebuild_by_ridge,
    space_energy,
    space_energy_of_parcels,
    standing,
    time_energy,
    time_energy_of_parcels,
)

FRAMES = 5
# Scores by version 0.1 of `planted_run(3, windows=12, parcels=20)`.
RIDGE_0_1 = (-1.3561, -1.0306, -0.6925, -0.5382, -0.3491, 0.357, -0.1783, 1.3397, -0.1916, -0.965, -0.368, 0.73)
NAMES = ["mutual", "ridge", "median-variance", "variance", "leave-one-out", "uniform", "random"]


def planted_run(seed: int, windows: int = 120, parcels: int = 63) -> tuple[np.ndarray, np.ndarray]:
    """(roi_RT, centre_R3) of a simulated run with events, spikes and slow incoherent bursts."""
    centre_R3 = np.random.default_rng(seed).uniform([-70, -90, -60], [70, 90, 60], (parcels, 3))
    run = simulate("fmri", SNR["fmri"][1], True, seed, centre_R3.astype(np.float32), windows)
    return run.roi_RT, run.centre_R3


@pytest.fixture(scope="module")
def extractor() -> Extractor:
    return train_extractor([planted_run(1000 + seed) for seed in range(12)], steps=100)


@pytest.fixture(scope="module")
def rankers(extractor):
    return {name: make_ranker(name, extractor if name == "mutual" else None) for name in NAMES}


# ---- formulas


def test_space_energy_is_the_ridge_regression_of_one_half_on_the_other():
    z_RT = standardise(planted_run(1, windows=40, parcels=23)[0])[0][0].astype(np.float64)
    windows, weight_T = 40, frame_weights(z_RT)
    slow_T = np.zeros(windows * FRAMES)
    rng = np.random.default_rng(3)
    for _ in range(4):
        order = rng.permutation(23)
        hidden, seen = order[:11], order[11:]
        for fold in range(6):
            tested = [t for t in range(windows * FRAMES) if t // FRAMES // 3 % 6 == fold]
            known = [t for t in range(windows * FRAMES) if min(abs(t - other) for other in tested) > 3]
            # Ridge sums over frames, the covariance averages: the penalty grows by the total weight.
            model = Ridge(alpha=0.3 * weight_T[known].sum(), fit_intercept=False)
            model.fit(z_RT[np.ix_(seen, known)].T, z_RT[np.ix_(hidden, known)].T, weight_T[known])
            truth = z_RT[np.ix_(hidden, tested)].T
            error = truth - model.predict(z_RT[np.ix_(seen, tested)].T)
            slow_T[tested] += np.mean(truth**2 - error**2, axis=1) / 4
    fast_W = space_energy(z_RT.astype(np.float32), FRAMES, seed=3, folds=folds)
    np.testing.assert_allclose(fast_W, slow_T.reshape(windows, FRAMES).mean(axis=1), atol=2e-4)


@settings(deadline=None, max_examples=60)
@given(windows=st.integers(2, 60), frames=st.integers(1, 8), divide=st.sampled_from([folds, even_folds]))
def test_every_frame_is_tested_once_and_never_near_what_teaches_it(windows, frames, divide):
    pairs = divide(windows, frames)
    assert len(pairs) >= 2
    np.testing.assert_array_equal(np.sum([tested for tested, _ in pairs], axis=0), 1)
    for tested_T, known_T in pairs:
        if windows * frames > 10:
            assert known_T.any()
        apart = np.abs(np.flatnonzero(tested_T)[:, None] - np.flatnonzero(known_T))
        assert apart.size == 0 or apart.min() > 3


@pytest.mark.parametrize("windows", range(6, 130))
def test_even_folds_teach_all_windows_from_as_many_frames(windows):
    known = [np.count_nonzero(known_T) for _, known_T in even_folds(windows, FRAMES)]
    blocks = max(1, round(windows / 18))
    # Blocks differ by a window, and those at the ends of the scan have a margin on one side only.
    assert max(known) - min(known) <= blocks * FRAMES + 3


def test_spikes_weigh_little():
    z_RT = np.random.default_rng(0).standard_normal((50, 100))
    z_RT[:, 30] *= 15
    weight_T = frame_weights(z_RT)
    assert weight_T[30] < 0.02 and np.delete(weight_T, 30).min() > 0.9


def test_time_by_ridge_is_the_best_interpolation_of_a_stationary_process():
    rng = np.random.default_rng(0)
    z_RT = np.zeros((400, 300))
    for t in range(1, 300):
        z_RT[:, t] = 0.9 * z_RT[:, t - 1] + np.sqrt(1 - 0.81) * rng.standard_normal(400)
    z_RT = standardise(z_RT)[0][0]
    rebuilt_RT = rebuild_by_ridge(z_RT, FRAMES)
    # Least squares on every inner window at once, own frames of the parcel only.
    inner = range(5, 290, 5)
    near = [-3, -2, -1, 5, 6, 7]
    x = np.concatenate([z_RT[:, [first + i for i in near]] for first in inner])
    y = np.concatenate([z_RT[:, first : first + 5] for first in inner])
    best = y - x @ np.linalg.lstsq(x, y, rcond=None)[0]
    ours = np.concatenate([(z_RT - rebuilt_RT)[:, first : first + 5] for first in inner])
    assert np.mean(best**2) <= np.mean(ours**2) < 1.01 * np.mean(best**2)
    energy_W = time_energy(z_RT, rebuilt_RT, FRAMES)
    assert (energy_W > 0.1).all()  # the ends of the run too, where one side is missing


def test_a_window_is_not_part_of_its_own_reconstruction_by_ridge():
    z_RT = standardise(planted_run(2)[0])[0][0]
    changed_RT = z_RT.copy()
    changed_RT[:, 50:55] = 0
    difference = np.abs(rebuild_by_ridge(z_RT, FRAMES) - rebuild_by_ridge(changed_RT, FRAMES))
    assert difference[:, 50:55].max() < 0.02 < difference[:, 45:50].max()  # only through the autocorrelation


@pytest.mark.parametrize("gap", [0, 1])
def test_frames_are_predicted_as_by_ridge_regression_on_those_near_them(gap):
    rng = np.random.default_rng(0)
    kernel = [1, 2, 3, 3, 2, 1]
    smooth_RT = np.stack([np.convolve(row, kernel, mode="valid") for row in rng.standard_normal((300, 205))])
    z_RT = standardise(smooth_RT)[0][0]
    # Least squares on all inner frames at once, from the same six frames of the same parcel.
    near, inner = [s * (gap + i) for s in (-1, 1) for i in (1, 2, 3)], range(5, 195)
    x = np.concatenate([z_RT[:, [t + i for i in near]] for t in inner])
    guess = x @ np.linalg.lstsq(x, np.concatenate([z_RT[:, t] for t in inner]), rcond=None)[0]
    energy = (np.square(z_RT[:, 5:195]) - np.square(z_RT[:, 5:195] - guess.reshape(190, -1).T)).mean(axis=0)
    found_W = frame_standing(z_RT, FRAMES, np.ones(40), gap)
    assert np.corrcoef(found_W[1:-1], energy.reshape(38, 5).mean(axis=1))[0, 1] > 0.98


def test_an_end_is_compared_with_windows_that_have_the_neighbours_it_has():
    z_RT = standardise(planted_run(2)[0])[0][0]
    found_W = frame_standing(z_RT, FRAMES, np.ones(120))
    backwards_W = frame_standing(z_RT[:, ::-1].copy(), FRAMES, np.ones(120))
    np.testing.assert_allclose(backwards_W, found_W[::-1], atol=1e-4)
    # Less of an end can be predicted. Its standing among windows with more neighbours shows it, this one does not.
    rng, fair, naive = np.random.default_rng(1), [], []
    for _ in range(40):
        noise_RT = ndimage.gaussian_filter1d(rng.standard_normal((40, 140)), 2, axis=1)[:, 20:120]
        z_RT = standardise(noise_RT)[0][0]
        fair.append(frame_standing(z_RT, FRAMES, np.ones(20))[[0, -1]])
        naive.append(standing(time_energy(z_RT, rebuild_by_ridge(z_RT, FRAMES), FRAMES))[[0, -1]])
    assert abs(np.mean(fair)) < 0.25 and np.mean(naive) < -0.5


@pytest.mark.parametrize("frames", [1, 2, 5])
@pytest.mark.parametrize("windows", [2, 3, 9])
def test_short_scans_stand_somewhere(windows, frames):
    z_RT = np.random.default_rng(0).standard_normal((6, windows * frames)).astype(np.float32)
    for gap in (0, 1):
        found_W = frame_standing(z_RT, frames, np.ones(windows), gap)
        assert found_W.shape == (windows,) and np.isfinite(found_W).all()


def test_a_window_is_as_calm_as_its_most_outlying_frame():
    z_RT = np.random.default_rng(0).standard_normal((200, 50))
    z_RT[:, 12] *= 6
    z_RT[:, 31] *= 1.2  # within what is usual
    calm_W = calmness(z_RT, FRAMES)
    np.testing.assert_allclose(calm_W[2], 1.5 / 6, rtol=0.15)
    np.testing.assert_array_equal(np.delete(calm_W, 2), 1)


@settings(deadline=None, max_examples=60)
@given(
    values=st.lists(st.floats(-4, 4, width=32), min_size=2, max_size=40),
    factor=st.floats(0.5, 1e6),
    shift=st.floats(-1e3, 1e3),
)
def test_standing_is_a_common_scale(values, factor, shift):
    value_W = np.array(values)
    standing_W = standing(value_W)
    assert np.isfinite(standing_W).all() and np.median(standing_W) == pytest.approx(0, abs=1e-9)
    order = np.argsort(value_W)
    assert (np.diff(standing_W[order]) >= 0).all()
    if iqr(value_W) > 0.01:
        assert iqr(standing_W) == pytest.approx(1)
        np.testing.assert_allclose(standing(factor * value_W + shift), standing_W, atol=1e-6)


def test_windows_that_do_not_differ_all_stand_at_nothing():
    np.testing.assert_array_equal(standing(np.full(9, 0.3)), 0)
    assert np.abs(standing(0.3 + 1e-7 * np.random.default_rng(0).standard_normal(9))).max() < 1e-3


@pytest.mark.parametrize("version", [1, 2])
def test_mutual_and_ridge_follow_the_definition(extractor, version):
    roi_RT, centre_R3 = planted_run(3)
    for name in ("mutual", "ridge"):
        parts = np.zeros((3, 120))
        for z_RT in standardise(roi_RT)[0]:
            rebuilt = extractor.rebuild(z_RT, centre_R3) if name == "mutual" else rebuild_by_ridge(z_RT, FRAMES)
            rms_T = np.sqrt(np.mean(z_RT**2, axis=0))
            divide = folds if version == 1 else even_folds
            by_space_W = space_energy(z_RT, FRAMES, 0, divide)
            calm_W, energy = np.zeros(120), np.zeros((2, 120))
            for w in range(120):
                inside = slice(FRAMES * w, FRAMES * (w + 1))
                calm_W[w] = min(1, 1.5 * np.median(rms_T) / rms_T[inside].max())
                z, zhat = z_RT[:, inside], rebuilt[:, inside]
                energy[0, w] = calm_W[w] * by_space_W[w]
                energy[1, w] = calm_W[w] * (np.mean(z**2) - np.mean((z - zhat) ** 2))
            space, time = ((row - np.median(row)) / iqr(row) for row in energy)
            if version == 2:
                near, far = (frame_standing(z_RT, FRAMES, calm_W, gap) for gap in (0, 1))
                far = far if name == "ridge" else (far + time) / 2
                time = np.minimum(near, far + 0.5)
            parts += np.minimum(space, time), space, time
        first, last = (0, 119) if version == 1 else (1, 118)
        before, after = parts[:, [first, *range(119)]], parts[:, [*range(1, 120), last]]
        ranker = make_ranker(name, extractor if name == "mutual" else None, version=version)
        found = ranker.parts(roi_RT, centre_R3, FRAMES)
        assert list(found) == ["scores", "scores_space", "scores_time"]
        for value_W, expected_W in zip(found.values(), (before + 4 * parts + after) / 6, strict=True):
            np.testing.assert_allclose(value_W, expected_W, atol=1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_parts_say_what_limits_the_score(rankers, name):
    roi_RT, centre_R3 = planted_run(3)
    parts = rankers[name].parts(roi_RT, centre_R3, FRAMES)
    np.testing.assert_array_equal(parts["scores"], rankers[name].scores(roi_RT, centre_R3, FRAMES))
    assert all(value_W.shape == (120,) and value_W.dtype == np.float32 for value_W in parts.values())
    if name not in ("mutual", "ridge"):
        assert list(parts) == ["scores"]
        return
    assert (parts["scores"] <= np.minimum(parts["scores_space"], parts["scores_time"]) + 1e-4).all()
    # A spike of one frame without a counterpart in time is limited by time, for both.
    spiked_RT = roi_RT.copy()
    spiked_RT[:, 303] += 40 * np.sin(centre_R3[:, 0] / 40)
    spiked = rankers[name].parts(spiked_RT, centre_R3, FRAMES)
    assert spiked["scores_time"][60] < spiked["scores_space"][60]
    assert spiked["scores"][60] < parts["scores"][60]


@pytest.mark.parametrize("divide", [folds, even_folds])
def test_energies_of_parcels_have_the_energy_of_the_window_as_their_mean(divide):
    z_RT = standardise(planted_run(4, windows=60, parcels=21)[0])[0][0]
    rng = np.random.default_rng(3)
    times_R = np.bincount(np.concatenate([rng.permutation(21)[:10] for _ in range(4)]), minlength=21)
    space_RW = space_energy_of_parcels(z_RT, FRAMES, 3, divide)
    np.testing.assert_array_equal(space_RW.any(axis=1), times_R > 0)
    expected_W = space_energy(z_RT, FRAMES, 3, divide)
    np.testing.assert_allclose(times_R @ space_RW / 40, expected_W, atol=1e-5)  # 4 splits of 10 hidden parcels
    # the first and the last window are compared with others in a way of their own
    near_W = time_energy_of_parcels(z_RT, FRAMES).mean(axis=0)
    expected_W = frame_standing(z_RT, FRAMES, np.ones(60))
    np.testing.assert_allclose(standing(near_W[1:-1]), expected_W[1:-1], atol=1e-5)
    short_RT = z_RT[:, : 2 * FRAMES]
    assert time_energy_of_parcels(short_RT, FRAMES).shape == (21, 2)


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("name", ["mutual", "ridge"])
def test_energies_tell_which_parcels_carry_a_score(extractor, name, version):
    """A parcel that shares nothing with the others is predicted from none; a constant one has no energy."""
    roi_RT, centre_R3 = planted_run(4, windows=60)
    roi_RT[5] = 3
    roi_RT[6] = np.random.default_rng(0).standard_normal(300)
    ranker = make_ranker(name, extractor if name == "mutual" else None, version=version)
    found = ranker.energies(roi_RT, centre_R3, FRAMES)
    assert list(found) == ["scores_space", "scores_time"]
    assert all(value_RW.shape == (63, 60) and value_RW.dtype == np.float32 for value_RW in found.values())
    for value_RW in found.values():
        assert not value_RW[5].any()
        assert value_RW[6].mean() < value_RW[7:].mean() / 2
    z_VRT, kept_R = standardise(roi_RT)
    if version == 1:
        time_W = np.zeros(60)
        for z_RT in z_VRT:
            rebuilt_RT = rebuild_by_ridge(z_RT, FRAMES)
            rebuilt_RT = rebuilt_RT if name == "ridge" else extractor.rebuild(z_RT, centre_R3[kept_R])
            time_W += time_energy(z_RT, rebuilt_RT, FRAMES) / 2
        np.testing.assert_allclose(found["scores_time"][kept_R].mean(axis=0), time_W, atol=1e-5)


def test_rankers_without_parts_have_no_energies(rankers):
    roi_RT, centre_R3 = planted_run(4, windows=40)
    for name in sorted({*NAMES} - {"mutual", "ridge"}):
        assert rankers[name].energies(roi_RT, centre_R3, FRAMES) == {}
    assert rankers["ridge"].energies(roi_RT[:, :FRAMES], centre_R3, FRAMES) == {}  # one window is compared with none


def test_uniform_spreads_any_number_of_windows(rankers):
    roi_RT, centre_R3 = planted_run(4, windows=64, parcels=5)
    order = np.argsort(-rankers["uniform"].scores(roi_RT, centre_R3, FRAMES), kind="stable")
    for k in (2, 4, 8, 16, 32):
        np.testing.assert_array_equal(np.diff(np.sort(order[:k])), 64 // k)


def test_random_is_named_by_seed_and_run(rankers):
    one, two = planted_run(5), planted_run(6)
    draw = rankers["random"].scores(*one[:2], FRAMES)
    np.testing.assert_array_equal(draw, rankers["random"].scores(*one[:2], FRAMES))
    assert (draw != rankers["random"].scores(*two[:2], FRAMES)).any()
    assert (draw != make_ranker("random", seed=1).scores(*one[:2], FRAMES)).any()


# ---- what scores must not depend on


@pytest.mark.parametrize("name", NAMES)
def test_scores_ignore_sign_scale_and_constant_parcels(rankers, name):
    roi_RT, centre_R3 = planted_run(7, windows=40)
    scores_W = rankers[name].scores(roi_RT, centre_R3, FRAMES)
    assert scores_W.shape == (40,) and scores_W.dtype == np.float32 and np.isfinite(scores_W).all()
    np.testing.assert_array_equal(rankers[name].scores(-roi_RT, centre_R3, FRAMES), scores_W)

    @settings(deadline=None, max_examples=8)
    @given(
        scale=st.one_of(st.floats(1e-12, 1e12), st.floats(-1e12, -1e-12)),
        constants=st.lists(st.tuples(st.integers(0, 63), st.floats(-1e6, 1e6, width=32)), max_size=3),
    )
    def same(scale, constants):
        scaled_W = rankers[name].scores(roi_RT.astype(np.float64) * scale, centre_R3, FRAMES)
        np.testing.assert_allclose(scaled_W, scores_W, atol=1e-3)
        padded_RT, padded_R3 = roi_RT, centre_R3
        for place, value in constants:
            padded_RT = np.insert(padded_RT, place, np.float32(value), axis=0)
            padded_R3 = np.insert(padded_R3, place, 500, axis=0)
        np.testing.assert_array_equal(rankers[name].scores(padded_RT, padded_R3, FRAMES), scores_W)

    same()


@pytest.mark.parametrize("name", NAMES)
def test_scores_ignore_threads_other_runs_and_pickling(rankers, name):
    roi_RT, centre_R3 = planted_run(8)
    scores_W = rankers[name].scores(roi_RT, centre_R3, FRAMES)
    rankers[name].scores(*planted_run(9, windows=30, parcels=11), FRAMES)
    copy = pickle.loads(pickle.dumps(rankers[name]))
    for _ in range(2):
        np.testing.assert_array_equal(copy.scores(roi_RT, centre_R3, FRAMES), scores_W)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        np.testing.assert_allclose(copy.scores(roi_RT, centre_R3, FRAMES), scores_W, atol=1e-3)
    finally:
        torch.set_num_threads(threads)


def _scores_of(ranker, seeds):
    """What a worker does: it sees its own runs alone."""
    torch.set_num_threads(1)
    return {seed: ranker.scores(*planted_run(seed, windows=20, parcels=20), FRAMES) for seed in seeds}


def test_scores_ignore_the_order_of_runs_and_the_number_of_workers(rankers):
    names, seeds = ("mutual", "ridge", "random"), [21, 22, 23]
    threads = torch.get_num_threads()
    try:
        alone = {name: _scores_of(rankers[name], seeds) for name in names}
        with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
            shared = {name: [pool.submit(_scores_of, rankers[name], [s]) for s in seeds[::-1]] for name in names}
            for name in names:
                for seed, future in zip(seeds[::-1], shared[name], strict=True):
                    np.testing.assert_array_equal(future.result(timeout=300)[seed], alone[name][seed])
    finally:
        torch.set_num_threads(threads)


def test_scores_ignore_how_many_passes_the_extractor_makes_at_once(extractor, monkeypatch):
    roi_RT, centre_R3 = planted_run(13, windows=90)
    scores_W = make_ranker("mutual", extractor).scores(roi_RT, centre_R3, FRAMES)
    model, batches = extractor.model, []

    def one_by_one(x_BWGC, hidden_BWG, place_BGP, real_BG):
        batches.append(len(x_BWGC))
        singles = zip(x_BWGC.split(1), hidden_BWG.split(1), place_BGP.split(1), strict=True)
        return torch.cat([model(*single, real_BG) for single in singles])

    monkeypatch.setattr(extractor, "model", one_by_one)
    singly_W = make_ranker("mutual", extractor).scores(roi_RT, centre_R3, FRAMES)
    assert max(batches) > 1
    np.testing.assert_allclose(singly_W, scores_W, atol=1e-3)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("length", [10, 14, 20, 31, 60, 304, 2400])
def test_runs_of_any_length_get_a_score_per_whole_window(rankers, name, length):
    roi_RT, centre_R3 = planted_run(10, windows=480, parcels=2 if length == 60 else 12)
    scores_W = rankers[name].scores(roi_RT[:, :length], centre_R3, FRAMES)
    assert scores_W.shape == (length // FRAMES,) and np.isfinite(scores_W).all()
    whole_W = rankers[name].scores(roi_RT[:, : length // FRAMES * FRAMES], centre_R3, FRAMES)
    np.testing.assert_array_equal(scores_W, whole_W)


# ---- refusals and identity


@pytest.mark.parametrize("name", NAMES)
def test_runs_that_cannot_be_ranked_are_refused(rankers, name):
    roi_RT, centre_R3 = planted_run(11, windows=12, parcels=12)
    with pytest.raises(RunRefused, match="at least a window of 5 frames"):
        rankers[name].scores(roi_RT[:, :4], centre_R3, FRAMES)
    for few in (roi_RT[:1], np.concatenate([roi_RT[:1], np.full((4, 60), np.float32(7))])):
        with pytest.raises(RunRefused, match="at least 2 that vary"):
            rankers[name].scores(few, centre_R3[: len(few)], FRAMES)
    roi_RT[3, 4] = np.nan
    with pytest.raises(RunRefused, match="NaN"):
        rankers[name].scores(roi_RT, centre_R3, FRAMES)
    with pytest.raises(ConfigError, match="centres"):
        rankers[name].scores(roi_RT[1:], centre_R3, FRAMES)


def test_calls_that_cannot_be_meant_are_refused(extractor, rankers, tmp_path):
    with pytest.raises(ConfigError, match="one of mutual, ridge, median-variance, variance"):
        make_ranker("mutal")
    with pytest.raises(ConfigError, match="ranker mutual: extractor: got none"):
        make_ranker("mutual")
    with pytest.raises(ConfigError, match="Only the ranker mutual uses an extractor"):
        make_ranker("ridge", tmp_path)
    with pytest.raises(ConfigError, match="no such file"):
        make_ranker("mutual", tmp_path)
    roi_RT, centre_R3 = planted_run(12, windows=12, parcels=12)
    with pytest.raises(ConfigError, match=r"windows.frames: got windows of 6 frames, expected 5"):
        rankers["mutual"].scores(roi_RT, centre_R3, 6)


def test_identity_names_all_that_decides_the_scores(rankers, extractor, tmp_path):
    extractor.save(tmp_path)
    loaded = make_ranker("mutual", tmp_path, seed=4)
    assert loaded.identity()["extractor"] == extractor.checksum
    identities = [json.dumps(ranker.identity()) for ranker in [*rankers.values(), loaded]]
    assert len(set(identities)) == len(identities)
    assert all(rankers[name].identity()["extractor"] is None for name in NAMES if name != "mutual")


# ---- does it find events?


def test_version_1_is_what_artefacts_without_a_version_had(extractor):
    assert make_ranker("ridge", version=1).identity() == {
        "name": "ridge",
        "seed": 0,
        "splits": 4,
        "rho": 0.3,
        "folds": 6,
        "block": 3,
        "margin": 3,
        "neighbour": 1 / 6,
        "reach": 3,
        "penalty": 0.03,
        "extractor": None,
    }
    assert "version" not in make_ranker("mutual", extractor, version=1).identity()
    assert make_ranker("mutual", extractor).identity()["version"] == 2
    # Scores of version 0.1, to the rounding of other processors.
    scores_W = make_ranker("ridge", version=1).scores(*planted_run(3, windows=12, parcels=20), FRAMES)
    np.testing.assert_allclose(scores_W, RIDGE_0_1, atol=1e-3)


@pytest.mark.parametrize(
    ("name", "version", "known"), [("ridge", 3, "1 or 2"), ("ridge", 0, "1 or 2"), ("variance", 2, "1")]
)
def test_unknown_versions_are_refused(name, version, known):
    with pytest.raises(ConfigError, match=f"ranker {name}: version: got {version}, expected {known}"):
        make_ranker(name, version=version)


def at_eight(ranker, kind: str, runs: int = 12) -> np.ndarray:
    """Mean share of events, and of artefacts, among the 8 best windows of fresh runs of middle SNR."""
    shares = []
    for seed in range(runs):
        centre_R3 = np.random.default_rng(seed).uniform([-70, -90, -60], [70, 90, 60], (80, 3))
        run = simulate(kind, SNR[kind][1], True, seed, centre_R3, windows=80)
        best = np.argsort(-ranker.scores(run.roi_RT, run.centre_R3, FRAMES), kind="stable")[:8]
        shares.append((run.event_W[best].mean(), run.artefact_W[best].mean()))
    return np.mean(shares, axis=0)


def finds_events(ranker, kind: str) -> None:
    precision, artefacts = at_eight(ranker, kind)
    by_variance, artefacts_by_variance = at_eight(make_ranker("variance"), kind)
    assert precision > 0.6
    assert precision > by_variance + 0.2
    assert precision > at_eight(make_ranker("random"), kind)[0] + 0.3
    assert precision > at_eight(make_ranker("median-variance"), kind)[0] + 0.1
    assert artefacts < 0.15 < artefacts_by_variance - 0.15


@pytest.mark.parametrize("kind", SNR)
def test_ridge_finds_events_where_variance_finds_artefacts(kind):
    finds_events(make_ranker("ridge"), kind)


@pytest.mark.parametrize("kind", SNR)
def test_mutual_finds_events_where_variance_finds_artefacts(kind):
    runs = []
    for seed in range(1000, 1012):
        centre_R3 = np.random.default_rng(seed).uniform([-70, -90, -60], [70, 90, 60], (80, 3))
        run = simulate(kind, SNR[kind][1], True, seed, centre_R3, windows=80)
        runs.append((run.roi_RT, run.centre_R3))
    finds_events(make_ranker("mutual", train_extractor(runs, steps=100)), kind)
