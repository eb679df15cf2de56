"""Run folders as a pretraining leaves them, without the pretraining; and tools called in this process."""

from __future__ import annotations

import contextlib
import io
import json
import runpy
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import torch
from safetensors.torch import save_file

from helpers.commands import ROOT
from shards.core.files import sha256
from shards.core.settings import check
from shards.format.reader import Dataset
from slim.checkpoints import checkpoint
from slim.checkpoints.weights import SUMS
from slim.config import PretrainSettings
from slim.model.geometry import geometry_of
from slim.pretrain.objective import Objective

ALIGNED = {"embed": 16, "heads": 2, "depths": (1, 1), "unit": (5,), "strides": ((5, 1, 1, 1),), "local_stages": 1}
STRADDLING = {
    "embed": 16,
    "heads": 2,
    "depths": (1, 1, 1),
    "unit": (4,),
    "strides": ((2, 1, 1, 1), (2, 1, 1, 1)),
    "local_stages": 2,
}  # slots of 4 frames, windows of 5


def write_run(folder: Path, dataset: Path, sizes: dict, seed: int = 3) -> Path:
    """A run folder as a pretraining leaves it, with the weights it would begin with; a target of its own."""
    opened = Dataset(dataset)
    patches = opened.grid.patch_shape
    sizes = sizes | {"unit": (*sizes["unit"][:1], *patches)}  # one unit a slot, whatever the grid
    settings = check(
        PretrainSettings,
        {"data": str(dataset), "model": sizes, "view": "both", "run": {"out": str(folder), "seed": seed}},
        "test",
    )
    geometry = geometry_of(settings.model, (8 * 5, *patches))
    torch.manual_seed(seed)
    encoder = Objective(settings, geometry, 64).encoder
    tensors = {f"encoder.{name}": value for name, value in encoder.state_dict().items()}
    tensors |= {f"target.{name}": value * 0.5 for name, value in encoder.state_dict().items()}
    saved = folder / "checkpoints" / checkpoint.tag(7)
    saved.mkdir(parents=True)
    for place in (folder, saved):
        note = "# merged configuration\n# commit 5e1f+\n# numpy 2.4.6\n"  # as the launcher's
        (place / "config.yaml").write_text(note + settings.model_dump_json())
        (place / "dataset.json").write_text(json.dumps(opened.manifest.data.tree()))
    write_weights(saved, tensors)
    return folder


def write_weights(saved: Path, tensors: dict) -> None:
    save_file({name: value.contiguous() for name, value in tensors.items()}, saved / checkpoint.WEIGHTS)
    (saved / checkpoint.COMPLETE).unlink(missing_ok=True)
    checkpoint.seal(saved, {"step": 7})


def tool(name: str, *words: object) -> subprocess.CompletedProcess:
    """What a tool does and prints, without the seconds that another process takes to begin."""
    argv, out, err = [f"tools/{name}", *map(str, words)], io.StringIO(), io.StringIO()
    with patch.object(sys, "argv", argv), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            runpy.run_path(str(ROOT / "tools" / name), run_name="__main__")
        except SystemExit as ended:
            return subprocess.CompletedProcess(argv, int(ended.code or 0), out.getvalue(), err.getvalue())
    raise AssertionError(f"{name} did not exit")


def sum_again(folder: Path) -> None:
    names = [line.partition("  ")[2] for line in (folder / SUMS).read_text().splitlines()]
    (folder / SUMS).write_text("".join(f"{sha256(folder / name)}  {name}\n" for name in names))
