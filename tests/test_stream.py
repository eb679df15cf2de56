"""The order of samples: a pure function of (seed, epoch), shared by any number of processes, resumed from any count."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shards.errors import ConfigError
from shards.reader import Dataset
from shards.stream import Positions, Stream


def make_stream(counts: list[int], weights: list[float] | None = None, seed: int = 0) -> Stream:
    """A stream over datasets of so many training sessions each."""
    datasets = []
    for number, count in enumerate(counts):
        lines = [{"key": f"{number}-{i}", "split": "train"} for i in range(count)]
        lines += [{"key": f"{number}-test", "split": "test"}]
        datasets.append(
            SimpleNamespace(
                folder=f"d{number}",
                of_split=lambda split, lines=lines: [line for line in lines if line["split"] == split],
            )
        )
    return Stream(datasets, weights or [1.0] * len(counts), "train", seed)


def keys(stream: Stream, first: int, stop: int) -> list[str]:
    return [stream.at(position).session["key"] for position in range(first, stop)]


COUNTS = st.lists(st.integers(1, 12), min_size=1, max_size=3)


@settings(deadline=None)
@given(counts=COUNTS, seed=st.integers(0, 99), epoch=st.integers(0, 9))
def test_an_epoch_is_every_training_session_exactly_once(counts, seed, epoch):
    stream, size = make_stream(counts, seed=seed), sum(counts)
    assert stream.per_epoch == size
    assert sorted(keys(stream, epoch * size, (epoch + 1) * size)) == sorted(
        f"{number}-{i}" for number, count in enumerate(counts) for i in range(count)
    )
    items = [stream.at(position) for position in range(epoch * size, (epoch + 1) * size)]
    assert {item.epoch for item in items} == {epoch}
    assert all(item.session["key"].startswith(f"{item.dataset}-") for item in items)


def test_epochs_and_seeds_differ():
    orders = [
        tuple(keys(make_stream([30], seed=seed), 30 * epoch, 30 * epoch + 30))
        for seed in range(4)
        for epoch in range(4)
    ]
    assert len(set(orders)) == 16


@settings(deadline=None)
@given(
    counts=COUNTS,
    weights=st.lists(st.sampled_from([0.25, 0.5, 1.0, 1.7, 3.0]), min_size=3, max_size=3),
    seed=st.integers(0, 99),
    jumps=st.lists(st.integers(0, 300), min_size=1, max_size=12),
)
def test_a_position_is_the_same_sample_whatever_was_asked_before(counts, weights, seed, jumps):
    weights = weights[: len(counts)]
    straight = keys(make_stream(counts, weights, seed), 0, max(jumps) + 1)
    stream = make_stream(counts, weights, seed)
    for position in jumps:  # back and forth, as workers and resumed runs do
        assert stream.at(position).session["key"] == straight[position]


@settings(deadline=None, max_examples=40)
@given(
    counts=st.lists(st.integers(1, 8), min_size=2, max_size=2),
    weights=st.tuples(st.floats(0.05, 4), st.floats(0.05, 4)),
    seed=st.integers(0, 99),
)
def test_a_weight_is_the_number_of_appearances_per_epoch(counts, weights, seed):
    """Within one appearance over any number of epochs, for every single session, whole weights in every epoch."""
    stream, epochs = make_stream(counts, list(weights), seed), 20
    seen, position, per_epoch = Counter(), 0, Counter()
    while (item := stream.at(position)).epoch < epochs:
        seen[item.session["key"]] += 1
        per_epoch[item.session["key"], item.epoch] += 1
        position += 1
    for number, (count, weight) in enumerate(zip(counts, weights, strict=True)):
        for i in range(count):
            assert abs(seen[f"{number}-{i}"] - weight * epochs) < 1 + 1e-6
            for epoch in range(epochs):
                assert abs(per_epoch[f"{number}-{i}", epoch] - weight) < 1 + 1e-6
    expected = sum(count * weight for count, weight in zip(counts, weights, strict=True))
    assert stream.per_epoch == max(1, round(expected))


def test_fractional_sessions_take_turns():
    """Half of them in one epoch is not the same half in every epoch, nor all of them in every second one."""
    stream, position = make_stream([40], [0.5]), 0
    epochs: list[list[str]] = [[], [], [], []]
    while (item := stream.at(position)).epoch < 4:
        epochs[item.epoch].append(item.session["key"])
        position += 1
    assert all(8 <= len(epoch) <= 32 for epoch in epochs)
    assert sorted(epochs[0] + epochs[1]) == sorted(f"0-{i}" for i in range(40))


def test_a_whole_weight_repeats_within_the_epoch():
    stream = make_stream([4, 3], [2, 1])
    assert Counter(keys(stream, 0, 11)) == Counter(
        {**{f"0-{i}": 2 for i in range(4)}, **{f"1-{i}": 1 for i in range(3)}}
    )


def interleaved(first: int, stop: int, batch: int, world: int) -> list[list[list[int]]]:
    """Micro-batches of every process."""
    return [list(Positions(first, stop, batch, rank, world)) for rank in range(world)]


def taken(first: int, stop: int, batch: int, world: int) -> list[int]:
    """Positions in the order in which steps consume them."""
    steps = zip(*interleaved(first, stop, batch, world), strict=True)
    return [position for step in steps for part in step for position in part]


@pytest.mark.parametrize("world", [1, 2, 4])
@settings(deadline=None)
@given(first=st.integers(0, 50), rounds=st.integers(0, 9), batch=st.integers(1, 5))
def test_processes_share_the_positions_without_overlap(world, first, rounds, batch):
    stop = first + rounds * batch * world
    shared = interleaved(first, stop, batch, world)
    assert len({len(mine) for mine in shared}) == 1  # as many steps on every process
    assert len(Positions(first, stop, batch, 0, world)) == rounds == len(shared[0])
    assert taken(first, stop, batch, world) == list(range(first, stop))
    assert all(len(part) == batch for mine in shared for part in mine)


@settings(deadline=None)
@given(
    done=st.integers(0, 20),
    worlds=st.tuples(st.sampled_from([1, 2, 4]), st.sampled_from([1, 2, 4])),
    seed=st.integers(0, 99),
)
def test_resumed_from_any_count_at_another_world_size_nothing_is_lost_or_repeated(done, worlds, seed):
    """State is one number: what comes after it is what would have come."""
    stop, batch = 4 * 40, 1
    consumed = done * batch * worlds[0]
    straight = keys(make_stream([7, 4], [1, 2], seed), 0, stop)
    before, after = taken(0, consumed, batch, worlds[0]), taken(consumed, stop, batch, worlds[1])
    resumed = make_stream([7, 4], [1, 2], seed)
    got = [resumed.at(position).session["key"] for position in before + after]
    assert got[:stop] == straight


def test_a_split_without_sessions_is_refused():
    with pytest.raises(ConfigError, match="train: got no session"):
        make_stream([0])


def test_a_real_dataset_streams_its_training_sessions(dataset):
    real = Dataset(dataset)
    stream = Stream([real], [1], "train", 3)
    wanted = sorted(session["key"] for session in real.sessions if session["split"] == "train")
    assert sorted(keys(stream, 0, len(wanted))) == wanted and len(wanted) >= 4
