"""Memory of the optimizer in a counted step: plain AdamW, or ZeRO with the buffers of DeepSpeed.

`Zero` allocates and frees tensors of the same sizes as DeepSpeed, in the same order, without communication. The table
follows the code of DeepSpeed 0.19 (`stage_1_and_2.py`, `stage3.py`, `partition_parameters.py`,
`coalesced_collectives.py`) for fp32 weights without offloading. N: numbers of the model, g: of a group of AdamW; W:
processes; B: bucket.

stage  always                          in forward and backward passes               in the step, group by group
0      weights N, moments 2 N          gradients N, then N flat to reduce them
1      weights N, master copy N/W,     gradients N; then B, N/W, a full bucket      gradients N/W, g/W flat
       moments 2 N/W
2      as 1                            B, gradients N/W, a full bucket              as 1
3      weights, master copy, moments   a full bucket                                g/W flat
       2, gradients: N/W each; B
       W > 1: S gathered               L gathered, and flat in the forward pass     S dropped; each in turn for the EMA

A full bucket is reduced through a flat copy (at stages 1 and 2 only if W > 1). A further micro-batch adds N at stage 1,
and N/W at stage 2 while it runs. S are the parameters with up to 100 000 numbers, L the larger ones; each of L is freed
once its gradient is computed. When DeepSpeed knows the order of the layers, it gathers L ahead, up to 50 million
numbers at once; when the order changes, it starts over. A step with a known order needs more memory, and is the one
that is counted. AdamW is fused and makes no copies.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from slim.config import PretrainSettings
from slim.planning.counting import Footprint
from slim.training.engine import BUCKET
from slim.training.optim import parameter_groups

_FLATTENED = 500_000_000  # numbers that DeepSpeed flattens at once at stage 0
_SMALL, _AHEAD = 100_000, 50_000_000  # stage 3: largest parameters that stay gathered; numbers gathered ahead


class Plain:
    """Torch's AdamW in one process.

    Parameters
    ----------
    settings : PretrainSettings
    model : nn.Module
        The model, made inside the footprint.
    found : Footprint
        The footprint that counts.

    Attributes
    ----------
    whole : callable, optional
        Returns the whole value of a parameter that is divided among processes.
    """

    whole: Callable[[Tensor], Tensor] | None = None

    def __init__(self, settings: PretrainSettings, model: nn.Module, found: Footprint):
        self.settings, self.model, self.found = settings, model, found
        self.optimizer = torch.optim.AdamW(self.updated(), fused=True)
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = torch.zeros_like(parameter)
        self.optimizer.step()  # allocates the moments
        self.optimizer.zero_grad()
        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(self.ready)

    def updated(self) -> list[dict[str, Any]]:
        """The tensors that AdamW updates, by group."""
        return parameter_groups(self.model)

    def ready(self, parameter: Tensor) -> None:
        """Called when a gradient has been computed."""
        assert parameter.grad is not None
        self.found.rename(parameter.grad, "gradients")
        self.found.moment += 1

    def reduce(self, last: bool) -> None:
        """Called at the end of the backward pass of a micro-batch; `last` for the last one of a step."""

    def step(self) -> None:
        """Clip the gradients and update the weights."""
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.optimizer.clip, foreach=True)
        self.optimizer.step()
        self.optimizer.zero_grad()


class Zero(Plain):
    """DeepSpeed's ZeRO with the stage and number of processes of the configuration.

    Parameters
    ----------
    settings, model, found
        As in `Plain`.
    bucket : int
        Size, in numbers, of the buffer through which gradients are reduced.
    """

    def __init__(self, settings: PretrainSettings, model: nn.Module, found: Footprint, bucket: int = BUCKET):
        self.stage, self.processes = settings.zero_stage, settings.run.processes
        self.bucket = bucket
        self._buffer: Tensor | None = None
        self._filled = 0  # numbers in the buffer
        self._larger: Tensor | None = None  # a gradient that is larger than the buffer
        self._partitions: list[Tensor] = []  # gradients of this process's part: of the step, and of a micro-batch
        self._begun = False  # whether the partition of this micro-batch is allocated
        super().__init__(settings, model, found)
        if self.stage == 3:
            self.whole = lambda parameter: torch.empty(parameter.shape)
            self._take_buffer()
            self._take_partition()
        self._scatters = self.stage == 3 and self.processes > 1
        if self._scatters:
            self._small = [parameter for parameter in model.parameters() if parameter.numel() <= _SMALL]
            self._large = [parameter for parameter in model.parameters() if parameter.numel() > _SMALL]
            with found.called("states"):
                self._weights = torch.empty(sum(part.numel() for part in self._parts))
                self._nothing = torch.empty(1)
            self._drop(model.parameters())
            self._gather(self._small)
            self._flat: Tensor | None = None
            model.register_forward_pre_hook(self._fetch)
            model.register_forward_hook(self._fetched)

    def updated(self) -> list[dict[str, Any]]:
        groups = super().updated()
        self._numbers = sum(p.numel() for group in groups for p in group["params"])
        if self.stage == 0:
            return groups
        with self.found.called("master copy"):
            self._parts = [nn.Parameter(torch.empty(self._share(group["params"]))) for group in groups]
        self._reduced = sum(self._overlap(group["params"]) for group in groups)
        return [{"params": [part]} for part in self._parts]

    def _share(self, parameters: list[Tensor]) -> int:
        """Numbers of a group that a process updates: a share of the group, or at stage 3 of each parameter."""
        sizes = [parameter.numel() for parameter in parameters]
        return sum(-(-size // self.processes) for size in (sizes if self.stage == 3 else [sum(sizes)]))

    def _overlap(self, parameters: list[Tensor]) -> int:
        """Number of gradients of a group that a process keeps: its share; at stages 1 and 2, of whole parameters."""
        share = self._share(parameters)
        if self.stage == 3:
            return share
        size_P = np.array([parameter.numel() for parameter in parameters])
        end_P = np.cumsum(size_P)
        begun = share * np.arange(self.processes)[:, None]
        return int(((end_P > begun) & (end_P - size_P < begun + share)).dot(size_P).max())

    def ready(self, parameter: Tensor) -> None:
        super().ready(parameter)
        if self.stage in (1, 2) and self._buffer is None:
            self._take_buffer()
        if self.stage > 1:
            self._send(parameter)
        if self._scatters and parameter.numel() > _SMALL:
            self._drop([parameter])

    def reduce(self, last: bool) -> None:
        if self.stage == 0 and last:
            with self.found.called("flat gradients"):
                torch.empty(min(self._numbers, _FLATTENED))
        if self.stage == 1 and last:
            for parameter in self.model.parameters():
                self._send(parameter)
        if self.stage > 1 or (self.stage == 1 and last):
            self._flush()
        if self.stage == 2 or (self.stage == 1 and last):
            del self._partitions[1:]  # they have been added to the first
            self._buffer, self._begun = None, False

    def step(self) -> None:
        if self.stage == 0:
            super().step()
            return
        if self._scatters:
            self._drop(self.model.parameters())
        groups = self.optimizer.param_groups
        for group, part in zip(groups, self._parts, strict=True):
            with self.found.called("flat gradients"):
                part.grad = torch.empty_like(part)
            self.optimizer.param_groups = [group]
            self.optimizer.step()
            part.grad = None
        self.optimizer.param_groups = groups
        if self.stage < 3:
            self._partitions.clear()
        if self._scatters:
            self._gather(self._small)

    def _send(self, parameter: Tensor) -> None:
        """Add a gradient to the buffer; a full buffer is emptied into the partition."""
        size = parameter.numel()
        if self._filled + size > self.bucket:
            self._flush()
        self._filled += size
        if size > self.bucket:
            self._larger = parameter.grad
        parameter.grad = None

    def _flush(self) -> None:
        if self.stage < 3 and not self._begun:
            self._take_partition()
            self._begun = True
        if self.stage == 3 or self.processes > 1:
            with self.found.called("bucket"):
                torch.empty(self._filled)
        self._filled, self._larger = 0, None

    def _take_buffer(self) -> None:
        with self.found.called("bucket"):
            self._buffer = torch.empty(self.bucket)

    def _take_partition(self) -> None:
        with self.found.called("gradients"):
            self._partitions.append(torch.empty(self._reduced))

    def _gather(self, parameters: Iterable[Tensor]) -> None:
        with self.found.called("gathered"):
            for parameter in parameters:
                parameter.data = torch.empty(parameter.shape)

    def _drop(self, parameters: Iterable[Tensor]) -> None:
        for parameter in parameters:
            parameter.data = self._nothing.expand(parameter.shape)

    def _fetch(self, *_: Any) -> None:
        with self.found.called("gathered"):
            self._flat = torch.empty(min(_AHEAD, sum(parameter.numel() for parameter in self._large)))
        self._gather(self._large)

    def _fetched(self, *_: Any) -> None:
        self._flat = None
