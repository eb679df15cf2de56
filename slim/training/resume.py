"""The checkpoint that a run resumes from: rank 0 looks for it, and all processes agree."""

from __future__ import annotations

from pathlib import Path

import torch.distributed as dist

from shards.core.errors import UserError
from slim.checkpoints import exchange
from slim.checkpoints.mirror import recover
from slim.checkpoints.run_folder import CHECKPOINTS


def find_checkpoint(run: Path, mirror: Path | None) -> Path | None:
    """The newest intact checkpoint of a run or of its mirror, the same in all processes; None where there is none.

    Raises
    ------
    UserError
        In every process, if no checkpoint that is there is intact; see `slim.checkpoints.mirror.recover`.
    """
    found: str | None = None
    fault: UserError | None = None
    if dist.get_rank() == 0:
        try:
            folder, lines = recover(run, mirror)
            found = None if folder is None else folder.name
            for line in lines:
                print(f"warning: {line}", flush=True)
        except UserError as error:
            fault = error
    told = None if fault is None else [fault.where, fault.field, str(fault.got), str(fault.expected), fault.hint]
    name, told = exchange.broadcast([found, told])
    if told is not None:
        raise fault or UserError(*told)
    return None if name is None else run / CHECKPOINTS / name
