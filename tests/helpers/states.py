"""One of some processes that write checkpoints of a small model with DeepSpeed, or resume from checkpoints.

    python tests/helpers/states.py RANK PROCESSES STORE save RUN:STAGE [RUN:STAGE ...]
    python tests/helpers/states.py RANK PROCESSES STORE load RUN:STAGE[:MIRROR] [...]

STORE: a file that does not exist yet, the same for all processes. `load` prints a line for each run: LOADED with the
state and the losses of the next steps, or REFUSED with the message of the error.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch


def engine_of(stage: int) -> Any:
    """A DeepSpeed engine of a small model with two groups of parameters."""
    import deepspeed

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(12, 8), torch.nn.Linear(8, 4))
    biases = [parameter for parameter in model.parameters() if parameter.ndim == 1]
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    adam = torch.optim.AdamW([{"params": matrices}, {"params": biases, "weight_decay": 0.0}], lr=0.01)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": stage},
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
    }
    return deepspeed.initialize(model=model, optimizer=adam, config=config)[0]


def step(engine: Any) -> float:
    loss = engine(torch.linspace(-1, 1, 12)[None]).square().sum()
    engine.backward(loss)
    engine.step()
    return float(loss)


def save(run: Path, stage: int) -> None:
    """Train two steps and save a checkpoint."""
    from slim.checkpoints import checkpoint, run_folder

    engine = engine_of(stage)
    run.mkdir(parents=True, exist_ok=True)
    for name in run_folder.ABOUT_RUN:
        (run / name).write_text("of a run")
    for _ in range(2):
        step(engine)
    state = {"step": 2, "consumed": 2, "skipped": {"keys": [], "row": 0}}
    checkpoint.save(engine, run / "checkpoints", 2, state, {"a": torch.zeros(2)}, {"zero_stage": stage})


def load(run: Path, stage: int, mirror: Path | None) -> str:
    """Resume as the trainer does: find the checkpoint, in the mirror if need be, and load it."""
    from shards.core.errors import UserError
    from slim.training import reshard
    from slim.training.resume import find_checkpoint

    engine = engine_of(stage)
    try:
        found = find_checkpoint(run, mirror)
        assert found is not None
        state, _ = reshard.load(engine, found)
    except UserError as error:
        return f"REFUSED {error.line()}"
    return f"LOADED {json.dumps({**state, 'losses': [step(engine) for _ in range(3)]})}"


def main() -> None:
    rank, processes, store, what, *runs = sys.argv[1:]
    from launchers.job import prepare

    os.environ["LOCAL_RANK"] = rank
    prepare(on_gpu=False)
    import deepspeed

    torch.distributed.init_process_group("gloo", f"file://{store}", rank=int(rank), world_size=int(processes))
    deepspeed.init_distributed("gloo", verbose=False)
    for told in runs:
        run, stage, *mirror = told.split(":")
        if what == "save":
            save(Path(run), int(stage))
        else:
            print(load(Path(run), int(stage), Path(mirror[0]) if mirror else None), flush=True)
        torch.distributed.barrier()
    os._exit(0)


if __name__ == "__main__":
    main()
