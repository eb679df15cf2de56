"""Predictions of a fine-tuned model for sessions, from all their windows.

Legend: N sessions; K classes; B samples of a micro-batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from shards.format.reader import Samples, ScanT
from slim.config import FinetuneSettings
from slim.data.collate import collate
from slim.data.samples import read_windows, window_groups
from slim.model.geometry import Geometry


@torch.no_grad()
def predict(
    forward: Callable[..., Any],
    classes: int,
    dataset: Samples[ScanT],
    sessions: Sequence[ScanT],
    geometry: Geometry,
    settings: FinetuneSettings,
    device: torch.device,
) -> np.ndarray:
    """Predict probabilities (N, K) or values (N, 1) of sessions, as means over groups of k windows in time order.

    The processes share the work, and each returns all predictions.

    Raises
    ------
    SampleCorrupt
        If a session's bytes are damaged.
    """
    rank, world = (dist.get_rank(), world_size()) if dist.is_initialized() else (0, 1)
    k, size = settings.windows.k, settings.run.batch
    groups_N = [window_groups(session.n_kept, k) for session in sessions]
    samples = [(row, group.windows) for row, groups in enumerate(groups_N) for group in groups]
    sum_NK = torch.zeros(len(sessions), max(1, classes), dtype=torch.float64, device=device)
    micro_batches = [samples[at : at + size] for at in range(0, len(samples), size)]

    @lru_cache(maxsize=2)
    def in_time(row: int) -> np.ndarray:
        return np.argsort(dataset.read(sessions[row], ("start",))["start"], kind="stable")

    for number in range(rank, math.ceil(len(micro_batches) / world) * world, world):
        # At ZeRO stage 3 all processes must take part in every forward pass, also those without remaining sessions.
        mine = micro_batches[min(number, len(micro_batches) - 1)]
        read = [read_windows(dataset, sessions[row], in_time(row)[windows].tolist()) for row, windows in mine]
        guess_BK, _ = forward(collate(read, geometry, settings.tokens_at_once).to(device))
        guess_BK = guess_BK.double().softmax(dim=1) if classes else guess_BK.double()
        if number < len(micro_batches):
            sum_NK.index_add_(0, torch.tensor([row for row, _ in mine], device=device), guess_BK)
    sum_over_processes(sum_NK)
    count_N = np.array([len(groups) for groups in groups_N])
    return sum_NK.cpu().numpy() / count_N[:, None]


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def sum_over_processes(tensor: Tensor) -> None:
    """Sum a tensor over all processes, in place."""
    if world_size() > 1:
        dist.all_reduce(tensor)
