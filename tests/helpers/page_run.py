"""A small run for tests of its page: its configuration, its metrics, and results of probes."""

from __future__ import annotations

import json
import math
from pathlib import Path

from helpers.pages import NASTY
from slim.config import PRESETS, check_run
from slim.evaluation.results import Estimate, Report, TaskFacts, TaskResult


def line(step: int, **changes) -> dict:
    gain = 0.3 * (1 - math.exp(-step / 40)) - 0.02
    return {
        "step": step,
        "epoch": step // 10,
        "samples": 8 * step,
        "loss": 1.5 - 0.001 * step,
        "loss_jepa": 0.4,
        "loss_sig": 0.02,
        "loss_mae": 1.0,
        "loss_cross_time": 0.4,
        "loss_cross_location": 0.4,
        "loss_double_cross": 0.4,
        "gain": gain,
        "gain_cross_time": gain,
        "gain_cross_location": gain,
        "gain_double_cross": gain,
        "lr": 1e-3,
        "wd": 0.04,
        "ema": 0.99,
        "grad_norm": 0.2,
        "target_std": 0.9,
        "target_rank": 20.0,
        "context_std": 0.8,
        "context_rank": 30.0,
        "sample_cosine": 0.7,
        "seconds": 0.5,
        "data_wait": 0.1,
        "samples_per_s": 16.0,
        "tokens_kept": 100.0,
        "peak_memory_bytes": 2**30,
        **changes,
    }


def make_run(folder: Path, lines: list[dict], steps: int | None = 120, **config) -> Path:
    folder.mkdir(parents=True)
    run = {"out": str(folder), "steps": steps, "epochs": 10}
    settings = {"data": "somewhere", "run": run, **config}
    written = folder / "config.yaml"
    tree = settings | {"model": PRESETS["tiny"].model_dump(), "model_name": "tiny"}
    written.write_text(f"# {NASTY}\n" + check_run(tree, written).model_dump_json())  # merged, as a run does it
    (folder / "metrics.jsonl").write_text("".join(json.dumps(item) + "\n" for item in lines))
    return folder


def add_probe(run: Path, value: float, subjects: int = 40, task: str = "sex") -> None:
    report = Report()
    ours = Estimate(value=value, low=value - 0.1, high=value + 0.1)
    facts = TaskFacts(type="classification", test_subjects=subjects)
    report.add(
        TaskResult(
            name=task, estimates={"ours": {"auroc": ours}, "random": {"auroc": Estimate(value=0.6)}}, facts=facts
        )
    )
    (run / "report").mkdir(exist_ok=True)
    report.write(run / "report")
