"""Kills at any file operation, in this process."""

from __future__ import annotations

import os
import shutil
from pathlib import Path


class Killed(BaseException):
    """What stands for kill -9 in one process: nothing after it is done."""


FILE_OPERATIONS = [(os, "fsync"), (Path, "rename"), (Path, "unlink"), (shutil, "rmtree"), (Path, "mkdir")]


def kill_at(monkeypatch, number: int | None) -> list[int]:
    """Let the process "die" before its file operation of this number; returns the count of operations."""
    count = [0]
    for owner, name in FILE_OPERATIONS:
        original = getattr(owner, name)

        def counted(*args, _original=original, **kwargs):
            count[0] += 1
            if number is not None and count[0] > number:
                raise Killed
            return _original(*args, **kwargs)

        monkeypatch.setattr(owner, name, counted)
    return count
