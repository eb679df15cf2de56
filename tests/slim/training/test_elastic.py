"""Runs that go on with another number of processes: the same curve, every sample once, at every ZeRO stage."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.commands import Command
from helpers.training import losses, metrics, pretrain, weights
from shards.format.stream import MicroBatches
from slim.checkpoints import checkpoint
from slim.checkpoints.provenance import Provenance
from slim.training import reshard

pytestmark = pytest.mark.processes

STEPS = 5


def slow(stage: int) -> object:
    return pytest.param(stage, marks=pytest.mark.slow)


def saved_with(folder: Path, global_batch: int) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / checkpoint.COMPLETE).write_text(json.dumps({"global_batch": global_batch, "files": {}}))
    return folder


@settings(deadline=None)
@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 6), st.integers(1, 8), st.integers(1, 6))
def test_the_global_batch_is_kept_or_what_would_keep_it_is_named(tmp_path_factory, batch, times, world, now, other):
    folder = saved_with(tmp_path_factory.getbasetemp() / "elastic", batch * times * world)
    assert reshard.accumulate_for(folder, batch, world) == times
    try:
        assert reshard.accumulate_for(folder, other, now) * other * now == batch * times * world
    except checkpoint.CheckpointError as error:
        assert batch * times * world % (other * now)
        for fit in map(int, error.hint.split(" one of ")[1].split(", or ")[0].split(", ")):
            if error.field == "run.batch":
                reshard.accumulate_for(folder, fit, now)
            else:
                reshard.accumulate_for(folder, 1, fit)


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from([1, 2, 3, 4, 6, 12]), st.integers(1, 4)), min_size=1, max_size=5), st.data())
def test_every_sample_is_consumed_once_whatever_the_processes(phases, data):
    """Global batch 12; each phase has a number of processes and of steps, and any batch that divides its share."""
    stream = SimpleNamespace(at=lambda position: position)
    seen, consumed = [], 0
    for world, steps in phases:
        batch = data.draw(st.sampled_from([n for n in (1, 2, 3, 4, 6, 12) if (12 // world) % n == 0]))
        count = steps * 12 // (batch * world)
        each = [list(MicroBatches(stream, list, batch, rank, world, count, consumed)) for rank in range(world)]
        for step in range(steps):  # the same samples in each step, too: its mean gradient is over the same set
            times = count // steps
            now = [n for mine in each for items in mine[step * times : (step + 1) * times] for n in items]
            assert sorted(now) == list(range(consumed, consumed + 12))
            consumed += 12
            seen += now
    assert sorted(seen) == list(range(consumed))


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 5), st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=3), min_size=1, max_size=3))
def test_parameters_are_put_together_from_shards(tmp_path_factory, world, shapes):
    """Groups of vectors, cut as ZeRO 1 and 2 cut them (a group in stretches) and as ZeRO 3 does (every vector)."""
    from deepspeed.utils.tensor_fragment import fragment_address

    folder = tmp_path_factory.mktemp("shards")
    keys = ("fp32", "exp_avg", "exp_avg_sq")
    whole = {f"{g}.{i}": {k: torch.rand(n) for k in keys} for g, ns in enumerate(shapes) for i, n in enumerate(ns)}
    for stage in (1, 3):
        for rank in range(world):
            adam, fp32, places = {}, [], []
            for group, sizes in enumerate(shapes):
                names = [f"{group}.{i}" for i in range(len(sizes))]
                if stage == 3:
                    flat = {k: torch.cat([_cut(whole[name][k], rank, world) for name in names]) for k in keys}
                else:
                    flat = {k: _cut(torch.cat([whole[name][k] for name in names]), rank, world) for k in keys}
                    first, part, at, mine = rank * len(flat["fp32"]), len(flat["fp32"]), 0, {}
                    for name, size in zip(names, sizes, strict=True):
                        low, high = max(at, first), min(at + size, first + part)
                        if low < high:
                            mine[name] = fragment_address(start=low - first, numel=high - low)
                        at += size
                    places.append(mine)
                fp32.append(flat.pop("fp32"))
                adam[group] = {"step": torch.tensor(7.0), **flat}
            names = ("optimizer_state_dict", "fp32_flat_groups")
            if stage == 1:
                names = ("base_optimizer_state", "single_partition_of_fp32_groups")
            shard = {names[0]: {"state": adam}, names[1]: fp32, "param_slice_mappings": places}
            torch.save({"optimizer_state_dict": shard}, folder / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
        prefix = "zero_pp_rank_0_" if stage == 3 else ""
        model = {
            "param_shapes": [{f"{g}.{i}": torch.Size([n]) for i, n in enumerate(ns)} for g, ns in enumerate(shapes)]
        }
        torch.save(model, folder / f"{prefix}mp_rank_00_model_states.pt")
        shards = reshard.Shards(folder, stage, world)
        assert shards.step == 7
        for name, values in whole.items():
            for key in keys:
                assert torch.equal(shards.whole(name, key), values[key])


def _cut(values: torch.Tensor, rank: int, world: int) -> torch.Tensor:
    """The rank-th of equal parts, the end padded with numbers that nobody may read."""
    part = -(-len(values) // world)
    return torch.nn.functional.pad(values, (0, part * world - len(values)), value=99.0)[rank * part :][:part].clone()


@pytest.fixture(scope="module")
def whole(command: Command, dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Uninterrupted steps of 4 samples, one process, ZeRO stage 1."""
    out = tmp_path_factory.mktemp("whole") / "run"
    done = pretrain(command, dataset, out, "run.accumulate=2", "zero.stage=1", processes=1, steps=STEPS)
    assert done.returncode == 0, done.stderr
    return out


def go_on(command: Command, dataset: Path, out: Path, *words: str, processes: int, to_the_end: bool = False) -> str:
    """One step more, or all that are left; what was printed."""
    words = words if to_the_end else (*words, "run.max_seconds=0.01")
    done = pretrain(command, dataset, out, *words, processes=processes, steps=STEPS)
    assert done.returncode == (0 if to_the_end else 3), done.stderr
    assert to_the_end or "stopped by time limit at step" in done.stdout, done.stderr
    return done.stdout


def same_as(whole: Path, out: Path) -> None:
    assert [line["step"] for line in metrics(out)] == list(range(1, STEPS + 1))
    assert [line["samples"] for line in metrics(out)] == [line["samples"] for line in metrics(whole)]
    gaps = [abs(a / b - 1) for a, b in zip(losses(out), losses(whole), strict=True)]
    print("relative difference of losses", max(gaps))
    assert max(gaps) < 1e-5
    # Adam divides by the gradient's own size, see test_pretrain: tensors are compared as wholes.
    reach = sum(line["lr"] for line in metrics(whole))
    for name, value in weights(whole).items():
        assert (weights(out)[name] - value).square().mean().sqrt() < 0.01 * reach, name


@pytest.mark.parametrize("stage", [slow(0), 1, slow(2), 3])
def test_two_then_one_then_two_processes(
    command: Command, dataset: Path, whole: Path, tmp_path: Path, stage: int
) -> None:
    out, zero = tmp_path / "run", f"zero.stage={stage}"
    go_on(command, dataset, out, zero, processes=2)
    assert "run.accumulate=2 instead of 1" in go_on(command, dataset, out, zero, processes=1)
    assert checkpoint.facts(checkpoint.newest(out / "checkpoints"))["world_size"] == 1
    assert "instead of" not in go_on(command, dataset, out, zero, processes=2, to_the_end=True)
    same_as(whole, out)


def test_the_stage_that_is_chosen_stays_with_other_numbers_of_processes(
    command: Command, dataset: Path, whole: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    assert "zero.stage auto: 0\n" in go_on(command, dataset, out, "zero.stage=auto", "run.accumulate=2", processes=1)
    assert "zero.stage auto: 0\n" in go_on(command, dataset, out, "zero.stage=auto", processes=2)
    go_on(command, dataset, out, processes=1, to_the_end=True)  # auto is the default
    assert checkpoint.facts(checkpoint.newest(out / "checkpoints"))["zero_stage"] == 0
    assert Provenance.read(out).chosen["zero.stage"] == 0
    same_as(whole, out)


@pytest.mark.parametrize("stage", [slow(1), 2, slow(3)])
def test_one_then_four_processes(command: Command, dataset: Path, whole: Path, tmp_path: Path, stage: int) -> None:
    out, words = tmp_path / "run", (f"zero.stage={stage}", "run.batch=1", "run.accumulate=4")
    go_on(command, dataset, out, *words, processes=1)
    assert "run.accumulate=1 instead of 4" in go_on(command, dataset, out, *words, processes=4, to_the_end=True)
    same_as(whole, out)


def test_a_global_batch_that_cannot_be_kept_is_refused_in_one_line(
    command: Command, dataset: Path, whole: Path
) -> None:
    before = (whole / "config.yaml").read_text()
    for words, processes, needle in (
        (("run.batch=3",), 2, "Set run.batch to one of 1, 2,"),
        ((), 3, "Set run.processes to one of 1, 2,"),
        (("zero.stage=2",), 2, "zero.stage"),
    ):
        done = pretrain(command, dataset, whole, "zero.stage=1", *words, processes=processes, steps=STEPS + 1)
        assert done.returncode == 2
        assert needle in done.stderr and len(done.stderr.strip().splitlines()) == 1
        assert (whole / "config.yaml").read_text() == before
