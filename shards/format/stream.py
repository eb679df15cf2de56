"""The deterministic stream of training samples: position n is the same sample in every process.

The stream is a sequence of epochs. Each epoch is a permutation of the sessions that depends only on (seed, epoch). A
checkpoint only needs the number of consumed samples, independent of the number of processes and loading processes.
"""

from __future__ import annotations

import bisect
import hashlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info

from shards.core.errors import ConfigError
from shards.core.settings import digest
from shards.format.reader import Dataset
from shards.format.session_record import SessionRecord

B = TypeVar("B")


@dataclass(frozen=True)
class Item:
    """A session of one of the datasets, in an epoch."""

    dataset: int
    session: SessionRecord
    epoch: int


class Stream:
    """The order of samples over epochs.

    Parameters
    ----------
    datasets : sequence of Dataset
    weights : sequence of float
        Mean number of times that a session of each dataset appears in an epoch: 2 is twice, 0.5 every second epoch.
    split : str
    seed : int
    least_windows : int, optional
        Sessions with fewer kept windows are left out.

    Attributes
    ----------
    sessions : list of list of SessionRecord
        The sessions of each dataset that are used.
    short : list of int
        Number of sessions of each dataset that were left out because they have too few windows.

    Raises
    ------
    ConfigError
        If the split has no session, or none with enough windows.
    """

    def __init__(
        self, datasets: Sequence[Dataset], weights: Sequence[float], split: str, seed: int, least_windows: int = 0
    ):
        self.datasets, self.weights, self.seed = list(datasets), list(weights), seed
        found = [dataset.of_split(split) for dataset in self.datasets]
        if not any(found):
            raise ConfigError(self.datasets[0].folder, split, "no session", "at least one session to train on")
        self.sessions = [[s for s in part if not least_windows or s.n_kept >= least_windows] for part in found]
        self.short = [len(whole) - len(part) for whole, part in zip(found, self.sessions, strict=True)]
        if not any(self.sessions):
            most = max(session.n_kept for part in found for session in part)
            raise ConfigError(
                self.datasets[0].folder,
                split,
                f"{sum(self.short)} sessions with at most {most} windows",
                f"a session with {least_windows} or more windows (windows.minimum, windows.k)",
                "Lower windows.minimum or windows.k, or convert with shorter windows",
            )
        mean = sum(weight * len(part) for weight, part in zip(self.weights, self.sessions, strict=True))
        self.per_epoch = max(1, round(mean))
        self._cache: tuple[int, list[tuple[int, int]]] = (-1, [])
        self._ends: list[int] = []  # position after the end of each epoch, as far as computed

    def digest(self) -> str:
        """Hash of everything that determines the sample at each position."""
        keys = [[session.key for session in part] for part in self.sessions]
        return digest([self.seed, self.weights, keys])

    def _epoch(self, epoch: int) -> list[tuple[int, int]]:
        """(dataset, session) of every position of an epoch."""
        if self._cache[0] != epoch:
            picks: list[tuple[int, int]] = []
            for number, (weight, part) in enumerate(zip(self.weights, self.sessions, strict=True)):
                rng = generator(self.seed, number, "weight")
                # Fractional appearances of a session are spread over epochs, with an offset for each session.
                offset = rng.random(len(part))
                times = np.floor(offset + weight * (epoch + 1)) - np.floor(offset + weight * epoch)
                picks += [(number, index) for index, count in enumerate(times.astype(int)) for _ in range(count)]
            order = generator(self.seed, epoch, "order").permutation(len(picks))
            self._cache = (epoch, [picks[i] for i in order])
        return self._cache[1]

    def at(self, position: int) -> Item:
        """The sample at a position of the stream, from 0."""
        while not self._ends or self._ends[-1] <= position:
            self._ends.append((self._ends[-1] if self._ends else 0) + len(self._epoch(len(self._ends))))
        epoch = bisect.bisect_right(self._ends, position)
        inside = position - (self._ends[epoch - 1] if epoch else 0)
        dataset, index = self._epoch(epoch)[inside]
        return Item(dataset, self.sessions[dataset][index], epoch)


def generator(*names: object) -> np.random.Generator:
    """A random generator that depends only on these names, such as seed, epoch, sample key and purpose."""
    name = hashlib.sha256("/".join(map(str, names)).encode()).digest()
    return np.random.default_rng(np.frombuffer(name, np.uint32))


class MicroBatches(IterableDataset[B]):
    """The micro-batches of one process of a run.

    Each micro-batch takes the next `batch * world` samples of the stream, of which process r gets the r-th `batch`
    samples. All processes get equally many samples, and together every sample once. Worker w of the W workers of a
    `DataLoader(..., batch_size=None)` makes the micro-batches w, w + W, w + 2 W ..., and the loader reads from the
    workers in turn, so the sequence does not depend on the number of workers.

    The state is one number, the samples that all processes have consumed. The training process counts it, because
    workers load ahead. A run can be resumed from it with any batch, world or number of workers.

    Parameters
    ----------
    stream : Stream
    load : callable
        Picklable function that makes a micro-batch from a list of `batch` items, in the worker.
    batch : int
        Samples per micro-batch.
    rank, world : int
        Rank of this process, and number of processes.
    count : int, optional
        Number of micro-batches of this process; None for no end.
    consumed : int
        Samples of the stream that all processes together have already consumed.
    """

    def __init__(
        self,
        stream: Stream,
        load: Callable[[list[Item]], B],
        batch: int,
        rank: int = 0,
        world: int = 1,
        count: int | None = None,
        consumed: int = 0,
    ):
        self.stream, self.load, self.batch = stream, load, batch
        self.rank, self.world, self.count, self.consumed = rank, world, count, consumed

    def __iter__(self) -> Iterator[B]:
        worker = get_worker_info()
        first, step = (worker.id, worker.num_workers) if worker else (0, 1)
        numbers = itertools.count(first, step) if self.count is None else range(first, self.count, step)
        mine = self.consumed + self.rank * self.batch
        return (self._load(mine + number * self.batch * self.world) for number in numbers)

    def _load(self, first: int) -> B:
        return self.load([self.stream.at(position) for position in range(first, first + self.batch)])
