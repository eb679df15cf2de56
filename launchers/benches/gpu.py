"""One script of at most some minutes for a machine with a GPU: speed, memory and idle time of a training step.

    slim-brain bench gpu --out gpu.json          the whole, on a GPU
    slim-brain bench gpu --small                 a dry run of the script on a CPU

For each model, batch and `chunk_tokens`: a step of losses, backward, clipping, AdamW, running means and moving average
on a batch with the MNI152 brain, as `slim.planning.step_cost` counts it. *dense* is the same encoder with nothing
dropped. Samples/s and the time of a step are medians without the first two steps; idle is the share of a step in which
no kernel of the GPU runs (torch.profiler); the peak of the allocator stands beside the forecast; MFU is that of the
counted FLOPs. Data are not loaded, and DeepSpeed takes no part.

The last rows are `slim-brain pretrain` as a user runs it, with DeepSpeed and loading processes, on a synthetic dataset
of the same grid; the outcome says which share of the time it waits for data.

Every case has a process of its own, so a case that runs out of memory is a row, not the end. The smallest cases come
first; those for which no time is left are named.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field
from rich import box
from rich.console import Console
from rich.table import Table

from launchers import environment
from launchers.benches.commands import CommandFailed, Trained, pretrain
from launchers.benches.common import Figure, Result
from shards.core.settings import Settings
from shards.format.grid import Grid
from slim.config import PRESETS, PretrainSettings
from slim.model.geometry import Geometry, geometry_of
from slim.model.inputs import Batch
from slim.planning.step_cost import count, make_batch, mni_brain
from slim.pretrain.learner import PretrainLearner
from slim.pretrain.objective import Objective
from slim.training.mfu import peak_flops
from slim.training.optim import parameter_groups

Row = dict[str, float | str | None]  # what was measured of a case, by the names in ROW
WARM = 2  # steps that are not timed
ROW = ("samples_per_s", "step_ms", "idle", "peak_gib", "forecast_gib", "mfu", "outcome")


class GpuCase(Settings):
    """One row: a model, a batch and a chunk on a device."""

    model: str = Field(description="preset of the model")
    batch: int = Field(ge=1, description="samples of a step")
    chunk_tokens: int | None = Field(description="tokens of a chunk; null: all")
    dense: bool = Field(False, description="whether nothing is dropped")
    precision: Literal["bf16", "fp32"] = Field("bf16", description="precision of the arithmetic")
    device: Literal["cuda", "cpu"] = Field("cuda", description="device")
    steps: int = Field(10, ge=1, description="timed steps")
    mm: float = Field(2.0, gt=0, description="voxel edge of the grid, mm")
    shape: tuple[int, int, int] = Field((96, 96, 96), description="voxels of the grid")

    @property
    def name(self) -> str:
        chunk = "unchunked" if self.chunk_tokens is None else f"chunks of {self.chunk_tokens}"
        return f"{self.model}{' dense' if self.dense else ''} x{self.batch}, {chunk}"


class Bench(Settings):
    """Sizes of the bench."""

    device: Literal["cuda", "cpu"] = Field("cuda", description="cpu: a dry run of the script")
    models: tuple[str, ...] = Field(("published", "lean"), description="presets")
    batches: tuple[int, ...] = Field((1, 4, 16, 64), description="samples of a step")
    chunks: tuple[int | None, ...] = Field((None, 65536, 4096), description="values of chunk_tokens")
    dense_batches: tuple[int, ...] = Field((1, 4), description="samples of a step of the dense encoder")
    precision: Literal["bf16", "fp32"] = Field("bf16", description="precision of the arithmetic")
    steps: int = Field(10, ge=1, description="timed steps")
    mm: float = Field(2.0, gt=0, description="voxel edge of the grid, mm")
    shape: tuple[int, int, int] = Field((96, 96, 96), description="voxels of the grid")
    loaded_batch: int = Field(16, ge=1, description="samples of a step of the rows with loading and DeepSpeed")
    loaded_steps: int = Field(30, ge=2, description="their steps; the first is not counted")
    workers: int = Field(8, ge=0, description="their loading processes")
    seconds: float = Field(450, gt=0, description="time for all cases")


SMALL: dict[str, object] = {
    "device": "cpu",
    "models": ["tiny"],
    "batches": [1, 2],
    "chunks": [None],
    "dense_batches": [1],
    "precision": "fp32",
    "steps": 2,
    "mm": 8.0,
    "shape": [24, 24, 24],
    "loaded_batch": 2,
    "loaded_steps": 3,
    "workers": 1,
}
_LOADED = 90  # seconds that a row with loading takes at most, with the start of its processes


def cases_of(bench: Bench) -> list[GpuCase]:
    """All cases, the smallest batches first, and at each of them the fastest chunks."""
    shared = bench.model_dump(include={"device", "precision", "steps", "mm", "shape"})
    cases = [
        GpuCase(model=model, batch=batch, chunk_tokens=chunk, **shared)
        for batch in bench.batches
        for chunk in bench.chunks
        for model in bench.models
    ]
    plain = {"model": bench.models[0], "chunk_tokens": None, "dense": True, **shared}
    dense = [GpuCase(batch=batch, **plain) for batch in bench.dense_batches]
    return sorted([*cases, *dense], key=lambda case: case.batch)


def run(bench: Bench, _repeat: int, folder: Path, begun: Callable[[str], None]) -> Result:
    """Measure all cases; see the head of this file."""
    end = time.monotonic() + bench.seconds
    loaded = Loaded(bench, folder)
    loaded.make_dataset(begun)
    kept = _LOADED * len(bench.models)  # seconds for the rows with loading
    rows: dict[str, Row] = {}
    for case in cases_of(bench):
        begun(case.name)
        rows[case.name] = in_process(case, end - kept - time.monotonic())
    for model in bench.models:
        begun(name := f"{model} x{bench.loaded_batch}, loading and DeepSpeed")
        rows[name] = loaded.row(model) if time.monotonic() < end else {"outcome": "left out: no time was left"}
    result = Result()
    for name, row in rows.items():
        if isinstance(rate := row.get("samples_per_s"), float):
            result.figures[f"{name}, rate"] = Figure("samples/s", (rate,))
    result.notes |= {"settings": bench.model_dump(mode="json"), "cases": rows}
    show(rows)
    return result


class Loaded:
    """Rows of `slim-brain pretrain` with its loading processes and DeepSpeed.

    Parameters
    ----------
    bench : Bench
    folder : Path
        Folder of the dataset and of the runs.
    """

    def __init__(self, bench: Bench, folder: Path):
        self.bench, self.folder = bench, folder

    def make_dataset(self, begun: Callable[[str], None]) -> None:
        """Make a synthetic dataset on the grid of the bench."""
        self._sizes(self.bench.models[0]).make_dataset(self.folder, begun)

    def row(self, model: str) -> Row:
        """Train some steps."""
        bench = self.bench
        words = self._sizes(model).words(
            self.folder / "shards",
            device=bench.device,
            batch=bench.loaded_batch,
            workers=bench.workers,
            checkpoint_every=bench.loaded_steps,
            wandb="disabled",
        )
        try:
            done = pretrain([*words, f"precision={bench.precision}"], self.folder / "run")
        except CommandFailed as error:
            return {"outcome": f"failed: {error.got}"}
        of_mfu = done.values("mfu") if "mfu" in done.lines[0] else []
        return {
            "samples_per_s": statistics.median(done.values("samples_per_s")),
            "step_ms": 1000 * statistics.median(done.values("seconds")),
            "peak_gib": max(done.values("peak_memory_bytes")) / 2**30,
            "mfu": statistics.median(of_mfu) if of_mfu else None,
            "outcome": f"waits for data {statistics.median(done.values('data_wait')):.0%} of the time",
        }

    def _sizes(self, model: str) -> Trained:
        bench = self.bench
        tree = {"model": model, "steps": bench.loaded_steps, "mm": bench.mm, "shape": bench.shape}
        return Trained.model_validate(tree | {"frames": 120, "voxel_mm": max(3.0, bench.mm)})


def in_process(case: GpuCase, seconds: float) -> Row:
    """Measure a case in a process of its own."""
    if seconds <= 0:
        return {"outcome": "left out: no time was left"}
    call = [sys.executable, "-m", "launchers.benches.gpu", case.model_dump_json()]
    variables = environment.with_packages(os.environ)
    try:
        done = subprocess.run(call, env=variables, capture_output=True, encoding="utf-8", timeout=seconds)
    except subprocess.TimeoutExpired:
        return {"outcome": "stopped: no time was left"}
    if done.returncode:
        return {"outcome": f"failed: {(done.stderr.strip().splitlines() or [f'status {done.returncode}'])[-1]}"}
    return json.loads(done.stdout.splitlines()[-1])


def measure(case: GpuCase) -> Row:
    """Take the steps of a case in this process."""
    run = {"out": "none", "batch": case.batch}
    settings = PretrainSettings(
        data="none", model=PRESETS[case.model], precision=case.precision, chunk_tokens=case.chunk_tokens, run=run
    )
    grid = Grid(mm=case.mm, shape=case.shape)
    geometry = geometry_of(settings.model, (settings.windows.k * 5, *grid.patch_shape))
    brain_XYZ = mni_brain(grid)
    if case.dense:
        brain_XYZ[:] = True
    batch = make_batch(settings, geometry, brain_XYZ, case.dense)
    counted, _ = count(settings, geometry, batch, on_gpu=case.device == "cuda")
    device = torch.device(case.device)
    try:
        seconds, idle, peak = _steps(settings, geometry, batch.to(device), device, case.steps)
    except torch.OutOfMemoryError:
        return {"outcome": "out of memory", "forecast_gib": counted.peak / 2**30}
    best = peak_flops(torch.cuda.get_device_name(device), case.precision) if device.type == "cuda" else None
    return {
        "samples_per_s": case.batch / seconds,
        "step_ms": 1000 * seconds,
        "idle": idle,
        "peak_gib": None if peak is None else peak / 2**30,
        "forecast_gib": counted.peak / 2**30,
        "mfu": None if best is None else counted.flops.total() / seconds / best,
        "outcome": "done",
    }


def _steps(
    settings: PretrainSettings, geometry: Geometry, batch: Batch, device: torch.device, steps: int
) -> tuple[float, float | None, int | None]:
    """Median seconds of a step; on a GPU the share of time without kernels, and the peak of the allocator in bytes."""
    torch.manual_seed(0)
    for values in (batch.voxels.value_RV, batch.voxels.baseline_QV, batch.voxels.spread_QV):
        values.uniform_(0.1, 1)
    learner = PretrainLearner(settings, Objective(settings, geometry, batch.brain_QV.shape[1]).to(device))
    adam = torch.optim.AdamW(parameter_groups(learner.model), fused=True)
    on_gpu = device.type == "cuda"

    def step(number: int) -> float:
        begun = time.perf_counter()
        learner.losses(batch, number).total.backward()
        torch.nn.utils.clip_grad_norm_(learner.model.parameters(), settings.optimizer.clip)
        adam.step()
        adam.zero_grad()
        learner.commit(number, WARM + 2 * steps)
        if on_gpu:
            torch.cuda.synchronize()
        return time.perf_counter() - begun

    for number in range(WARM):
        step(number)
    if not on_gpu:
        return statistics.median(step(WARM + number) for number in range(steps)), None, None
    torch.cuda.reset_peak_memory_stats()
    seconds = statistics.median(step(WARM + number) for number in range(steps))
    peak = torch.cuda.max_memory_allocated()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiled:
        whole = sum(step(WARM + steps + number) for number in range(min(steps, 3)))
    busy = sum(event.self_device_time_total for event in profiled.key_averages()) / 1e6
    return seconds, max(0.0, 1 - busy / whole), peak


def show(rows: dict[str, Row]) -> None:
    """Print one row for each case."""
    table = Table("case", box=box.SIMPLE_HEAD)
    for heading in ("samples/s", "step, ms", "idle", "peak, GiB", "forecast", "MFU", "outcome"):
        table.add_column(heading, justify="left" if heading == "outcome" else "right")
    for name, row in rows.items():
        values = [row.get(key) for key in ROW]
        shown = ("" if value is None else value if isinstance(value, str) else f"{value:.3g}" for value in values)
        table.add_row(name, *shown)
    Console(width=140, highlight=False).print(table)


if __name__ == "__main__":
    print(json.dumps(measure(GpuCase.model_validate_json(sys.argv[1]))))
