"""The loop over a DeepSpeed engine, whatever is learned. Run by `launchers/job.py` in every process.

One optimizer step, in this order: schedules set, then per micro-batch losses and backward (DeepSpeed reduces, clips and
steps at the last one), then the learner ends it (pretraining: the EMA target and the running means move; fine-tuning:
now and then it is validated), then the step is logged, then it may be saved. Everything random depends on (seed, epoch,
key) or (seed, step), so a run that is stopped and resumed gives the numbers of one that was not.
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor

from shards.core.cli import STOPPING, progress
from shards.core.errors import UserError
from shards.format.stream import MicroBatches
from slim.checkpoints import checkpoint
from slim.checkpoints.mirror import Mirror, recover
from slim.checkpoints.run_folder import CHECKPOINTS
from slim.data import loader
from slim.model.inputs import Batch
from slim.training import compatibility, mfu, reshard, schedule
from slim.training.engine import _whole_parameter, deepspeed_config
from slim.training.metrics import Monitor, averages, peak_memory_bytes, spread_of
from slim.training.optim import GuardedAdamW
from slim.training.skipped import NOT_FINITE, Skipped
from slim.training.stall import COMPUTE, DATA, SAVE, Watch
from slim.training.task import TrainingTask


class Trainer:
    """One process of a run.

    Parameters
    ----------
    task : TrainingTask
        What is learned, and from what.
    device : torch.device
        This process's own.
    flops_per_token : callable, optional
        Counts the FLOPs of a step per token of brain, for the model FLOPs utilisation; called on a GPU alone.

    Raises
    ------
    UserError
        If the checkpoint to go on from does not fit the configuration.
    """

    def __init__(self, task: TrainingTask, device: torch.device, flops_per_token: Callable[[], float] | None = None):
        settings = task.settings
        self.task, self.settings, self.device = task, settings, device
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.folder = Path(settings.run.out)
        self.checkpoints = self.folder / CHECKPOINTS

        self.stream = task.stream
        self.global_batch = settings.run.batch * settings.run.accumulate * self.world
        self.plan = schedule.Plan(settings.run.steps_in_all(self.stream.per_epoch, self.world))
        self.origin = task.origin(self.world)

        self.learner = task.learner(device)
        self._groups = self.learner.groups()
        self._full = _whole_parameter if settings.zero.stage == 3 else None
        chosen = settings.optimizer
        groups = [{"params": group.parameters} for group in self._groups]
        self._adam = GuardedAdamW(groups, lr=chosen.lr, betas=chosen.betas)
        self.engine, *_ = deepspeed.initialize(
            model=self.learner.model, optimizer=self._adam, config=deepspeed_config(settings)
        )
        sessions = sum(len(part) for part in self.stream.sessions)
        self.skipped = Skipped(self.folder, sessions, settings.run.damaged, settings.run.not_finite)
        self.step, self.consumed = 0, 0
        self._stop: str | None = None
        self._watch = Watch(self._warn)
        self._flops_per_token = flops_per_token
        self._seconds_per_token = self._at_peak() if self.rank == 0 and device.type == "cuda" else None
        self._mirror: Mirror | None = None
        self._mirror_trouble: str | None = None
        if self.rank == 0 and settings.run.mirror is not None:
            run = settings.run
            self._mirror = Mirror(self.folder, Path(settings.run.mirror), run.keep, run.keep_every)

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
            self.learner.begin(self._first_steps, self.engine)
        stopped, line, said, warnings = None, {}, set[str](), list[str]()
        with ExitStack() as stack:
            monitor = self._monitor() if self.rank == 0 else None
            if monitor is not None:
                stack.callback(monitor.close)
                stack.enter_context(self._watch)
                advance = stack.enter_context(progress(self.task.name, self.steps - self.step, "steps"))
            micro_batches = (self.steps - self.step) * self.settings.run.accumulate
            batches = self._loader(self.consumed, micro_batches) if self.step < self.steps else iter(())
            while self.step < self.steps and stopped is None:
                line = self._one_step(batches)
                if monitor is not None:
                    if self._is_logged():
                        monitor.log(line)
                    advance(1, _in_words(line))
                    found = monitor.warnings()
                    for one in found:
                        if one.kind not in said:
                            self._warn(one.text)
                    said = {one.kind for one in found}
                stopped = self._agree_to_stop(begun)
                if self.step == self.steps or stopped or self.step % self.settings.run.checkpoint_every == 0:
                    self._save()
                self._watch.step()
            if monitor is not None:
                warnings = [one.text for one in monitor.warnings()]
        if self._mirror is not None:
            self._mirror.close()
            self._tell_of_mirror()
            warnings += [self._mirror.trouble] if self._mirror.trouble else []
        return {
            "finished": self.step >= self.steps,
            "step": self.step,
            "steps": self.steps,
            "stopped": stopped,
            "resumed_from": resumed,
            "loss": line.get("loss"),
            "seconds": round(time.monotonic() - begun, 2),
            "warnings": warnings,
        }

    @property
    def steps(self) -> int:
        """Optimizer steps of the run in all."""
        return self.plan.end

    def _at_peak(self) -> float | None:
        """Seconds a token of brain would take at the GPU's peak; None where its speed or the work is not known."""
        peak = mfu.peak_flops(torch.cuda.get_device_name(self.device), self.settings.precision)
        return None if peak is None or self._flops_per_token is None else self._flops_per_token() / peak

    def _monitor(self) -> Monitor:
        config = self.settings.model_dump(mode="json")
        return Monitor(self.folder, self.step, self.settings.run.wandb, config)

    def _warn(self, text: str) -> None:
        print(f"warning at step {self.step}: {text}", flush=True)

    def _catch_signals(self) -> None:
        def remember(number: int, _frame: Any) -> None:
            self._stop = signal.Signals(number).name
            loader.limit_wait(self._stop)

        for number in STOPPING:
            signal.signal(number, remember)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)  # one may have come meanwhile

    def _agree_to_stop(self, begun: float) -> str | None:
        """Why to stop now, the same answer in every process: one flag, reduced at each step boundary."""
        limit = self.settings.run.max_seconds
        late = limit is not None and time.monotonic() - begun >= limit
        flag = torch.tensor([2 if self._stop else 1 if late else 0], device=self.device)
        if self.world > 1:
            dist.all_reduce(flag, dist.ReduceOp.MAX)
        return (None, "time limit", "signal")[int(flag)]

    def _loader(self, consumed: int, count: int) -> loader.Loader:
        """This process's next `count` micro-batches after so many samples of the stream."""
        run = self.settings.run
        stream = MicroBatches(self.stream, self.task.load(), run.batch, self.rank, self.world, count, consumed)
        return loader.Loader(stream, run.workers, lambda: self._stop, self._warn if self.rank == 0 else lambda _: None)

    def _first_steps(self, steps: int) -> Iterator[Batch]:
        """This process's micro-batches of so many steps, from the first."""
        for batch in self._loader(0, steps * self.settings.run.accumulate):
            yield batch.to(self.device)

    def _one_step(self, batches: Iterator[Any]) -> dict[str, Any]:
        """One optimizer step; returns its line of metrics.jsonl."""
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
            self._watch.now(DATA)
            batch = next(batches).to(self.device)
            self._watch.now(COMPUTE)
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
            more = self.learner.commit(self.step - 1, self.plan, self.engine, self._full)
        self._note(damaged, skipped, keys)
        more = {"lr": lr, "wd": wd, **more}
        return self._line(logs, tokens, losses.features, epoch, more, begun, waited)

    def _note(self, damaged: dict[str, str], skipped: bool, keys: list[str]) -> None:
        """Write down what was left out of this step; TrainingStopped where it is too much."""
        count = torch.tensor(len(damaged), device=self.device)
        if self.world > 1:
            dist.all_reduce(count)
        new = self.skipped.damaged(self.step, damaged) if count else []
        self.skipped.step(self.step, skipped, keys)
        if self.rank == 0:
            for key in new:
                self._warn(f"{key} is damaged and left out, see {self.skipped.path}")
            if skipped:
                self._warn(f"{NOT_FINITE}; the step changes nothing")

    def _is_logged(self) -> bool:
        return self.step % self.settings.run.log_every == 0 or self.step in (1, self.steps)

    def _line(
        self,
        logs: list[dict[str, Tensor]],
        tokens: list[Tensor],
        features: dict[str, Tensor | None],
        epoch: int,
        more: dict[str, Any],
        begun: float,
        waited: float,
    ) -> dict[str, Any]:
        """Means over micro-batches and processes, as one line of metrics.jsonl."""
        mean, (kept, brain) = averages(logs, tokens, self.device, self.learner.logged)
        spread: dict[str, float | None] = {}
        if self.rank == 0 and self._is_logged():
            for name, x_NC in features.items():
                spread |= spread_of(name, x_NC)
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - begun
        norm = self.engine.get_global_grad_norm()
        line = {
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
        if self._seconds_per_token is not None:
            line["mfu"] = self._seconds_per_token * brain / self.world / seconds
        return line

    def _save(self) -> None:
        self._watch.now(SAVE)
        state = {"step": self.step, "consumed": self.consumed, "skipped": self.skipped.state()}
        weights = self.learner.state(self._full)
        about = self.origin.facts() | {"plan": self.plan.facts()}
        saved = checkpoint.save(self.engine, self.checkpoints, self.step, state, weights, about)
        if self.rank == 0:
            needed: set[Path] = set()
            if self._mirror is not None:
                self._tell_of_mirror()
                self._mirror.offer(saved)
                needed = self._mirror.needed
            checkpoint.prune(self.checkpoints, self.settings.run.keep, self.settings.run.keep_every, needed)

    def _tell_of_mirror(self) -> None:
        """Warn of a copy that failed, once for each reason."""
        assert self._mirror is not None
        trouble = self._mirror.trouble
        if trouble is not None and trouble != self._mirror_trouble:
            self._warn(trouble)
        self._mirror_trouble = trouble

    def _resume(self) -> str | None:
        """Go on from the newest intact checkpoint, if there is one; returns its name."""
        if self.settings.run.resume == "never":
            return None
        found = self._find()
        if found is None:
            return None
        compatibility.changes(
            found, self.settings
        )  # again: the one to go on from may be an older one than was looked at
        self.origin.check(found)
        self.plan = compatibility.extended(found, self.settings, self.stream.per_epoch, self.world)
        state, weights = reshard.load(self.engine, found)
        self.step, self.consumed = state["step"], state["consumed"]
        self.skipped.load(state["skipped"], self.step)
        self.learner.load(weights)
        return found.name

    def _find(self) -> Path | None:
        """The checkpoint to go on from: rank 0 looks and tells all, a mistake of the user's, too."""
        answer: list[Path | UserError | None] = [None]
        if self.rank == 0:
            mirror = self.settings.run.mirror
            try:
                answer[0], lines = recover(self.folder, None if mirror is None else Path(mirror))
                for line in lines:
                    print(f"warning: {line}", flush=True)
            except UserError as error:
                answer[0] = error
        dist.broadcast_object_list(answer, src=0)
        if isinstance(answer[0], UserError):
            raise answer[0]
        return answer[0]


def _in_words(line: dict[str, Any]) -> str:
    """A line of metrics.jsonl beside the progress bar."""
    loss = "none" if line["loss"] is None else f"{line['loss']:.4f}"
    return (
        f"loss {loss}, {line['samples_per_s']:.2f} samples/s, data wait {line['data_wait']:.0%}, "
        f"{line['peak_memory_bytes'] / 2**30:.2f} GiB"
    )
