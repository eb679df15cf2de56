"""Exchange objects between processes as JSON, which is safe to read.

`torch.distributed` sends objects as pickles, which can run code when they are read.
"""

from __future__ import annotations

import json
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def _device() -> torch.device:
    """The device on which the backend needs tensors."""
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")


def _packed(value: Any) -> Tensor:
    return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8).to(_device())


def _unpacked(data: Tensor) -> Any:
    return json.loads(bytes(data.cpu().tolist()))


def gather(mine: Any) -> list[Any]:
    """Collect one JSON-serialisable object of each process, by rank, in all processes."""
    world = dist.get_world_size()
    data = _packed(mine)
    sizes = [torch.zeros(1, dtype=torch.int64, device=data.device) for _ in range(world)]
    dist.all_gather(sizes, torch.tensor([len(data)], device=data.device))
    longest = max(int(size) for size in sizes)
    padded = torch.zeros(longest, dtype=torch.uint8, device=data.device)
    padded[: len(data)] = data
    found = [torch.zeros_like(padded) for _ in range(world)]
    dist.all_gather(found, padded)
    return [_unpacked(data[: int(size)]) for data, size in zip(found, sizes, strict=True)]


def broadcast(value: Any) -> Any:
    """Return rank 0's `value` in all processes; the `value` of other ranks is ignored."""
    data = _packed(value)
    size = torch.tensor([len(data)], device=data.device)
    dist.broadcast(size, src=0)
    if dist.get_rank():
        data = torch.zeros(int(size), dtype=torch.uint8, device=data.device)
    dist.broadcast(data, src=0)
    return _unpacked(data)
