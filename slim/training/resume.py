"""Find the checkpoint that a run resumes from: rank 0 searches, and sends the result to all processes."""

from __future__ import annotations

import logging
from pathlib import Path

import torch.distributed as dist

from shards.core.errors import UserError
from slim.checkpoints import exchange
from slim.checkpoints.mirror import recover
from slim.checkpoints.run_folder import CHECKPOINTS

logger = logging.getLogger(__name__)


def find_checkpoint(run: Path, mirror: Path | None) -> Path | None:
    """The newest intact checkpoint of a run or of its mirror; None if there is no checkpoint.

    All processes must call it, and all get the same result.

    Raises
    ------
    UserError
        In every process, if there are checkpoints but none is intact; see `slim.checkpoints.mirror.recover`.
    """
    found: str | None = None
    fault: UserError | None = None
    if dist.get_rank() == 0:
        try:
            folder, lines = recover(run, mirror)
            found = None if folder is None else folder.name
            for line in lines:
                logger.warning("%s", line)
        except UserError as error:
            fault = error
    told = None if fault is None else [fault.where, fault.field, str(fault.got), str(fault.expected), fault.hint]
    name, told = exchange.broadcast([found, told])
    if told is not None:
        raise fault or UserError(*told)
    return None if name is None else run / CHECKPOINTS / name
