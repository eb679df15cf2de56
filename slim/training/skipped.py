"""Damaged samples and steps with a non-finite loss or gradient: they are skipped, counted and recorded.

    RUN/skipped.jsonl    one line for each: step, sample key, reason

All processes decide alike. A damaged sample is left out of its micro-batch; if all samples of a process's micro-batch
are damaged, the process adds nothing to the gradient. A skipped step changes no weight, moment or running mean, but
counts as a step: the stream of samples and the schedules advance.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch.distributed as dist

from shards.core.errors import UserError
from shards.core.files import dump_lines, read_log, write_atomically
from slim.checkpoints import exchange
from slim.checkpoints.checkpoint import SkippedState
from slim.checkpoints.run_folder import SKIPPED

NOT_FINITE = "loss or gradient is not finite"


class TrainingStopped(UserError):
    """A run that skipped more samples or steps than allowed."""


class Skipped:
    """Counts and records skipped samples and steps, and stops the run when there are too many.

    Parameters
    ----------
    folder : Path
        Folder of the run.
    sessions : int
        Number of training sessions.
    damaged : float
        Share of sessions that may be damaged; one damaged session is always allowed.
    in_a_row : int
        Number of consecutive steps that may be skipped.
    """

    def __init__(self, folder: Path, sessions: int, damaged: float, in_a_row: int):
        self.path = folder / SKIPPED
        self.most = max(1, int(damaged * sessions))
        self.sessions, self.in_a_row = sessions, in_a_row
        self.keys: set[str] = set()
        self.row = 0

    def damaged(self, step: int, here: dict[str, str]) -> list[str]:
        """Record the damaged samples of a step (key to reason) of all processes, and return the keys that are new.

        All processes must call it if any of them found a damaged sample.

        Raises
        ------
        TrainingStopped
            If more sessions are damaged than allowed.
        """
        everywhere: dict[str, str] = {}
        for found in exchange.gather(here):
            everywhere |= found
        new = sorted(everywhere.keys() - self.keys)
        self.keys |= everywhere.keys()
        self._write(step, [(key, everywhere[key]) for key in sorted(everywhere)])
        if len(self.keys) > self.most:
            raise TrainingStopped(
                self.path,
                "run.damaged",
                f"{len(self.keys)} damaged sessions of {self.sessions}",
                f"at most {self.most}",
                f"The last one: {everywhere[sorted(everywhere)[-1]]}. Copy or convert the dataset again",
            )
        return new

    def step(self, step: int, skipped: bool, keys: list[str]) -> None:
        """Record whether a step was skipped, with the keys of this process's samples.

        Raises
        ------
        TrainingStopped
            If too many consecutive steps were skipped.
        """
        self.row = self.row + 1 if skipped else 0
        if not skipped:
            return
        self._write(step, [(key, NOT_FINITE) for found in exchange.gather(keys) for key in found])
        if self.row > self.in_a_row:
            raise TrainingStopped(
                self.path,
                "loss or gradient",
                f"a value that is not finite in {self.row} consecutive steps, the last of them step {step}",
                f"at most {self.in_a_row} such steps (run.not_finite)",
                "Lower optimizer.lr, or check the samples listed in this file. The last checkpoint is from before "
                "these steps",
            )

    def _write(self, step: int, lines: list[tuple[str, str]]) -> None:
        if dist.get_rank() == 0:
            with open(self.path, "a", encoding="utf-8") as file:
                for key, reason in lines:
                    file.write(json.dumps({"step": step, "key": key, "reason": reason}) + "\n")

    def state(self) -> SkippedState:
        return {"keys": sorted(self.keys), "row": self.row}

    def load(self, state: SkippedState, step: int) -> None:
        """Restore the state after `step`. Lines of later steps are removed, because these steps are trained again."""
        self.keys, self.row = set(state["keys"]), state["row"]
        if dist.get_rank() == 0 and self.path.exists():
            lines, _ = read_log(self.path)
            kept = [line for line in lines if isinstance(line.get("step"), int) and line["step"] <= step]
            write_atomically(self.path, dump_lines(kept))
