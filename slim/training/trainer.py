"""The training loop over a DeepSpeed engine, for pretraining and fine-tuning. `launchers/job.py` runs it.

An optimizer step does the following, in this order:

1. set the learning rate and weight decay;
2. for each micro-batch compute the losses and gradients; at the last one DeepSpeed reduces, clips and steps;
3. let the learner finish the step: pretraining updates the EMA target and the running means, fine-tuning validates at
   some steps;
4. log the step, and save a checkpoint if it is due.

All random numbers depend on (seed, epoch, key) or (seed, step) only, so a run that was stopped and resumed gives the
same numbers as a run that was not.
"""

from __future__ import annotations

import logging
import math
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from shards.core.cli import STOPPING
from shards.format.stream import MicroBatches
from slim.checkpoints import checkpoint
from slim.checkpoints.checkpoint import TrainingState
from slim.checkpoints.run_folder import CHECKPOINTS
from slim.data import loader
from slim.model.inputs import Batch
from slim.training import compatibility, reshard, schedule
from slim.training.callbacks import Callback, Start, Step
from slim.training.engine import make_engine, whole_parameter
from slim.training.metrics import MetricsLine, averages, peak_memory_bytes, spread_of
from slim.training.optim import GuardedAdamW
from slim.training.result import TrainingResult
from slim.training.resume import find_checkpoint
from slim.training.skipped import NOT_FINITE, Skipped
from slim.training.stall import COMPUTE, DATA, SAVE
from slim.training.task import TrainingTask

logger = logging.getLogger(__name__)


class Trainer:
    """Trains a task, in one process of a run.

    Parameters
    ----------
    task : TrainingTask
        The data and the learner.
    device : torch.device
        The device of this process.
    callbacks : sequence of Callback
        Called in this order; see `slim.training.callbacks`.

    Raises
    ------
    UserError
        By `run`, if the checkpoint to resume from does not fit the configuration.
    """

    def __init__(self, task: TrainingTask, device: torch.device, callbacks: Sequence[Callback] = ()):
        settings = task.settings
        self.task, self.settings, self.device = task, settings, device
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.folder = Path(settings.run.out)
        self.checkpoints = self.folder / CHECKPOINTS

        self.stream = task.stream
        self.global_batch = settings.run.batch * settings.run.accumulate * self.world
        self.plan = schedule.StepPlan(settings.run.steps_in_all(self.stream.per_epoch, self.world))
        self.origin = task.origin(self.world)

        self.learner = task.learner(device)
        self._groups = self.learner.groups()
        self.full = whole_parameter if settings.zero_stage == 3 else None
        chosen = settings.optimizer
        groups = [{"params": group.parameters} for group in self._groups]
        clip = None if settings.zero_stage else chosen.clip  # DeepSpeed clips at the other stages
        self._adam = GuardedAdamW(groups, lr=chosen.lr, betas=chosen.betas, clip=clip)
        self.engine = make_engine(self.learner.model, self._adam, settings)
        sessions = sum(len(part) for part in self.stream.sessions)
        self.skipped = Skipped(self.folder, sessions, settings.run.damaged, settings.run.not_finite)
        self.step, self.consumed = 0, 0
        self.callbacks = tuple(callbacks)
        self._stop: str | None = None

    def run(self) -> TrainingResult:
        """Train to the end, or until a signal or the time limit stops the run after a step."""
        begun = time.monotonic()
        self._catch_signals()
        resumed = self._resume()
        if not resumed:
            if (states := self.task.moments()) is not None:
                reshard.place(self.engine, states)
            self.learner.begin(self._first_steps, self.engine)
        stopped: str | None = None
        line: MetricsLine = {}
        with self._called():
            batches = self._batches()
            while self.step < self.steps and stopped is None:
                step = self._one_step(batches)
                line = step.line or line
                for callback in self.callbacks:
                    callback.on_step(step)
                stopped = self._agree_to_stop(begun)
                if self.step == self.steps or stopped or self.step % self.settings.run.checkpoint_every == 0:
                    self._save()
        return TrainingResult(
            finished=self.step >= self.steps,
            step=self.step,
            steps=self.steps,
            stopped=stopped,
            resumed_from=resumed,
            loss=line.get("loss"),
            seconds=round(time.monotonic() - begun, 2),
            warnings=[text for callback in self.callbacks for text in callback.warnings()],
        )

    @contextmanager
    def _called(self) -> Iterator[None]:
        """Call `on_start` and `on_finish` around the steps; `on_end` is called also after a failure."""
        start = Start(step=self.step, steps=self.steps, warn=self._warn)
        with ExitStack() as stack:
            for callback in self.callbacks:
                stack.callback(callback.on_end)
                callback.on_start(start)
            yield
            for callback in self.callbacks:
                callback.on_finish()

    def _phase(self, phase: str) -> None:
        for callback in self.callbacks:
            callback.on_phase(phase)

    @property
    def steps(self) -> int:
        """Total optimizer steps of the run."""
        return self.plan.end

    def _warn(self, text: str) -> None:
        logger.warning("step %d: %s", self.step, text)

    def _catch_signals(self) -> None:
        def remember(number: int, _frame: Any) -> None:
            self._stop = signal.Signals(number).name
            loader.limit_wait(self._stop)

        for number in STOPPING:
            signal.signal(number, remember)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)  # `launchers.job` blocks them until now

    def _agree_to_stop(self, begun: float) -> str | None:
        """The reason to stop after this step, or None. All processes decide alike, by one reduced flag."""
        limit = self.settings.run.max_seconds
        late = limit is not None and time.monotonic() - begun >= limit
        reason = 2 if self._stop else 1 if late else 0
        if self.world > 1:
            flag = torch.tensor([reason], device=self.device)
            dist.all_reduce(flag, dist.ReduceOp.MAX)
            reason = int(flag)
        return (None, "time limit", "signal")[reason]

    def _loader(self, consumed: int, count: int) -> loader.Loader:
        """Load this process's next `count` micro-batches, after `consumed` samples of the stream."""
        run = self.settings.run
        stream = MicroBatches(self.stream, self.task.load(), run.batch, self.rank, self.world, count, consumed)
        return loader.Loader(stream, run.workers, lambda: self._stop, self._warn if self.rank == 0 else lambda _: None)

    def _batches(self) -> Iterator[Any]:
        """This process's micro-batches from here to the end of the run."""
        left = (self.steps - self.step) * self.settings.run.accumulate
        return self._loader(self.consumed, left) if left else iter(())

    def _first_steps(self, steps: int) -> Iterator[Batch]:
        """This process's micro-batches of the first `steps` optimizer steps."""
        for batch in self._loader(0, steps * self.settings.run.accumulate):
            yield batch.to(self.device)

    def _one_step(self, batches: Iterator[Any]) -> Step:
        """Do one optimizer step."""
        settings = self.settings
        begun, waited = time.perf_counter(), 0.0
        at, of = self.plan.place(self.step)
        lr = schedule.learning_rate(at, of, settings.optimizer)
        wd = schedule.weight_decay(at, of, settings.optimizer)
        for group, about in zip(self.engine.optimizer.param_groups, self._groups, strict=True):
            group["lr"], group["weight_decay"] = lr * about.scale, wd if about.decays else 0.0
        logs: list[dict[str, Tensor]] = []
        tokens: list[Tensor] = []
        damaged: dict[str, str] = {}
        keys: list[str] = []
        epoch = 0
        for _ in range(settings.run.accumulate):
            asked = time.perf_counter()
            self._phase(DATA)
            batch = next(batches).to(self.device)
            self._phase(COMPUTE)
            waited += time.perf_counter() - asked
            losses = self.learner.losses(batch, self.step, self.engine)
            self.engine.backward(losses.total)
            self.engine.step()
            damaged |= batch.damaged
            keys += [] if batch.empty else batch.keys
            logs.append(losses.logs)
            seen = batch.whole if batch.context is None else batch.context
            counted = torch.stack([seen.tokens_B.sum(), batch.whole.tokens_B.sum()])
            tokens.append(counted * (not batch.empty))
            epoch = max(batch.epochs)
        self.step += 1
        self.consumed += self.global_batch
        if skipped := self._adam.skipped or bool(getattr(self.engine.optimizer, "overflow", False)):
            self.learner.discard()
            more = {}
        else:
            more = self.learner.commit(self.step - 1, self.plan, self.engine, self.full)
        self._note(damaged, skipped, keys)
        more = {"lr": lr, "wd": wd, **more}
        line = None
        if self.step % settings.run.log_every == 0 or self.step in (1, self.steps):
            line = self._line(logs, tokens, losses.features, epoch, more, begun, waited)
        return Step(number=self.step, keys=keys, line=line)

    def _note(self, damaged: dict[str, str], skipped: bool, keys: list[str]) -> None:
        """Record what was skipped in this step; raises TrainingStopped if it is too much."""
        count = len(damaged)
        if self.world > 1:
            summed = torch.tensor(count, device=self.device)
            dist.all_reduce(summed)
            count = int(summed)
        new = self.skipped.damaged(self.step, damaged) if count else []
        self.skipped.step(self.step, skipped, keys)
        if self.rank == 0:
            for key in new:
                self._warn(f"sample {key} is damaged and was left out, see {self.skipped.path}")
            if skipped:
                self._warn(f"{NOT_FINITE}; the step was skipped")

    def _line(
        self,
        logs: list[dict[str, Tensor]],
        tokens: list[Tensor],
        features: dict[str, Tensor | None],
        epoch: int,
        more: MetricsLine,
        begun: float,
        waited: float,
    ) -> MetricsLine:
        """The step's line of metrics.jsonl, with means over micro-batches and processes; it waits for the device."""
        mean, (kept, brain) = averages(logs, tokens, self.device, self.learner.logged)
        mean = self.learner.summarise(mean)
        spread: dict[str, float | None] = {}
        if self.rank == 0:
            for name, x_NC in features.items():
                spread |= spread_of(name, x_NC)
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - begun
        norm = self.engine.get_global_grad_norm()
        return {
            "step": self.step,
            "epoch": epoch,
            "samples": self.consumed,
            **mean,
            **more,
            "grad_norm": None if norm is None else float(norm),
            **spread,
            "seconds": seconds,
            "data_wait": waited / seconds,
            "samples_per_s": self.global_batch / seconds,
            "damaged": len(self.skipped.keys),
            "skipped_in_a_row": self.skipped.row,
            "tokens_kept": kept / self.global_batch,
            "tokens_brain": brain / self.global_batch,
            "tokens_grid": math.prod(self.task.geometry.tokens),
            "peak_memory_bytes": peak_memory_bytes(self.device),
        }

    def _save(self) -> None:
        self._phase(SAVE)
        state = TrainingState(step=self.step, consumed=self.consumed, skipped=self.skipped.state())
        weights = self.learner.state(self.full)
        about = self.origin.facts() | {"plan": self.plan.facts()}
        saved = checkpoint.save(self.engine, self.checkpoints, self.step, state, weights, about)
        for callback in self.callbacks:
            callback.on_save(saved)
        if self.rank == 0:
            needed = set().union(*(callback.needed() for callback in self.callbacks))
            checkpoint.prune(self.checkpoints, self.settings.run.keep, self.settings.run.keep_every, needed)

    def _resume(self) -> str | None:
        """Load the newest intact checkpoint, if there is one, and return its name."""
        if self.settings.run.resume == "never":
            return None
        mirror = self.settings.run.mirror
        found = find_checkpoint(self.folder, None if mirror is None else Path(mirror))
        if found is None:
            return None
        compatibility.changes(found, self.settings)  # the launcher may have checked a newer, damaged checkpoint
        self.origin.check(found)
        self.plan = compatibility.extended(found, self.settings, self.stream.per_epoch, self.world)
        state, weights = reshard.load(self.engine, found)
        self.step, self.consumed = state["step"], state["consumed"]
        self.skipped.load(state["skipped"], self.step)
        self.learner.load(weights)
        return found.name
