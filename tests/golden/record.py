"""Numbers that a change of structure must not alter, worked out by the commands as a user types them.

    python tests/golden/record.py FOLDER     works in FOLDER and writes numbers.json beside this file

`numbers.json` holds the sha256 of every file of a small dataset (its windows ranked by version 1 of `mutual`, and once
more by the version that is the default now), 20 losses of each objective (one process at ZeRO
stage 0, two at stage 2), the vectors of one scan, and the scores of three probes. A change that is meant to alter them
records them anew, and says so in the changelog.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
NUMBERS = HERE / "numbers.json"
OBJECTIVES = ("default", "jepa", "mae")
TASKS = ("synthetic_group", "synthetic_score", "synthetic_fingerprint")


def processor() -> str:
    """The kind of processor: other kinds add in another order, and differ in the last digits."""
    wanted = ("model name", "cpu family", "model")
    facts = dict(re.findall(r"^([\w ]+?)\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE))
    return ", ".join([*(facts.get(name, "unknown") for name in wanted), torch.backends.cpu.get_cpu_capability()])


def call(*words: object) -> None:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, f"{words}: {done.stderr}"


def make_dataset(folder: Path) -> Path:
    """Eight subjects, two sessions each, ranked by a small extractor as version 0.1 ranked."""
    cohort = folder / "cohort"
    sizes = ("--subjects", 8, "--sessions", 2, "--frames", 48, "--voxel-mm", 16)
    call("tools/make_cohort.py", "--out", cohort, *sizes)
    return convert(folder, "dataset", "--ranker-version", 1)


def convert(folder: Path, name: str, *words: object) -> Path:
    grid = ("grid.mm=16", "grid.shape=[16,16,16]", "extractor.steps=10")
    cohort, dataset = folder / "cohort" / "cohort.yaml", folder / name
    call("tools/make_shards.py", cohort, "--out", dataset, "--workers", 1, *words, *grid)
    return dataset


def dataset_sums(dataset: Path) -> dict[str, str]:
    """The sha256 of each file that the format names, by its path in the dataset."""
    sums = {}
    for path in sorted(dataset.rglob("*")):
        name = path.relative_to(dataset)
        if path.is_file() and name.parts[0] not in ("work", "report"):
            content = path.read_bytes()
            if name.name == "sessions.jsonl":  # fingerprints of the scans hold the times of their files
                content = re.sub(rb'"fingerprint": "[0-9a-f]+"', b"", content)
            sums[name.as_posix()] = hashlib.sha256(content).hexdigest()
    return sums


def train(dataset: Path, out: Path, objective: str, processes: int, stage: int) -> list[float]:
    call(
        "tools/pretrain.py",
        "configs/pretrain/tiny.yaml",
        f"data={dataset}",
        f"run.out={out}",
        f"objective={objective}",
        f"zero.stage={stage}",
        f"run.processes={processes}",
        "run.steps=20",
        "run.batch=2",
        "run.workers=0",
        "run.wandb=disabled",
        "loss.sig_samples=2",
    )
    return [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]


def scan_vectors(run: Path, folder: Path) -> dict[str, list[float]]:
    """Of the first scan: the first sixteen numbers of each array of vectors."""
    bold = sorted((folder / "cohort").rglob("*_bold.nii.gz"))[0]
    call("tools/embed.py", run, bold, "--out", folder / "vectors.npz")
    with np.load(folder / "vectors.npz", allow_pickle=False) as arrays:
        return {
            name: np.asarray(value, float).ravel()[:16].tolist()
            for name, value in sorted(arrays.items())
            if np.issubdtype(value.dtype, np.floating)
        }


def probe_scores(run: Path, dataset: Path, folder: Path) -> dict[str, Any]:
    tasks = [word for name in TASKS for word in ("--task", f"configs/downstream/{name}.yaml")]
    call("tools/probe.py", run, "--data", dataset, "--random-seeds", 1, "--out", folder / "probe", *tasks)
    report = json.loads((folder / "probe" / "report.json").read_text())
    return {
        f"{task} {method} {metric}": score["value"]
        for task, methods in report["tasks"].items()
        for method, metrics in methods.items()
        for metric, score in metrics.items()
    }


def record(folder: Path) -> dict[str, Any]:
    """All the numbers; everything is made in `folder`."""
    dataset = make_dataset(folder)
    losses = {}
    for objective in OBJECTIVES:
        for processes, stage in ((1, 0), (2, 2)):
            name = f"{objective}, {processes} process{'es' if processes > 1 else ''}, ZeRO {stage}"
            losses[name] = train(dataset, folder / f"{objective}-{processes}", objective, processes, stage)
    run = folder / "default-1"
    return {
        "processor": processor(),
        "dataset": dataset_sums(dataset),
        "dataset, newest ranker": dataset_sums(convert(folder, "ranked", "--extractor", dataset / "extractor")),
        "losses": losses,
        "vectors": scan_vectors(run, folder),
        "probe": probe_scores(run, dataset, folder),
    }


if __name__ == "__main__":
    NUMBERS.write_text(json.dumps(record(Path(sys.argv[1])), indent=1) + "\n")
