"""What is left out so that a run goes on: damaged samples, and steps whose loss or gradient is no finite number.

    RUN/skipped.jsonl    a line each: step, sample key, reason

All processes decide alike. A damaged sample is left out of its micro-batch; a process that has no other in a
micro-batch adds nothing to the gradient there. A step that is skipped changes no weight, moment or running mean, and
counts as a step all the same: the stream of samples and the schedules go on.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch.distributed as dist

from shards.core.errors import UserError
from shards.core.files import dump_lines, read_log, write_atomically
from slim.checkpoints import exchange
from slim.checkpoints.run_folder import SKIPPED

NOT_FINITE = "loss or gradient is no finite number"


class TrainingStopped(UserError):
    """A run that left out more than it may."""


class Skipped:
    """Counts and writes down what was left out, and stops the run when it is too much.

    Parameters
    ----------
    folder : Path
        The run.
    sessions : int
        Training sessions of the stream.
    damaged : float
        Share of them that may be damaged; one always may.
    in_a_row : int
        Steps in a row that may be skipped.
    """

    def __init__(self, folder: Path, sessions: int, damaged: float, in_a_row: int):
        self.path = folder / SKIPPED
        self.most = max(1, int(damaged * sessions))
        self.sessions, self.in_a_row = sessions, in_a_row
        self.keys: set[str] = set()
        self.row = 0

    def damaged(self, step: int, here: dict[str, str]) -> list[str]:
        """Take in the damaged samples of a step (key to reason) of all processes; keys that are new.

        Every process calls it when any has one.

        Raises
        ------
        TrainingStopped
            If more sessions are damaged than may be.
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
                f"The last: {everywhere[sorted(everywhere)[-1]]}. Copy or convert the dataset again",
            )
        return new

    def step(self, step: int, skipped: bool, keys: list[str]) -> None:
        """Take in whether a step was skipped, and the keys of this process's samples in it.

        Raises
        ------
        TrainingStopped
            If too many were skipped in a row.
        """
        self.row = self.row + 1 if skipped else 0
        if not skipped:
            return
        self._write(step, [(key, NOT_FINITE) for found in exchange.gather(keys) for key in found])
        if self.row > self.in_a_row:
            raise TrainingStopped(
                self.path,
                "loss or gradient",
                f"no finite number in {self.row} steps in a row, to step {step}",
                f"at most {self.in_a_row} (run.not_finite)",
                "Lower optimizer.lr or look at the samples that the file names; the last checkpoint is from before",
            )

    def _write(self, step: int, lines: list[tuple[str, str]]) -> None:
        if dist.get_rank() == 0:
            with open(self.path, "a", encoding="utf-8") as file:
                for key, reason in lines:
                    file.write(json.dumps({"step": step, "key": key, "reason": reason}) + "\n")

    def state(self) -> dict[str, Any]:
        return {"keys": sorted(self.keys), "row": self.row}

    def load(self, state: dict[str, Any], step: int) -> None:
        """Go on after `step`; what was written of later steps, which will be done again, is dropped."""
        self.keys, self.row = set(state["keys"]), state["row"]
        if dist.get_rank() == 0 and self.path.exists():
            lines, _ = read_log(self.path)
            kept = [line for line in lines if isinstance(line.get("step"), int) and line["step"] <= step]
            write_atomically(self.path, dump_lines(kept))
