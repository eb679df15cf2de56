"""Read the ZeRO files in a checkpoint without running code from them.

DeepSpeed reads its files with `weights_only=False`, so its reader is replaced during loading.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from slim.checkpoints import torch_file


def _allowed() -> list[Any]:
    """Classes in files written by DeepSpeed. None of them runs code when an instance is built."""
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    return [LossScaler, ZeroStageEnum, fragment_address]


def read(path: str | Path, map_location: Any = "cpu", mmap: bool = False) -> dict[str, Any]:
    """Read a file written by DeepSpeed, as `slim.checkpoints.torch_file.read`."""
    return torch_file.read(path, map_location, mmap, _allowed)


@contextmanager
def read_by(engine: Any) -> Iterator[None]:
    """Context in which a DeepSpeed engine reads files with `read`."""
    from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine

    class Reader(TorchCheckpointEngine):
        def load(self, path: str, map_location: Any = None) -> Any:
            return read(path, map_location)

    before = engine.checkpoint_engine
    engine.checkpoint_engine = Reader()
    try:
        yield
    finally:
        engine.checkpoint_engine = before
