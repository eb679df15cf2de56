"""The benches of training and of loading: what they compare is the same work, and how figures come of what they ran."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from helpers.commands import ROOT
from launchers.benches import commands, data, train
from launchers.benches.bare import bare_steps
from launchers.benches.commands import CommandFailed, Pretraining, bare, command, pretrain
from shards.format.stream import Stream
from slim.config import load_config

WORDS = [str(ROOT / "configs" / "pretrain" / "tiny.yaml"), "run.steps=3", "run.wandb=disabled"]


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_bare_step_learns_what_the_trainer_learns(dataset, tmp_path, accumulate):
    words = [*WORDS, f"data={dataset}", "run.batch=2", f"run.accumulate={accumulate}", "run.workers=0"]
    words += ["optimizer.warmup=0.4", "optimizer.wd=[0.1, 0.5]"]
    done, alone = pretrain(words, tmp_path / "run"), bare(words)
    assert len(done.lines) == len(alone["loss"]) == len(alone["seconds"]) == 3 and min(alone["seconds"]) > 0
    losses = [line["loss"] for line in done.lines]
    np.testing.assert_allclose(losses, alone["loss"], rtol=1e-5)
    train.compare(losses, alone["loss"], train.AGREE["fp32"])
    # it is training that agrees, and each step of it: a step more or less, another schedule or sample would show
    changed = [*words, "optimizer.lr=0.001"]
    other = bare_steps(load_config(WORDS[0], [*changed[1:], "run.out=none"]))
    assert other["loss"][0] == alone["loss"][0]
    with pytest.raises(ArithmeticError, match="step 2: the trainer's loss is"):
        train.compare(losses, other["loss"], 1e-5)

    assert done.values("seconds") == [line["seconds"] for line in done.lines[1:]]
    assert 0 < done.save_s < 60 and not (tmp_path / "run").exists()


def test_a_checkpoint_is_measured_whole(dataset, tmp_path, monkeypatch):
    seen = {}

    def keep(folder: Path, **_) -> None:
        if folder == tmp_path / "run" and folder.exists():
            seen["files"] = [path for path in folder.glob("checkpoints/step-*/**/*") if path.is_file()]
            seen["bytes"] = sum(path.stat().st_size for path in seen["files"])

    monkeypatch.setattr(commands.shutil, "rmtree", keep)
    done = pretrain([*WORDS, f"data={dataset}", "run.processes=2"], tmp_path / "run")
    names = [path.name for path in seen["files"]]
    assert "COMPLETE" in names and "weights.safetensors" in names
    assert sum("optim_states" in name for name in names) == 2 and done.checkpoint_bytes == seen["bytes"]


def test_cpu_time_of_a_line_is_that_of_its_writer_alone(tmp_path):
    burn = "import time; end = time.process_time() + 0.3\nwhile time.process_time() < end: pass\n"
    write = "file.write('line\\n'); file.flush()\n"
    other = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {burn!r}])\n"
    code = f"file = open({str(tmp_path / 'lines')!r}, 'w')\n{write}{burn}{write}{other}{write}time.sleep(0.5)"
    ended = threading.Event()
    with ThreadPoolExecutor(1) as beside:
        watching = beside.submit(commands._cpu_at_lines, tmp_path / "lines", ended)
        try:
            subprocess.run([sys.executable, "-c", code], check=True)
        finally:
            ended.set()
    first, second, third = watching.result()
    assert second - first >= 0.25 and third - second < 0.25


def pretraining(seconds: list[float], waits: list[float], samples: int, save_s: float) -> Pretraining:
    lines = [
        {"seconds": s, "cpu": s / 2, "data_wait": wait, "samples_per_s": samples / s, "loss": 1.0}
        for s, wait in zip(seconds, waits, strict=True)
    ]
    return Pretraining(lines, save_s, 1000 * samples)


def test_the_first_step_of_every_run_is_dropped():
    one = [pretraining([9, 2, 4], [0.9, 0.5, 0.25], 3, 1.0), pretraining([9, 3, 3], [0.9, 0, 0], 3, 3.0)]
    two = [pretraining([9, 4, 4], [0.9, 0, 0.5], 6, 5.0)] * 2
    plain = [{"seconds": seconds, "cpu": [1, 1, 1], "loss": [1.0] * 3} for seconds in ([90, 2, 3], [90, 2, 2])]
    result = train.judge(one, two, plain, {})
    values = {name: figure.values for name, figure in result.figures.items()}
    assert values["step, trainer, wall"] == (2, 4, 3, 3) and values["step, bare, wall"] == (2, 3, 2, 2)
    assert values["step, trainer, CPU"] == (1, 2, 1.5, 1.5) and values["step, bare, CPU"] == (1, 1, 1, 1)
    assert values["1 process"] == (1.5, 0.75, 1, 1) and values["2 processes"] == (1.5,) * 4
    assert values["2 processes, waiting for data"] == (0, 50, 0, 50)
    assert values["1 process, checkpoint"] == (1, 3) and values["2 processes, bytes of a checkpoint"] == (6000,) * 2
    ratios = {ratio["name"]: (ratio["value"], ratio["required"], ratio["met"]) for ratio in result.facts()["ratios"]}
    assert ratios == {
        "trainer over bare step, wall": (1.5, "at most 1.05", False),
        "trainer over bare step, CPU": (1.5, "at most 1.05", False),
        "samples/s, 2 processes over 1": (1.5, None, None),
        "checkpoint over step, 1 process": (2 / 3, None, None),
    }


@pytest.mark.parametrize("other", [[1.0, 2.1], [1.0, math.nan]])
def test_runs_that_do_not_compute_the_same_are_not_compared(other):
    train.compare([1.0, 2.0], [1.0, 2.0 * (1 + 1e-6)], 1e-5)
    with pytest.raises(ArithmeticError, match=r"step 2: the trainer's loss is 2.0, that of the bare step"):
        train.compare([1.0, 2.0], other, 1e-5)


def test_a_command_that_fails_is_told_by_its_last_line(tmp_path):
    with pytest.raises(CommandFailed, match=r"pretrain .*tiny\.yaml: got error: .*nowhere"):
        command("pretrain", WORDS[0], f"data={tmp_path / 'nowhere'}", f"run.out={tmp_path}")


@pytest.fixture(scope="module")
def loading(dataset):
    found = data.Loading([*WORDS, f"data={dataset}", "run.batch=4", "run.out=none"])
    assert len({item.session.key for item in found.items}) == 4
    return found


def test_the_reference_reads_what_training_reads(loading):
    ranks = [3, 0, 5]
    ours, plain = loading.read(ranks), loading.read_plainly(ranks)
    assert len(ours) == 4 and set(ours) <= set(plain)
    for key, arrays in ours.items():
        assert set(arrays) == set(plain[key]) == {*data.NAMES, "windows"} and len(arrays["windows"]) == 3
        for name, values in arrays.items():
            np.testing.assert_array_equal(values, plain[key][name])


def test_bytes_of_a_sample_are_those_of_what_is_read(loading, monkeypatch):
    unzipped = []
    read = data.zipfile.ZipFile.read

    def count(archive, name, *rest):
        unzipped.append(getattr(name, "compress_size", None) or archive.getinfo(name).compress_size)
        return read(archive, name, *rest)

    all_of_it, some = loading.bytes_read(range(8)), loading.bytes_read(range(2))
    monkeypatch.setattr(data.zipfile.ZipFile, "read", count)
    loading.dataset.read(loading.items[0].session, (*data.NAMES, "windows"), range(8))
    assert 0.9 * all_of_it[0] <= sum(unzipped) <= all_of_it[0]  # metadata of a session is counted once
    assert all(few < every for few, every in zip(some, all_of_it, strict=True))


@pytest.mark.parametrize("workers", [1, 2])
def test_the_loader_gives_the_stream_in_order(loading, workers):
    taken = [batch.to("cpu") for batch in loading.loader(workers, 3)]
    stream = Stream([loading.dataset], [1.0], "train", loading.settings.run.seed)
    expected = [stream.at(position).session.key for position in range(12)]
    assert [key for batch in taken for key in batch.keys] == expected
    first = loading.load(loading.items).to("cpu")
    assert (first.context.row_N == taken[0].context.row_N).all()


def test_a_slow_loader_delivers_slowly(loading, monkeypatch):
    def slow(workers, count):
        assert (workers, count) == (1, 7)
        made = loading.load(loading.items)
        for number in range(count):
            time.sleep(0 if number < 2 else 0.05)
            yield made

    monkeypatch.setattr(loading, "loader", slow)
    rate = data.delivered(loading, 1, 5)
    assert 0 < rate <= 4 / 0.05  # the two that were ready do not count


@pytest.mark.parametrize(("gpu", "core", "workers"), [(1, 4.5, 1), (9, 4.5, 2), (9.1, 4.5, 3), (30, 0.5, 60)])
def test_workers_for_a_gpu(gpu, core, workers, capsys):
    assert data.workers_for(gpu, core) == workers
    data.show_workers(core)
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if "needs run.workers" in line]
    assert rows == [["needs", "run.workers", *(str(math.ceil(one / core)) for one in data.GPU)]]


@pytest.mark.slow
def test_the_bench_of_training_on_a_coarse_grid(command):
    done = command("tools/bench.py", "train", "--small", "--repeat", 1, "--json")
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout.splitlines()[-1])
    figures, losses = facts["figures"], facts["notes"]["loss"]
    assert len(losses["trainer"]) == 3
    np.testing.assert_allclose(losses["trainer"], losses["bare"], rtol=1e-5)
    steps = [f"step, {which}, {clock}" for clock in ("wall", "CPU") for which in ("trainer", "bare")]
    for name in (*steps, "1 process", "2 processes"):
        assert figures[name]["n"] == 2 and figures[name]["low"] >= 0
    for name in ("1 process", "2 processes"):
        assert figures[f"{name}, checkpoint"]["median"] > 0
        assert figures[f"{name}, bytes of a checkpoint"]["median"] > 1e6
    required = {ratio["name"]: ratio["required"] for ratio in facts["ratios"] if ratio["required"]}
    assert required == dict.fromkeys([f"trainer over bare step, {c}" for c in ("wall", "CPU")], "at most 1.05")


@pytest.mark.slow
def test_the_bench_of_loading_on_a_coarse_grid(command):
    done = command("tools/bench.py", "data", "--small", "--repeat", 1, "--json")
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout.splitlines()[-1])
    figures, ratios = facts["figures"], {ratio["name"]: ratio for ratio in facts["ratios"]}
    whole = figures["load_batch, 2 samples, CPU"]
    assert figures["one core"]["median"] == pytest.approx(2000 / whole["median"])
    asked = {name: ratio["required"] for name, ratio in ratios.items() if ratio["required"]}
    names = [f"loader, {which} over training, 2 processes" for which in ("1 process", "2 processes")]
    assert asked == dict.fromkeys(names, "at least 5")
    training = figures["training, 2 processes"]
    assert training["n"] == 2 and training["low"] > 0
    for name in names:
        of = figures[name.partition(" over ")[0]]["median"]
        assert ratios[name]["value"] == pytest.approx(of / training["median"])
    assert figures["bytes read of a sample"]["n"] == 2 and "needs run.workers" in done.stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("train", "steps=1"), "error: command line: steps: got 1"),
        (("train", "model=huge"), "error: command line: model: got 'huge'"),
        (("train", "--small", "model=published"), "error: model: unit[1]: got 8, expected a divisor of the 4 tokens"),
        (("data", "batches=0"), "error: command line: batches: got 0"),
    ],
)
def test_a_wrong_call_is_told_in_one_line(command, words, message):
    done = command("tools/bench.py", *words)
    errors = [line for line in done.stderr.splitlines() if not line.startswith("bench ")]
    assert done.returncode == 2 and len(errors) == 1 and message in errors[0], done.stderr
