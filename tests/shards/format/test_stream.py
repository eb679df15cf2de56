"""The order of samples: a pure function of (seed, epoch), shared by any number of processes, resumed from any count."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from helpers.records import session_record
from shards.core.errors import ConfigError
from shards.format.reader import Dataset
from shards.format.session_record import SessionRecord
from shards.format.stream import Item, MicroBatches, Stream


@dataclass
class Sessions:
    """A dataset of which only the list of sessions is needed."""

    folder: str
    count: int

    def of_split(self, split: str) -> list[SessionRecord]:
        sessions = [session_record(key=f"{self.folder}-{i}") for i in range(self.count)]
        sessions.append(session_record(key=f"{self.folder}-test", split="test"))
        return [session for session in sessions if session.split == split]


def make_stream(counts: list[int], weights: list[float] | None = None, seed: int = 0) -> Stream:
    """A stream over datasets of so many training sessions each."""
    datasets = [Sessions(str(number), count) for number, count in enumerate(counts)]
    return Stream(datasets, weights or [1.0] * len(counts), "train", seed)


def keys(stream: Stream, first: int, stop: int) -> list[str]:
    return [stream.at(position).session.key for position in range(first, stop)]


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
    assert all(item.session.key.startswith(f"{item.dataset}-") for item in items)


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
        assert stream.at(position).session.key == straight[position]


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
        seen[item.session.key] += 1
        per_epoch[item.session.key, item.epoch] += 1
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
        epochs[item.epoch].append(item.session.key)
        position += 1
    assert all(8 <= len(epoch) <= 32 for epoch in epochs)
    assert sorted(epochs[0] + epochs[1]) == sorted(f"0-{i}" for i in range(40))


def test_a_whole_weight_repeats_within_the_epoch():
    stream = make_stream([4, 3], [2, 1])
    assert Counter(keys(stream, 0, 11)) == Counter(
        {**{f"0-{i}": 2 for i in range(4)}, **{f"1-{i}": 1 for i in range(3)}}
    )


def names(items: list[Item]) -> list[str]:
    """What a micro-batch is in these tests."""
    return [f"{item.session.key} of epoch {item.epoch}" for item in items]


def expected(stream: Stream, first: int, stop: int) -> list[str]:
    return names([stream.at(position) for position in range(first, stop)])


@dataclass
class Worker:
    id: int
    num_workers: int


def loaded(batches: MicroBatches, workers: int, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """What a loader of so many workers returns: from each in turn, until the one whose turn it is has ended."""
    if not workers:
        return list(batches)
    parts = []
    for number in range(workers):
        with monkeypatch.context() as patch:
            patch.setattr("shards.format.stream.get_worker_info", lambda number=number: Worker(number, workers))
            parts.append(iter(list(batches)))
    taken = []
    for part in itertools.cycle(parts):
        if (batch := next(part, None)) is None:
            break
        taken.append(batch)
    assert all(next(part, None) is None for part in parts)  # nothing is left behind
    return taken


LEGS = st.lists(
    st.tuples(st.sampled_from([1, 2, 3, 4]), st.integers(0, 4), st.integers(1, 5), st.integers(0, 6)),
    min_size=1,
    max_size=4,
)


@settings(deadline=None)
@given(
    counts=COUNTS,
    weights=st.lists(st.sampled_from([0.5, 1.0, 1.7]), min_size=3, max_size=3),
    seed=st.integers(0, 99),
    legs=LEGS,
)
def test_every_position_is_consumed_once_and_in_order_whoever_shares_it(counts, weights, seed, legs):
    """A run of several legs, each with its own world, workers, batch and number of steps, is one uninterrupted one."""
    weights, consumed, got = weights[: len(counts)], 0, []
    with pytest.MonkeyPatch.context() as monkeypatch:
        for world, workers, batch, steps in legs:
            stream = make_stream(counts, weights, seed)
            shared = [
                loaded(MicroBatches(stream, names, batch, rank, world, steps, consumed), workers, monkeypatch)
                for rank in range(world)
            ]
            assert {len(mine) for mine in shared} == {steps}  # equally many batches on every process
            assert all(len(part) == batch for mine in shared for part in mine)
            got += [name for step in zip(*shared, strict=True) for part in step for name in part]
            consumed += steps * batch * world
    assert got == expected(make_stream(counts, weights, seed), 0, consumed)


def test_without_a_count_the_stream_has_no_end():
    stream = make_stream([3])
    got = list(itertools.islice(MicroBatches(stream, names, 2, rank=1, world=2), 50))
    assert len(got) == 50
    assert got[-1] == expected(stream, 49 * 4 + 2, 49 * 4 + 4)


@pytest.mark.parametrize("workers", range(4))
def test_a_real_loader_returns_the_stream_in_order(workers):
    """To the second of two processes, from the 12th sample on."""
    stream = make_stream([7, 4], [1, 2], 5)
    loader = DataLoader(
        MicroBatches(stream, names, 3, rank=1, world=2, count=8, consumed=12),
        batch_size=None,
        num_workers=workers,
        multiprocessing_context="forkserver" if workers else None,
    )
    firsts = [12 + 6 * number + 3 for number in range(8)]
    assert list(loader) == [expected(stream, first, first + 3) for first in firsts]


def test_a_run_goes_on_with_another_batch_after_the_samples_it_has_consumed(command, dataset, tmp_path):
    """With as many samples per step as before: four micro-batches of one in place of one of four."""
    for steps, batch, workers in ((2, 4, 2), (4, 1, 0)):
        done = command(
            "tools/pretrain.py",
            "configs/pretrain/tiny.yaml",
            f"data={dataset}",
            f"run.out={tmp_path / 'run'}",
            f"run.steps={steps}",
            f"run.batch={batch}",
            f"run.workers={workers}",
            *("run.wandb=disabled", "loss.sig_samples=1", "run.extend=constant"),
        )
        assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["samples"] for line in lines] == [4, 8, 12, 16]
    stream = Stream([Dataset(dataset)], [1.0], "train", 0)
    assert [line["epoch"] for line in lines] == [stream.at(line["samples"] - 1).epoch for line in lines]


def test_a_split_without_sessions_is_refused():
    with pytest.raises(ConfigError, match="train: got no session"):
        make_stream([0])


def test_a_real_dataset_streams_its_training_sessions(dataset):
    real = Dataset(dataset)
    stream = Stream([real], [1], "train", 3)
    wanted = sorted(session.key for session in real.sessions if session.split == "train")
    assert sorted(keys(stream, 0, len(wanted))) == wanted and len(wanted) >= 4
