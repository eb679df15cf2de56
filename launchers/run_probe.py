"""Probe the checkpoints of a run while it trains (`run.probe`), each in a process of its own.

    python -m launchers.run_probe RUN/checkpoints/step-00000500

Training goes on meanwhile. Probes wait for each other, and a probe that fails is a warning, never the end of a run. A
checkpoint is not removed before its probe is done, and the best one is kept.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, TYPE_CHECKING

from shards.core.cli import DONE, STOPPING, show_log
from shards.core.errors import UserError
from shards.core.files import printable, write_atomically
from slim.checkpoints import checkpoint
from slim.checkpoints.run_folder import BEST, CHECKPOINTS, CONFIG, LATEST, PROBES
from slim.config import TrainSettings, load_run
from slim.training.callbacks import Callback, Start, Step

if TYPE_CHECKING:
    import torch

_NICE = 10  # training comes first on the cores that both use


class RunProbe(Callback):
    """Starts probes of saved checkpoints; rank 0 only.

    Parameters
    ----------
    settings : TrainSettings
        With `run.probe`.
    device : torch.device
        The device of training; probes use a GPU if training does.

    Attributes
    ----------
    failed : list of str
        What went wrong, a sentence for each probe that failed.
    """

    def __init__(self, settings: TrainSettings, device: torch.device):
        assert settings.run.probe is not None
        self.every, self.folder = settings.run.probe.every, Path(settings.run.out)
        self.keep, self.keep_every = settings.run.keep, settings.run.keep_every
        self.on_gpu = device.type == "cuda"
        self.failed: list[str] = []
        self._queue: list[Path] = []
        self._child: subprocess.Popen[bytes] | None = None
        self._errors: IO[bytes] | None = None
        self._steps, self._last = 0, 0

    def on_start(self, start: Start) -> None:
        from slim.evaluation.validation import read_scores

        self._steps, self._last, self._warn = start.steps, start.step, start.warn
        done = {score.step for score in read_scores(self.folder / PROBES)}
        found = [one for one in checkpoint.folders(self.folder / CHECKPOINTS) if checkpoint.is_complete(one)]
        self._queue = [
            one for one in reversed(found) if self._is_due(step := checkpoint.step_of(one)) and step not in done
        ]
        self._name_best()
        self._go_on()

    def on_step(self, step: Step) -> None:
        self._last = step.number
        self._go_on()

    def on_save(self, folder: Path) -> None:
        if self._is_due(checkpoint.step_of(folder)):
            self._queue.append(folder)
        self._go_on()

    def needed(self) -> set[Path]:
        best = self.folder / CHECKPOINTS / BEST
        kept = {best.parent / best.read_text(encoding="utf-8").strip()} if best.is_file() else set()
        return {*self._queue, *kept}

    def on_end(self) -> None:
        if self._last < self._steps:  # stopped: the rest is probed when the run is resumed
            self._end()

    def complete(self) -> None:
        """Wait for the probes that are left, if the run has made its last step; a signal ends the waiting."""
        if self._last < self._steps:
            return
        for number in STOPPING:
            signal.signal(number, lambda *_: self._end())
        self._go_on()
        while self._child is not None:
            time.sleep(0.2)
            self._go_on()
        if (checkpoints := self.folder / CHECKPOINTS).joinpath(LATEST).is_file():
            checkpoint.prune(checkpoints, self.keep, self.keep_every, self.needed())

    def _is_due(self, step: int) -> bool:
        return step % self.every == 0 or step == self._steps

    def _go_on(self) -> None:
        """Take the result of a probe that has ended, and start the next one."""
        if self._child is not None:
            if (status := self._child.poll()) is None:
                return
            folder = self._queue.pop(0)
            if status != DONE:
                self._tell(folder, status)
            self._child = None
            self._name_best()
        if self._queue:
            self._start(self._queue[0])

    def _start(self, folder: Path) -> None:
        environment = dict(os.environ)
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "OUTCOME"):
            environment.pop(name, None)
        if not self.on_gpu:
            environment["CUDA_VISIBLE_DEVICES"] = ""
        self._errors = TemporaryFile()  # noqa: SIM115, read when the process has ended
        self._child = subprocess.Popen(
            [sys.executable, "-m", "launchers.run_probe", str(folder)],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=self._errors,
        )

    def _tell(self, folder: Path, status: int) -> None:
        assert self._errors is not None
        self._errors.seek(0)
        said = self._errors.read().decode(errors="replace").strip().splitlines()
        why = printable(said[-1]) if said else f"exit status {status}"
        text = f"the probe of {folder.name} failed: {why}"
        self.failed.append(text)
        self._warn(text)

    def _end(self) -> None:
        self._queue.clear()
        if self._child is not None:
            self._child.terminate()
            self._child.wait()
            self._child = None

    def _name_best(self) -> None:
        """Write RUN/checkpoints/best, the name of the checkpoint with the highest score that still exists."""
        from slim.evaluation.validation import best_of, read_scores

        checkpoints = self.folder / CHECKPOINTS
        scores = [one for one in read_scores(self.folder / PROBES) if (checkpoints / checkpoint.tag(one.step)).is_dir()]
        if (best := best_of(scores)) is not None:
            write_atomically(checkpoints / BEST, f"{checkpoint.tag(best.step)}\n")


def main(folder: Path) -> int:
    """Probe a checkpoint, and add a line to RUN/probe.jsonl."""
    import torch

    from slim.evaluation.validation import Validation, read_scores
    from slim.inference.slim_brain import SlimBrain

    try:
        settings = load_run(folder.parents[1] / CONFIG)  # a checkpoint may be from before `run.probe` was set
        assert settings.run.probe is not None
        opened = Validation.open(settings.run.probe.task, settings.data[0].path, settings.run.probe.subjects)
        model = SlimBrain.from_pretrained(folder, device="cuda" if torch.cuda.is_available() else "cpu")
        score = opened.score(model)
    except UserError as error:
        print(f"error: {error.line()}", file=sys.stderr)
        return 2
    path = folder.parents[1] / PROBES
    write_atomically(path, "".join(f"{one.model_dump_json()}\n" for one in [*read_scores(path), score]))
    return DONE


if __name__ == "__main__":
    os.nice(_NICE)
    show_log()
    sys.exit(main(Path(sys.argv[1])))
