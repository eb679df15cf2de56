"""Few tensors in place of thousands, for the way from a loading process to a device."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, is_dataclass
from typing import Any

import torch
from torch import Tensor


class Packed:
    """A tree of dataclasses and lists whose integer tensors lie in one buffer.

    A plan has thousands of small tensors. Sent one by one from a loading process they take a file descriptor each, and
    a copy each to the device; packed they take one.
    """

    def __init__(self, tree: Any):
        parts: list[Tensor] = []
        self._at = 0
        self._tree = self._take(tree, parts)
        self._buffer = torch.cat(parts) if parts else torch.zeros(0, dtype=torch.int32)

    def _take(self, item: Any, parts: list[Tensor]) -> Any:
        if isinstance(item, Tensor):
            assert item.dtype == torch.int32
            parts.append(item.reshape(-1))
            self._at += item.numel()
            return _Slot(self._at - item.numel(), tuple(item.shape))
        return _rebuild(item, lambda part: self._take(part, parts))

    def to(self, device: torch.device | str) -> Any:
        """The tree again, its tensors views of one buffer on `device`."""
        buffer = self._buffer.to(device, non_blocking=True)

        def give(item: Any) -> Any:
            if isinstance(item, _Slot):
                return buffer[item.first : item.first + math.prod(item.shape)].view(item.shape)
            return _rebuild(item, give)

        return give(self._tree)


@dataclass
class _Slot:
    first: int
    shape: tuple[int, ...]


def _rebuild(item: Any, change: Callable[[Any], Any]) -> Any:
    """A list or dataclass with `change` applied to its parts; anything else as it is."""
    if isinstance(item, list):
        return [change(part) for part in item]
    if is_dataclass(item) and not isinstance(item, _Slot | type):
        return type(item)(**{name: change(value) for name, value in vars(item).items()})
    return item
