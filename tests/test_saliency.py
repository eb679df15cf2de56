"""Rankers: their formulas, what they must not depend on, and whether they find planted events."""

from __future__ import annotations

import json
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import Ridge

from shards.errors import ConfigError, RunRefused
from slim.saliency import folds, frame_weights, make_ranker, rebuild_by_ridge, space_energy, time_energy
from slim.temporal import Extractor, standardise, train_extractor

FRAMES, TR = 5, 0.72
NAMES = ["mutual", "ridge", "median-variance", "variance", "leave-one-out", "uniform", "random"]


def planted_run(seed: int, windows: int = 120, parcels: int = 63, bursts: bool = True):
    """A run with haemodynamic transients of overlapping networks, spikes, and slow incoherent bursts.

    Returns (roi_RT, centre_R3, event_W, artefact_W); the events are the fifth of the windows with the most
    planted energy.
    """
    rng = np.random.default_rng(seed)
    length = windows * FRAMES
    centre_R3 = rng.uniform([-70, -90, -60], [70, 90, 60], (parcels, 3))
    peak_N3 = rng.uniform([-70, -90, -60], [70, 90, 60], (10, 3))
    map_NR = np.exp(-((centre_R3 - peak_N3[:, None]) ** 2).sum(-1) / (2 * 45**2))
    map_NR /= np.sqrt(np.mean(map_NR**2, axis=1, keepdims=True))

    def smooth(shape: tuple[int, int], width: int) -> np.ndarray:
        kernel = np.hanning(width + 2)
        noise = rng.standard_normal((shape[0], shape[1] + 2 * width))
        rows = np.stack([np.convolve(row, kernel, "same") for row in noise])[:, width:-width]
        return rows / rows.std()

    t = np.arange(0, 18, TR)
    response = (t / 5) ** 5 * np.exp(5 - t) - 0.15 * (t / 13) ** 13 * np.exp(13 - t)
    events_RT = np.zeros((parcels, length + len(response)))
    for _ in range(windows // 9):
        onset = rng.integers(length - 10)
        few = rng.choice(10, rng.integers(2, 4), replace=False)
        pattern_R = rng.choice([-1.0, 1.0], len(few)) @ map_NR[few]
        pattern_R *= rng.uniform(0.9, 1.4) / np.sqrt(np.mean(pattern_R**2))
        events_RT[:, onset : onset + len(response)] += np.outer(pattern_R, response)
    events_RT = events_RT[:, :length]

    artefact_RT, spoilt_T = np.zeros((parcels, length)), np.zeros(length, dtype=bool)
    for _ in range(windows // 7):
        frame = rng.integers(length)
        slope_R = centre_R3 @ rng.standard_normal(3)
        artefact_RT[:, frame] += slope_R / slope_R.std() * rng.uniform(2, 4)
        spoilt_T[frame] = True
    for _ in range(windows // 30 if bursts else 0):
        long = int(rng.integers(10, 20))
        first = int(rng.integers(length - long))
        envelope = np.hanning(long + 2)[1:-1]
        artefact_RT[:, first : first + long] += 2.2 * envelope * smooth((parcels, long), 5)
        spoilt_T[first + long // 4 : first + long - long // 4] = True

    rest_RT = 0.6 * map_NR.T @ smooth((10, length), 11) / np.sqrt(10)
    global_T = 0.4 * smooth((1, length), 15)
    roi_RT = events_RT + artefact_RT + rest_RT + global_T + 0.8 * rng.standard_normal((parcels, length))
    energy_W = np.mean(events_RT**2, axis=0).reshape(windows, FRAMES).mean(axis=1)
    event_W = energy_W >= np.quantile(energy_W, 0.8)
    artefact_W = spoilt_T.reshape(windows, FRAMES).any(axis=1) & ~event_W
    return (500 + 4 * roi_RT).astype(np.float32), centre_R3.astype(np.float32), event_W, artefact_W


@pytest.fixture(scope="module")
def extractor() -> Extractor:
    return train_extractor([planted_run(1000 + seed)[:2] for seed in range(12)], steps=100)


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
    fast_W = space_energy(z_RT.astype(np.float32), FRAMES, seed=3)
    np.testing.assert_allclose(fast_W, slow_T.reshape(windows, FRAMES).mean(axis=1), atol=2e-4)


@settings(deadline=None, max_examples=60)
@given(windows=st.integers(2, 60), frames=st.integers(1, 8))
def test_every_frame_is_tested_once_and_never_near_what_teaches_it(windows, frames):
    pairs = folds(windows, frames)
    assert len(pairs) >= 2
    np.testing.assert_array_equal(np.sum([tested for tested, _ in pairs], axis=0), 1)
    for tested_T, known_T in pairs:
        if windows * frames > 10:
            assert known_T.any()
        apart = np.abs(np.flatnonzero(tested_T)[:, None] - np.flatnonzero(known_T))
        assert apart.size == 0 or apart.min() > 3


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


def test_mutual_and_ridge_follow_the_definition(rankers, extractor):
    roi_RT, centre_R3, *_ = planted_run(3)
    for name in ("mutual", "ridge"):
        expected_W = np.zeros(120)
        for z_RT in standardise(roi_RT)[0]:
            rebuilt = extractor.rebuild(z_RT, centre_R3) if name == "mutual" else rebuild_by_ridge(z_RT, FRAMES)
            for w in range(120):
                z, zhat = z_RT[:, 5 * w : 5 * w + 5], rebuilt[:, 5 * w : 5 * w + 5]
                in_time = np.mean(z**2) - np.mean((z - zhat) ** 2)
                expected_W[w] += min(space_energy(z_RT, FRAMES, 0)[w], in_time) / np.sqrt(np.mean(z**2))
        np.testing.assert_allclose(rankers[name].scores(roi_RT, centre_R3, FRAMES), expected_W, atol=1e-4)


def test_uniform_spreads_any_number_of_windows(rankers):
    roi_RT, centre_R3, *_ = planted_run(4, windows=64, parcels=5)
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
    roi_RT, centre_R3, *_ = planted_run(7)
    scores_W = rankers[name].scores(roi_RT, centre_R3, FRAMES)
    assert scores_W.shape == (120,) and scores_W.dtype == np.float32 and np.isfinite(scores_W).all()
    np.testing.assert_array_equal(rankers[name].scores(-roi_RT, centre_R3, FRAMES), scores_W)
    for scale in (2.0**-40, 1e9, -7.3):
        scaled_W = rankers[name].scores(roi_RT.astype(np.float64) * scale, centre_R3, FRAMES)
        np.testing.assert_allclose(scaled_W, scores_W, atol=1e-4)
    with_constant_RT = np.insert(roi_RT, 20, np.float32(3.3), axis=0)
    padded_W = rankers[name].scores(with_constant_RT, np.insert(centre_R3, 20, 500, axis=0), FRAMES)
    np.testing.assert_array_equal(padded_W, scores_W)


@pytest.mark.parametrize("name", NAMES)
def test_scores_ignore_threads_other_runs_and_pickling(rankers, name):
    roi_RT, centre_R3, *_ = planted_run(8)
    scores_W = rankers[name].scores(roi_RT, centre_R3, FRAMES)
    rankers[name].scores(*planted_run(9, windows=30, parcels=11)[:2], FRAMES)
    copy = pickle.loads(pickle.dumps(rankers[name]))
    np.testing.assert_array_equal(copy.scores(roi_RT, centre_R3, FRAMES), scores_W)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        np.testing.assert_allclose(copy.scores(roi_RT, centre_R3, FRAMES), scores_W, atol=1e-4)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("length", [10, 14, 20, 31, 60, 304])
def test_runs_of_any_length_get_a_score_per_whole_window(rankers, name, length):
    roi_RT, centre_R3, *_ = planted_run(10, windows=70, parcels=2 if length == 60 else 12)
    scores_W = rankers[name].scores(roi_RT[:, :length], centre_R3, FRAMES)
    assert scores_W.shape == (length // FRAMES,) and np.isfinite(scores_W).all()
    whole_W = rankers[name].scores(roi_RT[:, : length // FRAMES * FRAMES], centre_R3, FRAMES)
    np.testing.assert_array_equal(scores_W, whole_W)


# ---- refusals and identity


@pytest.mark.parametrize("name", NAMES)
def test_runs_that_cannot_be_ranked_are_refused(rankers, name):
    roi_RT, centre_R3, *_ = planted_run(11, windows=12, parcels=12)
    with pytest.raises(RunRefused, match="at least 2 windows of 5 frames"):
        rankers[name].scores(roi_RT[:, :9], centre_R3, FRAMES)
    with pytest.raises(RunRefused, match="at least 2 that vary"):
        rankers[name].scores(roi_RT[:1], centre_R3[:1], FRAMES)
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
    with pytest.raises(ConfigError, match="Only mutual takes an extractor"):
        make_ranker("ridge", tmp_path)
    with pytest.raises(ConfigError, match="no such file"):
        make_ranker("mutual", tmp_path)
    roi_RT, centre_R3, *_ = planted_run(12, windows=12, parcels=12)
    with pytest.raises(ConfigError, match=r"windows.frames: got windows of 6 frames, expected 5"):
        rankers["mutual"].scores(roi_RT, centre_R3, 6)


def test_identity_names_all_that_decides_the_scores(rankers, extractor, tmp_path):
    extractor.save(tmp_path)
    loaded = make_ranker("mutual", tmp_path, seed=4)
    assert loaded.identity()["extractor"] == extractor.checksum
    identities = [json.dumps(ranker.identity()) for ranker in [*rankers.values(), loaded]]
    assert len(set(identities)) == len(identities)
    assert all(rankers[name].identity()["extractor"] is None for name in NAMES if name != "mutual")


def test_parcels_are_cubes_of_24_mm(rankers):
    labels_XYZ = rankers["ridge"].parcels(np.ones((24, 12, 30), dtype=bool), 2.0)
    assert labels_XYZ[0, 0, 0] == 1 and labels_XYZ[23, 11, 29] == 6
    np.testing.assert_array_equal(np.unique(labels_XYZ), [1, 2, 3, 4, 5, 6])


# ---- does it find events?


def at_eight(ranker) -> tuple[float, float]:
    """Mean share of events, and of artefacts, among the 8 best windows of 12 fresh runs."""
    events, artefacts = [], []
    for seed in range(12):
        roi_RT, centre_R3, event_W, artefact_W = planted_run(seed)
        best = np.argsort(-ranker.scores(roi_RT, centre_R3, FRAMES), kind="stable")[:8]
        events.append(event_W[best].mean())
        artefacts.append(artefact_W[best].mean())
    return float(np.mean(events)), float(np.mean(artefacts))


def finds_events(ranker) -> None:
    precision, artefacts = at_eight(ranker)
    by_variance, artefacts_by_variance = at_eight(make_ranker("variance"))
    assert precision > 0.6
    assert precision > by_variance + 0.2
    assert precision > at_eight(make_ranker("random"))[0] + 0.3
    assert precision > at_eight(make_ranker("median-variance"))[0] + 0.1
    assert artefacts < 0.1 < artefacts_by_variance


def test_ridge_finds_events_where_variance_finds_artefacts():
    finds_events(make_ranker("ridge"))


@pytest.mark.slow
def test_mutual_finds_events_where_variance_finds_artefacts():
    runs = [planted_run(1000 + seed)[:2] for seed in range(12)]
    finds_events(make_ranker("mutual", train_extractor(runs, steps=500)))
