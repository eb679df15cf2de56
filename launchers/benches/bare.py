"""The bare model step of a pretraining configuration, in plain PyTorch in this process.

    python -m launchers.benches.bare CONFIG.yaml [key=value ...]

What one process of `slim.training.trainer` computes, on the same samples in the same order from the same start:
schedules, losses, backward, clipping, AdamW, then running means and EMA target. No DeepSpeed, no loading process (all
micro-batches are loaded before), no log, no checkpoint. The last line of stdout is a JSON object: `seconds` and `loss`
of each step, and `cpu`, the CPU seconds of this process.
"""

from __future__ import annotations

import json
import sys
import time
from functools import partial

import torch

from shards.format.reader import Dataset
from shards.format.stream import MicroBatches, Stream
from slim.config import PretrainSettings, load_config
from slim.data.collate import load_batch
from slim.data.samples import geometry_for
from slim.pretrain.learner import PretrainLearner
from slim.pretrain.objective import Objective
from slim.training import schedule
from slim.training.optim import parameter_groups


def bare_steps(settings: PretrainSettings) -> dict[str, list[float]]:
    """Take `run.steps` optimizer steps.

    Returns
    -------
    dict
        `seconds`, `cpu` (s of this process) and `loss` (mean of the micro-batches) of each.
    """
    datasets = [Dataset(item.path) for item in settings.data]
    geometry = geometry_for(settings, datasets)
    stream = Stream(datasets, [item.weight for item in settings.data], "train", settings.run.seed, settings.windows.k)
    steps, accumulate, optimizer = settings.run.steps, settings.run.accumulate, settings.optimizer
    assert steps is not None
    load = partial(load_batch, datasets=datasets, geometry=geometry, settings=settings)
    loaded = MicroBatches(stream, load, settings.run.batch, count=steps * accumulate)
    batches = [batch.to("cpu") for batch in loaded]

    torch.manual_seed(settings.run.seed)
    model = Objective(settings, geometry, datasets[0].grid.voxels)
    learner = PretrainLearner(settings, model)
    adam = torch.optim.AdamW(parameter_groups(model), lr=optimizer.lr, betas=optimizer.betas, fused=True)
    learner.begin(lambda _: batches[:accumulate])

    found: dict[str, list[float]] = {"seconds": [], "cpu": [], "loss": []}
    for step in range(steps):
        begun, begun_cpu, total = time.perf_counter(), time.process_time(), 0.0
        adam.param_groups[0]["weight_decay"] = schedule.weight_decay(step, steps, optimizer)
        adam.param_groups[1]["weight_decay"] = 0.0
        for group in adam.param_groups:
            group["lr"] = schedule.learning_rate(step, steps, optimizer)
        for batch in batches[step * accumulate : (step + 1) * accumulate]:
            losses = learner.losses(batch, step)
            (losses.total / accumulate).backward()
            total += float(losses.total.detach()) / accumulate
        torch.nn.utils.clip_grad_norm_(model.parameters(), optimizer.clip)
        adam.step()
        adam.zero_grad()
        learner.commit(step, steps)
        found["seconds"].append(time.perf_counter() - begun)
        found["cpu"].append(time.process_time() - begun_cpu)
        found["loss"].append(total)
    return found


if __name__ == "__main__":
    print(json.dumps(bare_steps(load_config(sys.argv[1], sys.argv[2:]))))
