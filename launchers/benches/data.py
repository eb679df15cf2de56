"""Loading of training samples, beside what training takes of them and beside webdataset and zarr alone, on a CPU.

- *One core*: `slim.data.collate.load_batch`, all that a loading process does for a micro-batch (here one sample of each
  run), and its parts: reading and decompressing the windows, drawing the mask, plans with tables and packing.
- *Reference*: the same arrays of the same sessions by webdataset and zarr alone, as anybody can read a dataset without
  this package: tars from front to end, members unzipped in memory. No masks, no plans.
- *The loader*: the DataLoader of `slim.training.trainer` with one and with two loading processes, once all have
  started.
- *Training*: `slim-brain pretrain` with two processes of one thread each, as configured, one sample per process and
  step.

Shards are read from the page cache; the time to read a disk or a network comes on top. A GPU that trains N samples/s
needs `run.workers` of at least N divided by the samples/s of a core.
"""

from __future__ import annotations

import io
import math
import multiprocessing
import os
import time
import zipfile
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import webdataset as wds
import zarr
from pydantic import Field
from rich import box
from rich.console import Console
from rich.table import Table
from torch.utils.data import DataLoader
from zarr.abc.buffer import Buffer as AnyBuffer
from zarr.buffer.cpu import Buffer
from zarr.storage import MemoryStore

from launchers.benches.commands import SMALL as SMALL_DATA
from launchers.benches.commands import Trained, pretrain
from launchers.benches.common import Figure, Ratio, Result, interleave
from launchers.job import KEEP_FREED
from shards.format import layout
from shards.format.byte_range import LocalSpan
from shards.format.reader import Dataset
from shards.format.sample import members_read
from shards.format.stream import MicroBatches, Stream
from slim.config import load_config
from slim.data.collate import collate, load_batch
from slim.data.loader import context
from slim.data.masking import draw
from slim.data.samples import cell_sizes, draw_sample, geometry_for, read_windows

READS = 5  # micro-batches in a round
READING, REFERENCE, CORE = "read", "webdataset and zarr", "one core"
NAMES = ("baseline", "spread", "patch", "brain", "start")  # what training reads of a session beside its windows
GPU = (10, 30, 100, 300)  # samples/s


class Bench(Trained):
    """Sizes of the bench; the cohort is synthetic."""

    runs: int = Field(4, ge=1, description="runs, and samples of a micro-batch")
    steps: int = Field(4, ge=2, description="optimizer steps of training; the first is not counted")
    batches: int = Field(10, ge=1, description="micro-batches taken from the loader")


SMALL: dict[str, object] = SMALL_DATA | {"model": "tiny", "runs": 2, "steps": 3, "batches": 4}


class Loading:
    """What a training process loads: the dataset of a configuration, and the items of its first micro-batch."""

    def __init__(self, words: Sequence[str]):
        self.settings = load_config(words[0], words[1:])
        self.dataset = Dataset(self.settings.data[0].path)
        self.geometry = geometry_for(self.settings, [self.dataset])
        self.stream = Stream([self.dataset], [1.0], "train", self.settings.run.seed, self.settings.windows.k)
        self.items = [self.stream.at(position) for position in range(self.settings.run.batch)]
        self.load = partial(load_batch, datasets=[self.dataset], geometry=self.geometry, settings=self.settings)

    def read(self, ranks: Sequence[int]) -> dict[str, dict[str, np.ndarray]]:
        """Arrays of each session by our reader: what `slim.data.samples.read_windows` asks for."""
        return {item.session.key: self.dataset.read(item.session, (*NAMES, "windows"), ranks) for item in self.items}

    def read_plainly(self, ranks: Sequence[int]) -> dict[str, dict[str, np.ndarray]]:
        """The same arrays by webdataset and zarr."""
        shards = sorted(map(str, (self.dataset.folder / layout.SHARDS).glob("*.tar")))
        found = {}
        for sample in wds.WebDataset(shards, shardshuffle=False, empty_check=False):
            archive = zipfile.ZipFile(io.BytesIO(sample["zarr.zip"]))
            members: dict[str, AnyBuffer] = {name: Buffer.from_bytes(archive.read(name)) for name in archive.namelist()}
            store = MemoryStore(members, read_only=True)
            group = zarr.open_group(store, mode="r")
            arrays = {name: _whole(group, name) for name in NAMES}
            stored = group["windows"]
            assert isinstance(stored, zarr.Array)
            windows = np.stack([np.asarray(stored[rank]) for rank in ranks])
            if "scale" in group:
                windows = windows.astype(np.float32) * _whole(group, "scale")
            found[sample["__key__"]] = arrays | {"windows": windows}
        return found

    def bytes_read(self, ranks: Sequence[int]) -> list[int]:
        """Bytes of the members that are read of each session."""
        found = []
        for session in (item.session for item in self.items):
            path = self.dataset.folder / layout.SHARDS / session.shard
            with io.BufferedReader(LocalSpan(path, session.zarr_offset, session.zarr_size)) as file:
                archive = zipfile.ZipFile(file)
                members = members_read(archive.namelist(), (*NAMES, "windows"), ranks)
                found.append(sum(archive.getinfo(member).compress_size for member in members))
        return found

    def loader(self, workers: int, count: int) -> DataLoader:
        """The loader of a training process."""
        batches = MicroBatches(self.stream, self.load, self.settings.run.batch, count=count)
        return DataLoader(batches, batch_size=None, num_workers=workers, multiprocessing_context=context())


def _whole(group: zarr.Group, name: str) -> np.ndarray:
    array = group[name]
    assert isinstance(array, zarr.Array)
    return np.asarray(array[...])


def run(bench: Bench, repeat: int, folder: Path, begun: Callable[[str], None]) -> Result:
    """Measure all of it; see the head of this file."""
    result = Result(notes={"settings": bench.model_dump(mode="json")})
    dataset = bench.make_dataset(folder, begun)
    words = bench.words(dataset, batch=bench.runs, out="none")
    os.environ.update(KEEP_FREED)  # processes started here allocate as those of the trainer do
    begun(f"one core, {repeat} rounds")
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as alone:
        result.figures |= alone.submit(one_core, words, repeat).result()
    for clock in ("wall", "CPU"):
        of, over = (f"{what}, {bench.runs} samples, {clock}" for what in (REFERENCE, READING))
        result.ratios.append(Ratio(f"{REFERENCE} over our reading, {clock}", of, over))

    loading = Loading(words)
    trained, loaders = "training, 2 processes", {1: "loader, 1 process", 2: "loader, 2 processes"}
    rates: dict[str, list[float]] = {name: [] for name in (*loaders.values(), trained)}
    words = bench.words(dataset, batch=1, workers=1, processes=2, checkpoint_every=bench.steps)
    for number in range(repeat):
        for workers, name in loaders.items():
            begun(f"{name}, round {number + 1} of {repeat}")
            rates[name].append(delivered(loading, workers, bench.batches))
        begun(f"{trained}, round {number + 1} of {repeat}")
        rates[trained] += pretrain(words, folder / "run").values("samples_per_s")
    result.figures |= {name: Figure("samples/s", tuple(values)) for name, values in rates.items()}
    result.ratios += [Ratio(f"{name} over {trained}", name, trained, at_least=5) for name in loaders.values()]
    result.ratios.append(Ratio("loader, 2 processes over 1", loaders[2], loaders[1]))
    show_workers(result.figures[CORE].median)
    return result


def one_core(words: Sequence[str], repeat: int) -> dict[str, Figure]:
    """Time a micro-batch in this process, its parts and the reference."""
    loading = Loading(words)
    settings, geometry, size = loading.settings, loading.geometry, len(loading.items)
    ranks = range(settings.windows.k)
    ours, plain = loading.read(ranks), loading.read_plainly(ranks)
    for key, arrays in ours.items():
        for name, values in arrays.items():
            np.testing.assert_array_equal(values, plain[key][name], f"{key}: {name}")
    samples = [draw_sample(item, loading.dataset, geometry, settings) for item in loading.items]
    sessions = [item.session for item in loading.items]

    def masks() -> None:
        for sample in samples:
            draw(cell_sizes(geometry, sample.place), settings.mask, settings.run.seed, 0, sample.key)

    work: dict[str, Callable[[], Any]] = {
        "load_batch": lambda: loading.load(loading.items),
        READING: lambda: [read_windows(loading.dataset, session, ranks) for session in sessions],
        "masks": masks,
        "plans and packing": lambda: collate(samples, geometry, settings.tokens_at_once).pack(),
        REFERENCE: lambda: loading.read_plainly(ranks),
    }
    work = {f"{name}, {size} samples": call for name, call in work.items()}
    figures = interleave(work, repeat, lambda what: None, dict.fromkeys(work, READS), "ms")
    made = figures[f"load_batch, {size} samples, CPU"].values
    figures[CORE] = Figure("samples/s", tuple(1000 * size / ms for ms in made))
    figures["bytes read of a sample"] = Figure("B", tuple(loading.bytes_read(ranks)))
    return figures


def delivered(loading: Loading, workers: int, batches: int) -> float:
    """Samples per second that the loader gives to somebody who does nothing else."""
    starting = 2 * workers  # what loading processes make ahead; after it comes what they make at their own rate
    taken = iter(loading.loader(workers, starting + batches))
    for _ in range(starting):
        next(taken).to("cpu")
    begun = time.perf_counter()
    for batch in taken:
        batch.to("cpu")
    return batches * loading.settings.run.batch / (time.perf_counter() - begun)


def workers_for(gpu: float, core: float) -> int:
    """`run.workers` of a process whose GPU trains `gpu` samples/s, where a core loads `core` samples/s."""
    return math.ceil(gpu / core)


def show_workers(core: float) -> None:
    """Print the loading processes that GPUs of some speeds need."""
    table = Table(f"a GPU that trains, samples/s (a core loads {core:.2f})", box=box.SIMPLE_HEAD)
    for gpu in GPU:
        table.add_column(str(gpu), justify="right")
    table.add_row("needs run.workers", *(str(workers_for(gpu, core)) for gpu in GPU))
    Console(width=120, highlight=False).print(table)
