"""Pretraining in real processes: ZeRO, checkpoints, exact resume, signals, kills, wrong calls."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import psutil
import pytest
import torch
import yaml

from helpers.commands import Command, run_command
from helpers.training import QUICK, TINY, flip, losses, metrics, pretrain, ranks_of, start, wait_for_lines, weights


@pytest.fixture(scope="module")
def whole(command: Command, dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six uninterrupted steps, two processes, ZeRO stage 2."""
    out = tmp_path_factory.mktemp("whole") / "run"
    done = pretrain(command, dataset, out, "--json")
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout.splitlines()[-1])
    assert facts["finished"] and facts["step"] == 6
    return out


def test_a_run_leaves_what_the_contract_says(whole: Path) -> None:
    lines = metrics(whole)
    assert [line["step"] for line in lines] == list(range(1, 7))
    fields = {
        "step",
        "epoch",
        "samples",
        "loss",
        "loss_cross_time",
        "loss_cross_location",
        "loss_double_cross",
        "lr",
        "wd",
        "ema",
        "grad_norm",
        "target_std",
        "target_rank",
        "context_std",
        "context_rank",
        "sample_cosine",
        "gain",
        "seconds",
        "data_wait",
        "samples_per_s",
        "tokens_kept",
        "peak_memory_bytes",
    }
    assert fields <= set(lines[0])
    assert lines[-1]["samples"] == 6 * 2 * 2
    assert 0 < lines[0]["tokens_kept"] < lines[0]["tokens_brain"] <= lines[0]["tokens_grid"]
    config = yaml.safe_load((whole / "config.yaml").read_text())
    assert config["run"]["steps"] == 6 and config["zero"]["stage"] == 2 and config["model_name"] == "tiny"
    text = (whole / "config.yaml").read_text()
    assert "# torch " in text and "# commit " in text
    folder = whole / "checkpoints" / (whole / "checkpoints" / "latest").read_text().strip()
    complete = json.loads((folder / "COMPLETE").read_text())
    assert complete["step"] == 6 and complete["world_size"] == 2
    assert any("optim_states" in name for name in complete["files"])
    for name, size in complete["files"].items():
        assert (folder / name).stat().st_size == size


def test_a_finished_run_is_left_as_it_is(command: Command, dataset: Path, whole: Path) -> None:
    before = weights(whole)
    done = pretrain(command, dataset, whole)
    assert done.returncode == 0, done.stderr
    assert len(losses(whole)) == 6
    assert all(torch.equal(value, weights(whole)[name]) for name, value in before.items())


def test_stopped_by_a_signal_and_resumed_equals_uninterrupted(
    dataset: Path, whole: Path, command: Command, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    child = start(dataset, out, steps=6)
    wait_for_lines(out, 2, child)
    child.send_signal(signal.SIGTERM)
    stdout, stderr = child.communicate(timeout=120)
    assert child.returncode == 3, stderr
    assert "the same command continues" in stdout
    done_before = len(losses(out))
    assert 2 <= done_before < 6
    done = pretrain(command, dataset, out)
    assert done.returncode == 0, done.stderr
    assert losses(out) == losses(whole)
    assert {
        name: float((value - weights(whole)[name]).abs().max()) for name, value in weights(out).items()
    } == dict.fromkeys(weights(whole), 0.0)


def test_killed_and_resumed_equals_uninterrupted(dataset: Path, whole: Path, command: Command, tmp_path: Path) -> None:
    """kill -9 of one process: the others do not wait for ever, status 3, and a second call goes on exactly."""
    out = tmp_path / "run"
    child = start(dataset, out, "run.checkpoint_every=2", steps=6)
    wait_for_lines(out, 3, child)
    os.kill(psutil.Process(child.pid).children()[-1].pid, signal.SIGKILL)
    _, stderr = child.communicate(timeout=120)
    assert child.returncode == 3, stderr
    assert "process 1 died (SIGKILL" in stderr.splitlines()[-1]  # the cause, not what follows from it
    assert "continues from the last complete checkpoint" in stderr
    done = pretrain(command, dataset, out, "run.checkpoint_every=2")
    assert done.returncode == 0, done.stderr
    assert losses(out) == losses(whole)
    assert all(torch.equal(value, weights(whole)[name]) for name, value in weights(out).items())


def test_processes_save_and_end_when_their_launcher_is_killed(dataset: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    child = start(dataset, out, steps=100000)
    wait_for_lines(out, 2, child)
    for rank in psutil.Process(child.pid).children():
        # A child forked from a process with threads can wait for ever for a lock one of them held.
        assert all(process.cmdline() != rank.cmdline() for process in rank.children())
    child.kill()
    child.communicate()
    end = time.monotonic() + 90
    while ranks_of(out):
        assert time.monotonic() < end, "processes of the run are left"
        time.sleep(0.2)
    assert (out / "checkpoints" / "latest").read_text().startswith("step-")


@pytest.fixture(scope="module")
def reference(command: Command, dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten steps of 4 samples, one process, no ZeRO."""
    out = tmp_path_factory.mktemp("reference") / "run"
    done = pretrain(command, dataset, out, "zero.stage=0", "run.batch=4", processes=1, steps=10)
    assert done.returncode == 0, done.stderr
    return out


@pytest.mark.parametrize(
    ("processes", "stage", "batch", "accumulate", "offload"),
    [
        pytest.param(2, 0, 2, 1, "", marks=pytest.mark.slow),
        (2, 1, 2, 1, ""),
        pytest.param(2, 2, 2, 1, "", marks=pytest.mark.slow),
        pytest.param(2, 2, 2, 1, "optimizer", marks=pytest.mark.slow),
        (2, 3, 2, 1, ""),
        (2, 3, 2, 1, "optimizer parameters"),
        pytest.param(1, 2, 2, 2, "", marks=pytest.mark.slow),
        (1, 2, 1, 4, ""),
        pytest.param(1, 3, 1, 4, "", marks=pytest.mark.slow),
    ],
)
def test_same_numbers_at_every_stage_and_world_size(
    command: Command,
    dataset: Path,
    reference: Path,
    tmp_path: Path,
    processes: int,
    stage: int,
    batch: int,
    accumulate: int,
    offload: str,
) -> None:
    """Losses of ten steps, and at their end the encoder, its EMA target and the running means."""
    out = tmp_path / "run"
    done = pretrain(
        command,
        dataset,
        out,
        f"zero.stage={stage}",
        f"run.batch={batch}",
        f"run.accumulate={accumulate}",
        "run.checkpoint_every=7",
        *(f"zero.offload_{what}=true" for what in offload.split()),
        processes=processes,
        steps=10,
    )
    assert done.returncode == 0, done.stderr
    assert losses(out) == pytest.approx(losses(reference), rel=1e-6)
    norms = [[line["grad_norm"] for line in metrics(run)] for run in (out, reference)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)
    # Adam divides by the gradient's own size: rounding moves an element without gradient as far as any other. So
    # tensors are compared as wholes, beside the way Adam can have moved them: the sum of the learning rates.
    reach = sum(line["lr"] for line in metrics(reference))
    for name, value in weights(reference).items():
        gap = (weights(out)[name] - value).square().mean().sqrt()
        assert gap < 0.01 * reach, name


def test_bf16_is_right_without_zero(command: Command, dataset: Path, tmp_path: Path) -> None:
    """DeepSpeed's own bf16 takes a step on gradients of zero first there; autocast does not."""
    found = []
    for stage in (0, 2):
        out = tmp_path / f"stage{stage}"
        # The stages sum the norm that is clipped by in another order; Adam makes 6e-5 of the next loss of that.
        words = ("precision=bf16", f"zero.stage={stage}", "optimizer.clip=100")
        done = pretrain(command, dataset, out, *words, processes=1, steps=4)
        assert done.returncode == 0, done.stderr
        found.append(losses(out))
    assert found[0][:2] == pytest.approx(found[1][:2], rel=1e-6)
    assert found[0] == pytest.approx(found[1], rel=1e-3)  # rounding of weights to bf16 grows from step to step


def test_from_a_damaged_checkpoint_nobody_goes_on(command: Command, dataset: Path, whole: Path, tmp_path: Path) -> None:
    out, mirror, words = tmp_path / "run", tmp_path / "mirror", ("run.checkpoint_every=2", "run.keep_every=4")
    done = pretrain(command, dataset, out, *words, "run.keep=1", f"run.mirror={mirror}")
    assert done.returncode == 0, done.stderr
    folders = {step: out / "checkpoints" / f"step-{step:08d}" for step in (4, 6)}
    assert sorted((out / "checkpoints").glob("step-*")) == sorted(folders.values())
    shard = folders[6] / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    flip(shard)
    done = pretrain(command, dataset, out, *words)
    assert done.returncode == 0, done.stderr
    assert f"{shard}: SHA-256: got" in done.stderr and "The run resumes from step-00000004" in done.stderr
    assert "resumed from  step-00000004" in done.stdout
    assert losses(out) == losses(whole)
    assert all(torch.equal(value, weights(whole)[name]) for name, value in weights(out).items())

    for folder in folders.values():
        flip(folder / "weights.safetensors")
    done = pretrain(command, dataset, out, *words)
    chosen, error = done.stderr.splitlines()
    assert done.returncode == 2 and chosen.startswith("chunk_tokens auto: ")
    assert "weights.safetensors" in error and "No checkpoint of the run is intact" in error
    done = pretrain(command, dataset, out, *words, f"run.mirror={mirror}")
    assert done.returncode == 0, done.stderr
    assert f"step-00000006 was copied from the mirror {mirror}" in done.stderr
    assert all(torch.equal(value, weights(whole)[name]) for name, value in weights(out).items())


def test_time_limit_stops_and_saves(command: Command, dataset: Path, tmp_path: Path) -> None:
    done = pretrain(command, dataset, tmp_path / "run", "run.max_seconds=0.01", processes=1)
    assert done.returncode == 3
    assert "time limit at step 1 of 6" in done.stdout
    assert (tmp_path / "run" / "checkpoints" / "latest").read_text() == "step-00000001\n"


def test_another_global_batch_and_another_model_are_refused_in_one_line(
    command: Command, dataset: Path, whole: Path
) -> None:
    before = (whole / "config.yaml").read_text()
    for words, processes, needle in (
        (("run.steps=8", "run.batch=3"), 2, "run.batch"),
        (("run.steps=8", "view=both"), 2, "view"),
        (("run.resume=never",), 2, "run.resume"),
        (("run.steps=8", "run.seed=1"), 2, "run.seed"),
    ):
        done = pretrain(command, dataset, whole, *words, processes=processes)
        assert done.returncode == 2
        assert (whole / "config.yaml").read_text() == before
        assert "Traceback" not in done.stderr
        assert needle in done.stderr.strip().splitlines()[-1]


def test_a_gpu_that_is_not_there_is_not_replaced_silently(command: Command, dataset: Path, tmp_path: Path) -> None:
    done = pretrain(command, dataset, tmp_path / "run", "run.device=cuda", processes=1)
    assert done.returncode == 2
    assert "run.device" in done.stderr and len(done.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize("gpu", ["", pytest.param("0", marks=pytest.mark.gpu)])
def test_the_cpu_is_meant_where_deepspeed_would_take_a_gpu(dataset: Path, tmp_path: Path, gpu: str) -> None:
    if gpu and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    words = (TINY, f"data={dataset}", f"run.out={tmp_path / 'run'}", "run.steps=1", *QUICK, "run.device=cpu")
    done = run_command("tools/pretrain.py", *words, DS_ACCELERATOR="cuda", CUDA_VISIBLE_DEVICES=gpu)
    assert done.returncode == 0, done.stderr


def test_incomplete_checkpoints_do_not_exist(tmp_path: Path, whole: Path) -> None:
    from slim.checkpoints import checkpoint

    folder = tmp_path / "checkpoints" / "step-00000009"
    folder.mkdir(parents=True)
    (folder / "mp_rank_00_model_states.pt").write_bytes(b"x")
    assert checkpoint.newest(folder.parent) is None
    real = whole / "checkpoints" / "step-00000006"
    assert {path.name for path in real.iterdir()} > {"config.yaml", "dataset.json", "COMPLETE"}
    for path in real.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    assert checkpoint.newest(folder.parent) == folder
    with open(folder / "weights.safetensors", "r+b") as file:
        file.truncate(100)
    assert checkpoint.newest(folder.parent) is None


def test_wandb_works_offline_and_goes_on_with_the_same_curve(command: Command, dataset: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    for words, status in ((("run.max_seconds=0.01",), 3), ((), 0)):
        done = pretrain(command, dataset, out, "run.wandb=offline", *words, processes=1, steps=2)
        assert done.returncode == status, done.stderr
    names = [path.name.split("-")[-1] for path in (out / "wandb").glob("offline-run-*")]
    assert names == 2 * [(out / "wandb" / "id").read_text()]
