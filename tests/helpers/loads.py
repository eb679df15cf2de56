"""What loading processes of the tests load. They import this file, which imports little."""

from __future__ import annotations

import os
import signal
import time

import torch

from shards.core.errors import DatasetError, Stopped


class Numbers:
    """A stream whose sample at a position is the position."""

    def at(self, position: int) -> int:
        return position


def as_tensor(items: list[int]) -> torch.Tensor:
    return torch.tensor(items)


def refuses(items: list[int]) -> torch.Tensor:
    raise DatasetError("data", "field", "this", "that", "Do it") if items[0] else Stopped("the dataset is away")


def dies(items: list[int]) -> torch.Tensor:
    os.kill(os.getpid(), signal.SIGBUS)
    raise AssertionError


def last_is_late(items: list[int]) -> torch.Tensor:
    time.sleep(3.0 * (items[0] == 6))
    return torch.tensor(items)


def waits(items: list[int]) -> torch.Tensor:
    time.sleep(600)
    raise AssertionError


class Odd(Exception):
    """Cannot be sent to another process: it is made from two arguments, and keeps one."""

    def __init__(self, one: str, two: str):
        super().__init__(one)


def fails(items: list[int]) -> torch.Tensor:
    """Fails as torch does when no batch arrives, or in its own way."""
    raise RuntimeError("DataLoader timed out after 1 seconds") if items[0] else Odd("odd", "two")
