"""Fine-tuning of all weights, by low-rank updates (LoRA), above frozen stages, and of the head alone.

A synthetic cohort is converted, the small model of `configs/experiments.yaml` is pretrained on its training subjects,
and each way is fine-tuned on the same divisions of the subjects, `--repeat` of them. Each has

- its score on the test subjects (r of the planted trait), with the interval of `slim-brain finetune`;
- the number of parameters that are trained, and the memory of their moments of AdamW;
- the peak memory of the training process, libraries and data included;
- the CPU time of the whole command, tests included.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from pydantic import Field

from launchers.benches.commands import command
from launchers.benches.common import Figure, Ratio, Result, cpu_seconds
from shards.core.settings import Settings
from shards.synthetic.truth import SyntheticCohort
from shards.synthetic.write import write_cohort
from slim.checkpoints.run_folder import METRICS

TASK, METRIC = "synthetic_score", "r"
WAYS: dict[str, tuple[str, ...]] = {
    "all weights": (),
    "LoRA": ("lora.rank=8",),
    "LoRA, 10 times the rate": ("lora.rank=8", "optimizer.lr=1e-3", "head.lr_scale=1"),
    "first 2 stages frozen": ("freeze=2",),
    "head alone": ("freeze=3",),
}
_MOMENTS = 8  # bytes of the moments of a parameter: two numbers in fp32


class Bench(Settings):
    """Sizes of the bench; the cohort is synthetic."""

    subjects: int = Field(100, ge=10, description="subjects, one session each: half of them are tested")
    frames: int = Field(240, ge=40, description="frames of a session")
    voxel_mm: float = Field(8.0, ge=1, le=20, description="voxel edge of the source, mm")
    mm: float = Field(8.0, gt=0, description="voxel edge of the grid, mm")
    shape: tuple[int, int, int] = Field((24, 24, 24), description="voxels of the grid")
    steps: int = Field(300, ge=1, description="optimizer steps of the pretraining")
    epochs: float = Field(6, gt=0, description="epochs of a fine-tuning")
    batch: int = Field(4, ge=1, description="samples of a step of fine-tuning")


SMALL: dict[str, object] = {
    **{"subjects": 20, "frames": 60, "voxel_mm": 16, "mm": 16, "shape": [16, 16, 16]},
    **{"steps": 2, "epochs": 1, "batch": 2},
}


def run(bench: Bench, repeat: int, folder: Path, begun: Callable[[str], None]) -> Result:
    """Measure all of it; see the head of this file."""
    begun(f"make a synthetic dataset of {bench.subjects} subjects")
    write_cohort(folder / "cohort", SyntheticCohort(bench.subjects, 1, bench.frames, bench.voxel_mm, snr=0.9))
    shards, pretrained = folder / "shards", folder / "pretrained"
    grid = (f"grid.mm={bench.mm}", f"grid.shape={list(bench.shape)}")
    chosen = ("--ranker", "ridge", "--workers", 1, *grid)
    command("make-shards", folder / "cohort" / "cohort.yaml", "--out", shards, *chosen)
    begun(f"pretrain for {bench.steps} steps")
    size = (f"run.steps={bench.steps}", f"run.checkpoint_every={bench.steps}", "run.device=cpu")
    command("pretrain", "experiments", f"data={shards}", f"run.out={pretrained}", *size)
    split = {"kind": "holdout", "shares": "[.4,.1,.5]", "repeats": repeat}
    shared = [f"{TASK}.split.{name}={value}" for name, value in split.items()]
    shared += [f"run.epochs={bench.epochs:g}", f"run.batch={bench.batch}", "run.device=cpu"]
    result = Result()
    scores: dict[str, str] = {}
    for way, words in WAYS.items():
        begun(way)
        before, out = cpu_seconds(), folder / "tuned" / way.replace(" ", "-")
        call = ("finetune", pretrained, "--data", shards, "--task", TASK, "--out", out, "--json", *shared, *words)
        found = json.loads(command(*call).splitlines()[-1])
        score, facts = found["tasks"][TASK]["finetuned"][METRIC], found["facts"][TASK]["finetuned"]
        peaks = [_peak_bytes(Path(one["run"])) / 2**20 for one in facts["runs"]]
        trained = facts["trained_parameters"]
        scores[way] = f"{METRIC} {score['value']:.2f} [{score['low']:.2f}, {score['high']:.2f}]"
        result.figures |= {
            f"{way}: score": Figure(METRIC, (score["value"],)),
            f"{way}: trained": Figure("parameters", (trained,)),
            f"{way}: moments": Figure("KiB", (trained * _MOMENTS / 1024,)),
            f"{way}: peak": Figure("MiB", tuple(peaks)),
            f"{way}: CPU": Figure("s", (cpu_seconds() - before,)),
        }
    for way in [*WAYS][1:]:
        result.ratios += [
            Ratio(f"{what}, {way} over all weights", f"{way}: {what}", f"all weights: {what}")
            for what in ("trained", "CPU")
        ]
    result.notes = {"scores": scores, "divisions": repeat, "task": TASK}
    return result


def _peak_bytes(run: Path) -> float:
    """Peak memory of the first process of a run."""
    return json.loads((run / METRICS).read_text(encoding="utf-8").splitlines()[-1])["peak_memory_bytes"]
