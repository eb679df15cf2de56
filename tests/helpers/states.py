"""One process that writes a checkpoint of a small model with DeepSpeed, or goes on from one.

    python tests/helpers/states.py RANK PROCESSES STORE FOLDER STAGE save|load

`load` prints a digest of parameters and moments, or the line of the refusal.
"""

from __future__ import annotations

import hashlib
import os
import sys
from pathlib import Path

import torch


def main() -> None:
    rank, processes, store, folder, stage, what = sys.argv[1:]
    from launchers.job import prepare

    os.environ["LOCAL_RANK"] = rank
    prepare(on_gpu=False)
    import deepspeed

    from shards.core.errors import UserError
    from slim.checkpoints import checkpoint, run_folder
    from slim.training import reshard

    torch.distributed.init_process_group("gloo", f"file://{store}", rank=int(rank), world_size=int(processes))
    deepspeed.init_distributed("gloo", verbose=False)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(12, 8), torch.nn.Linear(8, 4))
    biases = [parameter for parameter in model.parameters() if parameter.ndim == 1]
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    adam = torch.optim.AdamW([{"params": matrices}, {"params": biases, "weight_decay": 0.0}], lr=0.01)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": int(stage)},
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=adam, config=config)
    run = Path(folder)

    def step() -> float:
        loss = engine(torch.linspace(-1, 1, 12)[None]).square().sum()
        engine.backward(loss)
        engine.step()
        return float(loss)

    if what == "save":
        for name in run_folder.ABOUT_RUN:
            (run / name).write_text("of a run")
        for _ in range(2):
            step()
        state = {"step": 2, "consumed": 2, "skipped": {"keys": [], "row": 0}}
        checkpoint.save(engine, run / "checkpoints", 2, state, {"a": torch.zeros(2)}, {"zero_stage": int(stage)})
    else:
        try:
            state, _ = reshard.load(engine, run / "checkpoints" / checkpoint.tag(2))
        except UserError as error:
            print("REFUSED", error.line(), flush=True)
            os._exit(2)
        after = [step().hex() for _ in range(3)]
        print("LOADED", state, hashlib.sha256(repr(after).encode()).hexdigest(), flush=True)
    torch.distributed.barrier()
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
