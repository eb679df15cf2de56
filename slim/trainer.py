"""Pretraining: the loop over a DeepSpeed engine. Run by `launchers/job.py` in every process.

One optimizer step, in this order: schedules set, then per micro-batch targets, losses, backward (DeepSpeed reduces,
clips and steps at the last one), then the EMA target and the running means move, then the step is logged, then it may
be saved. Everything random depends on (seed, epoch, key) or (seed, step), so a run that is stopped and resumed gives
the numbers of one that was not.
"""

from __future__ import annotations

import math
import multiprocessing
import signal
import time
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader

from shards.console import progress
from shards.reader import Dataset
from shards.stream import MicroBatches, Stream
from slim import checkpoint, elastic, schedule
from slim.batch import geometry_for, identity, load_batch
from slim.config import PretrainSettings
from slim.learner import Learner, parameter_groups
from slim.monitor import Monitor, effective_rank, peak_memory_bytes
from slim.objective import Objective
from slim.skipping import NOT_FINITE, GuardedAdamW, Skipped

_PATIENCE = 1800  # seconds a loading process may take for a batch before it counts as lost
_BUCKET = 5_000_000  # numbers that processes exchange at once: 20 MB
_RANK_ROWS = 2048  # rows of the matrix whose effective rank is logged


def deepspeed_config(settings: PretrainSettings) -> dict[str, Any]:
    """The engine's configuration. Precision is autocast inside the model, so states and gradients are fp32."""
    return {
        "train_micro_batch_size_per_gpu": settings.run.batch,
        "gradient_accumulation_steps": settings.run.accumulate,
        "gradient_clipping": settings.optimizer.clip,
        "zero_optimization": {
            "stage": settings.zero.stage,
            # By default a buffer of 2 GB lies ready for gradients on their way, several times what a step needs.
            "reduce_bucket_size": _BUCKET,
            "allgather_bucket_size": _BUCKET,
        },
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
    }


class Trainer:
    """One process of a pretraining run.

    Parameters
    ----------
    settings : PretrainSettings
    device : torch.device
        This process's own.

    Raises
    ------
    UserError
        If data, model or checkpoint do not fit the configuration.
    """

    def __init__(self, settings: PretrainSettings, device: torch.device):
        self.settings, self.device = settings, device
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.folder = Path(settings.run.out)
        self.checkpoints = self.folder / "checkpoints"

        datasets = [Dataset(item.path) for item in settings.data]
        self.geometry = geometry_for(settings, datasets)
        self.stream = Stream(datasets, [item.weight for item in settings.data], "train", settings.run.seed)
        self.global_batch = settings.run.batch * settings.run.accumulate * self.world
        self.steps = settings.run.steps or max(
            1, math.ceil(settings.run.epochs * self.stream.per_epoch / self.global_batch)
        )
        self.identity = identity(settings, datasets[0])

        torch.manual_seed(settings.run.seed)
        model = Objective(settings, self.geometry, datasets[0].grid.voxels).to(self.device)
        self.learner = Learner(settings, model)
        self._full = _whole_parameter if settings.zero.stage == 3 else None
        chosen = settings.optimizer
        self._adam = GuardedAdamW(parameter_groups(model), lr=chosen.lr, betas=chosen.betas)
        self.engine, *_ = deepspeed.initialize(model=model, optimizer=self._adam, config=deepspeed_config(settings))
        sessions = sum(len(part) for part in self.stream.sessions)
        self.skipped = Skipped(self.folder, sessions, settings.run.damaged, settings.run.not_finite)
        self.step, self.consumed = 0, 0
        self._stop: str | None = None

    def run(self) -> dict[str, Any]:
        """Train to the end, or to the next step boundary after a signal or the time limit.

        Returns
        -------
        dict
            `finished`, `step`, `steps`, `stopped` (why, or None), `warnings`, last `loss`.
        """
        begun = time.monotonic()
        self._catch_signals()
        resumed = self._resume()
        if not resumed:
            self._calibrate()
        monitor = None
        if self.rank == 0:
            config = self.settings.model_dump(mode="json")
            monitor = Monitor(self.folder, self.step, self.settings.run.wandb, config)
        bar = progress("pretrain", self.steps - self.step, "steps") if self.rank == 0 else nullcontext(None)
        micro_batches = (self.steps - self.step) * self.settings.run.accumulate
        batches = iter(self._loader(self.consumed, micro_batches)) if self.step < self.steps else None
        stopped, line, said = None, {}, set[str]()
        with bar as advance:
            while self.step < self.steps and stopped is None:
                assert batches is not None
                line = self._one_step(batches)
                last = self.step == self.steps
                logged = self._is_logged()
                if monitor is not None and advance is not None:
                    if logged:
                        monitor.log(line)
                    loss = "none" if line["loss"] is None else f"{line['loss']:.4f}"
                    advance(
                        1,
                        f"loss {loss}, {line['samples_per_s']:.2f} samples/s, "
                        f"data wait {line['data_wait']:.0%}, {line['peak_memory_bytes'] / 2**30:.2f} GiB",
                    )
                    found = monitor.warnings()
                    for kind, text in found.items():
                        if kind not in said:
                            print(f"warning at step {self.step}: {text}", flush=True)
                    said = set(found)
                stopped = self._agree_to_stop(begun)
                if last or stopped or self.step % self.settings.run.checkpoint_every == 0:
                    self._save()
        result = {
            "finished": self.step >= self.steps,
            "step": self.step,
            "steps": self.steps,
            "stopped": stopped,
            "resumed_from": resumed,
            "loss": line.get("loss"),
            "seconds": round(time.monotonic() - begun, 2),
            "warnings": list(monitor.warnings().values()) if monitor else [],
        }
        if monitor is not None:
            monitor.close()
        return result

    def _catch_signals(self) -> None:
        def remember(number: int, _frame: Any) -> None:
            self._stop = signal.Signals(number).name

        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
            signal.signal(number, remember)

    def _agree_to_stop(self, begun: float) -> str | None:
        """Why to stop now, the same answer in every process: one flag, reduced at each step boundary."""
        limit = self.settings.run.max_seconds
        late = limit is not None and time.monotonic() - begun >= limit
        flag = torch.tensor([2 if self._stop else 1 if late else 0], device=self.device)
        if self.world > 1:
            dist.all_reduce(flag, dist.ReduceOp.MAX)
        return (None, "time limit", "signal")[int(flag)]

    def _loader(self, consumed: int, count: int) -> DataLoader:
        """This process's next `count` micro-batches after so many samples of the stream."""
        settings = self.settings
        load = partial(load_batch, datasets=self.stream.datasets, geometry=self.geometry, settings=settings)
        workers = settings.run.workers
        return DataLoader(
            MicroBatches(self.stream, load, settings.run.batch, self.rank, self.world, count, consumed),
            batch_size=None,
            num_workers=workers,
            multiprocessing_context=_loading_context() if workers else None,
            timeout=_PATIENCE if workers else 0,
        )

    def _calibrate(self) -> None:
        """Running means from the first step's samples, before anything is trained: twice, for means, then variance."""
        if self.learner.means:
            for _ in range(2):
                loaded = self._loader(0, self.settings.run.accumulate)
                self.learner.calibrate(batch.to(self.device) for batch in loaded)

    def _one_step(self, batches: Iterator[Any]) -> dict[str, Any]:
        """One optimizer step; returns its line of metrics.jsonl."""
        settings = self.settings
        begun, waited = time.perf_counter(), 0.0
        lr = schedule.learning_rate(self.step, self.steps, settings.optimizer)
        wd = schedule.weight_decay(self.step, self.steps, settings.optimizer)
        momentum = schedule.ema_momentum(self.step, self.steps, settings.ema)
        for number, group in enumerate(self.engine.optimizer.param_groups):
            group["lr"], group["weight_decay"] = lr, wd if number == 0 else 0.0
        logs: list[dict[str, Tensor]] = []
        tokens: list[Tensor] = []
        damaged: dict[str, str] = {}
        keys: list[str] = []
        epoch = 0
        for _ in range(settings.run.accumulate):
            asked = time.perf_counter()
            batch = next(batches).to(self.device)
            waited += time.perf_counter() - asked
            losses, centred_KC = self.learner.losses(batch, self.step, self.engine)
            context_MC = losses.context_MC
            self.engine.backward(losses.total)
            self.engine.step()
            damaged |= batch.damaged
            keys += [] if batch.empty else batch.keys
            logs.append(losses.logs)
            assert batch.context is not None
            counted = torch.stack([batch.context.tokens_B.sum(), batch.whole.tokens_B.sum()])
            tokens.append(counted * (not batch.empty))
            epoch = max(batch.epochs)
        self.step += 1
        self.consumed += self.global_batch
        if skipped := self._adam.skipped or bool(getattr(self.engine.optimizer, "overflow", False)):
            self.learner.discard()
        else:
            self.learner.commit(momentum, self._full)
        self._note(damaged, skipped, keys)
        return self._line(logs, tokens, centred_KC, context_MC, epoch, lr, wd, momentum, begun, waited)

    def _note(self, damaged: dict[str, str], skipped: bool, keys: list[str]) -> None:
        """Write down what was left out of this step; TrainingStopped where it is too much."""
        count = torch.tensor(len(damaged), device=self.device)
        if self.world > 1:
            dist.all_reduce(count)
        new = self.skipped.damaged(self.step, damaged) if count else []
        self.skipped.step(self.step, skipped, keys)
        if self.rank == 0:
            for key in new:
                print(
                    f"warning at step {self.step}: {key} is damaged and left out, see {self.skipped.path}", flush=True
                )
            if skipped:
                print(f"warning at step {self.step}: {NOT_FINITE}; the step changes nothing", flush=True)

    def _is_logged(self) -> bool:
        return self.step % self.settings.run.log_every == 0 or self.step in (1, self.steps)

    def _line(
        self,
        logs: list[dict[str, Tensor]],
        tokens: list[Tensor],
        centred_KC: Tensor | None,
        context_MC: Tensor,
        epoch: int,
        lr: float,
        wd: float,
        momentum: float,
        begun: float,
        waited: float,
    ) -> dict[str, Any]:
        """Means over micro-batches and processes, as one line of metrics.jsonl."""
        names = (
            "loss",
            "loss_jepa",
            "loss_sig",
            "loss_mae",
            "trivial",
            "loss_cross_time",
            "loss_cross_location",
            "loss_double_cross",
            "gain_cross_time",
            "gain_cross_location",
            "gain_double_cross",
            "sample_cosine",
        )
        zero = torch.zeros((), device=self.device)
        values = torch.stack([torch.stack([log.get(name, zero) for log in logs]).sum() for name in names])
        counts = torch.tensor([sum(name in log for log in logs) for name in names], device=self.device)
        count = torch.stack(tokens).sum(dim=0).to(self.device, torch.float32)
        reduced = torch.cat([values.float(), counts.float(), count])
        if self.world > 1:
            dist.all_reduce(reduced)
        mean = {
            name: float(reduced[i] / reduced[i + len(names)]) if reduced[i + len(names)] else None
            for i, name in enumerate(names)
        }
        trivial = mean.pop("trivial")
        gain = 1 - mean["loss_jepa"] / trivial if trivial and mean["loss_jepa"] is not None else None
        spread = {}
        if self.rank == 0 and self._is_logged():
            for name, x_MC in (("target", centred_KC), ("context", context_MC)):
                spread[f"{name}_std"] = None if x_MC is None else float(x_MC.std(dim=0).mean())
                spread[f"{name}_rank"] = None if x_MC is None else effective_rank(x_MC[:_RANK_ROWS])
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - begun
        norm = self.engine.get_global_grad_norm()
        return {
            "step": self.step,
            "epoch": epoch,
            "samples": self.consumed,
            **mean,
            "gain": gain,
            "lr": lr,
            "wd": wd,
            "ema": momentum,
            "grad_norm": None if norm is None else float(norm),
            **spread,
            "seconds": seconds,
            "data_wait": waited / seconds,
            "samples_per_s": self.global_batch / seconds,
            "damaged": len(self.skipped.keys),
            "skipped_in_a_row": self.skipped.row,
            "tokens_kept": float(reduced[-2]) / self.global_batch,
            "tokens_brain": float(reduced[-1]) / self.global_batch,
            "tokens_grid": math.prod(self.geometry.tokens),
            "peak_memory_bytes": peak_memory_bytes(self.device),
        }

    def _save(self) -> None:
        checkpoint.save(
            self.engine,
            self.checkpoints,
            self.step,
            {"step": self.step, "consumed": self.consumed, "skipped": self.skipped.state()},
            self.learner.state(self._full),
            {"identity": self.identity, "zero_stage": self.settings.zero.stage, "global_batch": self.global_batch},
            self.settings.run.keep,
        )

    def _resume(self) -> str | None:
        """Go on from the newest complete checkpoint, if there is one; returns its name."""
        if self.settings.run.resume == "never":
            return None
        found = checkpoint.find(self.checkpoints)
        if found is None:
            return None
        checkpoint.check(found, self.identity, self.settings.zero.stage, self.global_batch)
        state, weights = elastic.load(self.engine, found)
        self.step, self.consumed = state["step"], state["consumed"]
        self.skipped.load(state["skipped"])
        self.learner.load(weights)
        return found.name


def _whole_parameter(parameter: Tensor) -> Tensor:
    """The whole fp32 value of a parameter that ZeRO stage 3 has spread over the processes."""
    from deepspeed.utils import safe_get_full_fp32_param

    whole = safe_get_full_fp32_param(parameter)
    assert whole is not None
    return whole


def _loading_context() -> BaseContext:
    """How loading processes are started: forked from a small server of one thread.

    Forked from this process itself, which runs threads of gloo and others, a child can inherit a lock that nobody will
    ever release, and wait for it for ever.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["slim.batch"])
    return context
