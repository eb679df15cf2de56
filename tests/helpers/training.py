"""Pretraining by its command, and what it leaves."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import torch
from safetensors.torch import load_file

from helpers.commands import ROOT, Command
from slim.config import PretrainSettings, load_config

TINY = "configs/pretrain/tiny.yaml"

# The training process loads: a loading process takes longer to start than these runs last.
QUICK = ("run.batch=2", "run.workers=0", "run.wandb=disabled", "loss.sig_samples=1")


def metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in metrics(run)]


def weights(run: Path) -> dict[str, torch.Tensor]:
    latest = (run / "checkpoints" / "latest").read_text().strip()
    return load_file(run / "checkpoints" / latest / "weights.safetensors")


def pretrain(command: Command, dataset: Path, out: Path, *words: str, processes: int = 2, steps: int = 6):
    return command(
        "tools/pretrain.py",
        TINY,
        f"data={dataset}",
        f"run.out={out}",
        f"run.processes={processes}",
        f"run.steps={steps}",
        *QUICK,
        *words,
    )


def start(dataset: Path, out: Path, *words: str, steps: int) -> subprocess.Popen:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(
        [
            sys.executable,
            "tools/pretrain.py",
            TINY,
            f"data={dataset}",
            f"run.out={out}",
            "run.processes=2",
            f"run.steps={steps}",
            *QUICK,
            "run.workers=1",
            *words,
        ],
        cwd=ROOT,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ranks_of(out: Path) -> list[int]:
    """Processes of a run that are still there."""
    wanted = ["launchers.job", str(out / "config.yaml")]
    return [p.pid for p in psutil.process_iter(["cmdline"]) if (p.info["cmdline"] or [])[-2:] == wanted]


def wait_for_lines(out: Path, count: int, child: subprocess.Popen) -> None:
    end = time.monotonic() + 120
    while time.monotonic() < end:
        path = out / "metrics.jsonl"
        if path.exists() and path.read_text().count("\n") >= count:
            return
        if child.poll() is not None:
            raise AssertionError(child.communicate())
        time.sleep(0.02)
    raise AssertionError("no steps were logged")


def flip(path: Path) -> None:
    """Turn one bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def settings_of(dataset: Path, out: Path, *words: str) -> PretrainSettings:
    few = ("run.steps=6", "run.batch=2", "run.workers=1", "run.wandb=disabled")
    return load_config(TINY, (f"data={dataset}", f"run.out={out}", *few, *words))
