"""Bytes at the peak of steps of a real DeepSpeed engine on the CPU, one of so many processes that exchange by gloo.

    python tests/helpers/engine.py RANK PROCESSES STORE STAGE:ACCUMULATE [STAGE:ACCUMULATE ...]

STORE: a file that is not there yet, the same for all processes. Prints a JSON list, a number for each engine.
"""

from __future__ import annotations

import json
import os
import sys
import weakref
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

BUCKET = 2**18


class Live(TorchDispatchMode):
    """Bytes of all live storages, at their peak.

    Torch's profiler would not do: what threads of gloo free, it never hears of. Copies that gloo makes for itself are
    not counted; they show as views of storages that no operation has made.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = self.total = 0
        self._watched: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.device.type == "cpu" and not func.is_view:
                self._take(tensor)
        return out

    def _take(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._watched:
            self._watched[key] = weakref.ref(storage, partial(self._gone, key, storage.nbytes()))
            self.total += storage.nbytes()
            self.peak = max(self.peak, self.total)

    def _gone(self, key: int, size: int, _dead: weakref.ref) -> None:
        del self._watched[key]
        self.total -= size


def steps(stage: int, accumulate: int, processes: int) -> None:
    """Of the trainer's learner and engine: as many as it takes until a further one holds no more."""
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param

    from helpers.counted import prepared, zero_settings
    from slim.pretrain.learner import PretrainLearner
    from slim.pretrain.objective import Objective
    from slim.training.engine import deepspeed_config
    from slim.training.optim import GuardedAdamW, parameter_groups

    given = zero_settings(stage, accumulate, processes)
    geometry, batch = prepared(given, 8)
    model = Objective(given, geometry, batch.brain_QV.shape[1])
    learner = PretrainLearner(given, model)
    config = deepspeed_config(given)
    config["zero_optimization"] |= {"reduce_bucket_size": BUCKET, "allgather_bucket_size": BUCKET}
    adam = GuardedAdamW(parameter_groups(model), clip=None if given.zero_stage else given.optimizer.clip)
    engine, *_ = deepspeed.initialize(model=model, optimizer=adam, config=config)
    here = batch.pack().to("cpu")
    for _ in range(3 if stage == 3 else 2):  # moments are made in the first; stage 3 knows its layers in the third
        for _ in range(accumulate):
            losses = learner.losses(here, 0, engine)
            engine.backward(losses.total)
            engine.step()
            del losses
        learner.commit(0, 2, full=safe_get_full_fp32_param if stage == 3 else None)


def main() -> None:
    from launchers.job import prepare

    rank, processes, store, *engines = sys.argv[1:]
    os.environ["LOCAL_RANK"] = rank
    prepare(on_gpu=False)
    import deepspeed

    torch.distributed.init_process_group("gloo", f"file://{store}", rank=int(rank), world_size=int(processes))
    deepspeed.init_distributed("gloo", verbose=False)
    peaks = []
    for engine in engines:
        with Live() as live:
            stage, accumulate = map(int, engine.split(":"))
            steps(stage, accumulate, int(processes))
        peaks.append(live.peak)
    print(json.dumps(peaks), flush=True)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
