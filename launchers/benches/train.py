"""Pretraining by its command, with one process and with two, beside the bare model step, on a CPU.

- *Samples per second*: `slim-brain pretrain` as a user runs it, with the configuration's ZeRO stage and log, from its
  metrics.jsonl. Every process computes on one thread and has `workers` loading processes beside it.
- *Overhead*: an optimizer step of one process beside that of `launchers.benches.bare`, the same step in plain PyTorch
  and nothing else, with the same threads and the same settings of the C library. Both take the same samples in the same
  order from the same start: their losses have to agree, or nothing is compared. By the clock a step waits for data,
  too; its CPU time is all that the process computes from one line of metrics.jsonl to the next, the log included.
- *Checkpoint*: seconds from the end of the last step to the complete checkpoint, flushed to the disk, and its bytes.

The first step of every run is dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field

from launchers.benches.commands import SMALL as SMALL_DATA
from launchers.benches.commands import Pretraining, Trained, bare, pretrain
from launchers.benches.common import Figure, Ratio, Result

# Rounding differs where DeepSpeed sums a norm in another order; in bf16 a last bit is 2^-8.
AGREE = {"fp32": 1e-5, "bf16": 1e-2}


class Bench(Trained):
    """Sizes of the bench; the cohort is synthetic."""

    model: Literal["published", "lean", "large", "tiny"] = Field("lean", description="of configs/pretrain/")
    precision: Literal["bf16", "fp32"] = "fp32"
    batch: int = Field(1, ge=1, description="samples per process and step")
    workers: int = Field(1, ge=0, description="loading processes per process")


SMALL: dict[str, object] = SMALL_DATA | {"model": "tiny", "steps": 3}


def run(bench: Bench, repeat: int, folder: Path, begun: Callable[[str], None]) -> Result:
    """Measure all of it; see the head of this file."""
    dataset = bench.make_dataset(folder, begun)
    words = bench.words(dataset, batch=bench.batch, workers=bench.workers, checkpoint_every=bench.steps)
    words.append(f"precision={bench.precision}")
    one, two, plain = [], [], []
    for number in range(repeat):
        which = f"round {number + 1} of {repeat}"
        begun(f"bare step, {which}")
        plain.append(bare(words))
        begun(f"1 process, {which}")
        one.append(pretrain(words, folder / "run"))
        begun(f"2 processes, {which}")
        two.append(pretrain([*words, "run.processes=2"], folder / "run"))
        compare([line["loss"] for line in one[-1].lines], plain[-1]["loss"], AGREE[bench.precision])
    return judge(one, two, plain, {"settings": bench.model_dump(mode="json")})


def compare(ours: Sequence[float], theirs: Sequence[float], tolerance: float) -> None:
    """ArithmeticError where the losses of two runs are not those of the same work."""
    for step, (loss, other) in enumerate(zip(ours, theirs, strict=True), start=1):
        if not abs(loss - other) <= tolerance * abs(other):
            raise ArithmeticError(f"step {step}: the trainer's loss is {loss}, that of the bare step {other}")


def judge(
    one: Sequence[Pretraining],
    two: Sequence[Pretraining],
    plain: Sequence[dict[str, list[float]]],
    notes: dict[str, object],
) -> Result:
    """Figures of the rounds with one process, with two and of the bare step, and what is required of them."""
    result = Result(notes=notes)

    def figure(name: str, unit: str, values: Sequence[float]) -> str:
        result.figures[name] = Figure(unit, tuple(values))
        return name

    for clock, field in (("wall", "seconds"), ("CPU", "cpu")):
        step = figure(f"step, trainer, {clock}", "s", [s for done in one for s in done.values(field)])
        alone = figure(f"step, bare, {clock}", "s", [s for done in plain for s in done[field][1:]])
        result.ratios.append(Ratio(f"trainer over bare step, {clock}", step, alone, at_most=1.05))
    rates = {}
    for name, runs in (("1 process", one), ("2 processes", two)):
        rates[name] = figure(name, "samples/s", [rate for done in runs for rate in done.values("samples_per_s")])
        waits = [100 * wait for done in runs for wait in done.values("data_wait")]
        figure(f"{name}, waiting for data", "%", waits)
        figure(f"{name}, checkpoint", "s", [done.save_s for done in runs])
        figure(f"{name}, bytes of a checkpoint", "B", [done.checkpoint_bytes for done in runs])
    result.ratios += [
        Ratio("samples/s, 2 processes over 1", rates["2 processes"], rates["1 process"]),
        Ratio("checkpoint over step, 1 process", "1 process, checkpoint", "step, trainer, wall"),
    ]
    result.notes["loss"] = {"trainer": [line["loss"] for line in one[-1].lines], "bare": plain[-1]["loss"]}
    return result
