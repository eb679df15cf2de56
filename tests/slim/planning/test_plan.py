"""What a configuration costs, told before it is run."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from einops import reduce

from helpers.commands import Command
from launchers.commands import plan
from shards.core.errors import ConfigError
from shards.format.grid import Grid
from shards.format.reader import Dataset
from slim.config import PRESETS, PretrainSettings, RunSettings
from slim.planning.forecast import Forecast, forecast
from slim.planning.rates import rates_of
from slim.planning.step_cost import Cost, cost, detailed, mni_brain
from slim.planning.steps import Counted, extrapolate, largest, largest_brain
from slim.planning.zero_memory import Zero

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


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "processes", "stream"), [(0, 1, None), (2, 1, 100), (3, 2, None)])
def test_every_further_sample_adds_what_the_second_one_did(stage: int, processes: int, stream: int | None) -> None:
    def counted(batch: int) -> Counted:
        run = {"batch": batch, "processes": processes}
        return detailed(settings(run=run, zero={"stage": stage}, chunk_tokens=stream), COARSE, drive=Zero)

    one, two, (found, _) = map(counted, (1, 2, 6))
    assert extrapolate(one, two, 1) == replace(one[0], tokens=two[0].tokens) and extrapolate(one, two, 2) == two[0]
    told = extrapolate(one, two, 6)
    assert told.peak_memory_bytes == sum(told.memory_parts.values())
    assert told.peak_memory_bytes == pytest.approx(found.peak_memory_bytes, rel=0.02)
    assert told.step_flops == pytest.approx(found.step_flops, rel=0.02)
    assert found.peak_memory_bytes > 1.2 * one[0].peak_memory_bytes  # or an extrapolation of nothing would do

    for batch in range(1, 12):
        peak = extrapolate(one, two, batch).peak_memory_bytes
        assert largest(one, two, peak) == batch and largest(one, two, peak - 1) == batch - 1


def test_what_is_counted_lies_where_further_samples_add_as_much(dataset: Path) -> None:
    """Steps of one sample do not do where the local stages take more than one chunk from the second sample on."""
    datasets = [Dataset(dataset)]

    def told(**run: int) -> Forecast:
        other = {"data": str(dataset), "model": PRESETS["tiny"], "windows": {"k": 2}, "chunk_tokens": 100}
        return forecast(PretrainSettings(**other, run={"out": "x", **run}), datasets)

    assert 50 < told(batch=1).tokens["context"] < 100
    six, two = told(batch=6), told(batch=2)
    assert six.counted_batches == [2, 3] and two.counted_batches == [2]
    counted = cost(
        PretrainSettings(
            data=str(dataset), model=PRESETS["tiny"], windows={"k": 2}, chunk_tokens=100, run={"out": "x", "batch": 6}
        ),
        datasets[0].grid,
        brain_XYZ=largest_brain(datasets)[0],
        drive=Zero,
    )
    assert six.peak_memory_bytes == pytest.approx(counted.peak_memory_bytes, rel=0.02)


def test_the_command_tells_of_a_dataset_and_of_its_run(command: Command, dataset: Path, tmp_path: Path) -> None:
    words = ["configs/pretrain/tiny.yaml", f"data={dataset}", "run.batch=2", "run.epochs=3", "zero.stage=2"]
    words.append(f"run.out={tmp_path}/run")
    done = command("tools/plan.py", *words, "--json", "--gpu-memory", "100MiB", "--tflops", 50)
    assert done.returncode == 0, done.stderr
    assert max(len(line) for line in done.stdout.splitlines()[:-1] if not line.startswith("next: ")) <= 80
    told = json.loads(done.stdout.splitlines()[-1])
    assert set(told["parameters"]) == {"encoder", "predictor", "target"}
    assert set(told["tokens"]) == {"grid", "brain", "context"}
    assert told["peak_memory_bytes"] == sum(told["memory_parts"].values()) < 100 * 2**20
    assert told["memory_parts"]["bucket"] == 4 * 5_000_000 // 512 * 512 + 512
    rates, samples = told["rates"], 2
    assert rates["arithmetic"] == pytest.approx(samples * 50e12 / told["step_flops"])
    assert rates["launches"] == pytest.approx(samples / (told["step_calls"] * 7.5e-6))
    assert rates["loading"] == pytest.approx(1 / 0.045)
    assert rates[rates["binds"]] == min(rates[name] for name in ("arithmetic", "launches", "loading"))
    assert f"limited by {rates['binds']}" in done.stdout
    assert told["step_calls"] == sum(told["calls_parts"].values())
    assert told["zero_stage"] == 2 and told["largest_batch"] > 2
    assert told["steps"] == -(-3 * told["samples_per_epoch"] // 2)
    assert told["hours"] == pytest.approx(told["steps"] * told["step_flops"] / 50e12 / 3600)
    assert told["counted_batches"] == [1, 2] and "extrapolated from 1 and 2" in done.stdout
    assert [line for line in done.stderr.splitlines() if "counting" in line][-1].startswith("counting a step with run")
    files = list((dataset / "shards").iterdir())
    assert told["shards_bytes"] == sum(path.stat().st_size for path in files)

    done = command("tools/pretrain.py", *words, "run.steps=1", "run.workers=0", "run.wandb=disabled")
    assert done.returncode == 0, done.stderr
    written = sum(path.stat().st_size for path in (tmp_path / "run" / "checkpoints").glob("step-*/*"))
    assert told["checkpoint_bytes"] == pytest.approx(written, rel=0.1)


def test_without_data_the_command_takes_the_mni_mask(command: Command, tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("model: tiny\nwindows: {k: 2}\nrun: {out: x, batch: 1}\n")
    done = command("tools/plan.py", config, "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["tokens"]["grid"] == 10 * 24**3 and told["tokens"]["brain"] == 10 * 4476
    assert told["steps"] is told["hours"] is told["largest_batch"] is told["shards_bytes"] is None
    assert told["counted_batches"] == [1]
    assert "MNI152" in done.stdout and "unknown without the data or run.steps" in done.stdout


@pytest.mark.parametrize(
    ("changes", "step", "binds"),
    [
        ({}, {"step_flops": 10**15, "step_calls": 10}, "arithmetic"),
        ({}, {"step_flops": 10**9, "step_calls": 10**7}, "launches"),
        ({"workers": 1}, {"step_flops": 10**9, "step_calls": 10}, "loading"),
    ],
)
def test_the_smallest_rate_binds(one: Cost, changes: dict[str, int], step: dict[str, int], binds: str) -> None:
    run = RunSettings(out="x", batch=4, processes=2, **changes)
    rates = rates_of(run, replace(one, **step), peak_tflops=100)
    assert rates.binds == binds and rates.samples_per_s == getattr(rates, binds)
    four = rates_of(run.model_copy(update={"processes": 4}), replace(one, **step), peak_tflops=100)
    assert four.samples_per_s == pytest.approx(2 * rates.samples_per_s)


@pytest.mark.parametrize(("text", "tflops"), [("H100", 989), ("A100", 312), ("400", 400)])
def test_the_peak_is_a_number_or_the_name_of_a_gpu(text: str, tflops: float) -> None:
    assert plan.peak(text) == tflops
    with pytest.raises(ConfigError, match="--peak-tflops: got H1"):
        plan.peak("H1")
