"""What a micro-batch holds: values, layouts and targets, as an encoder takes them.

Legend: K targets of the batch; G cells that are rebuilt; E tokens of a cell; J joint sequence of context and targets;
R rows of voxel values; Q rows of patches; V voxels of a patch; T frames of a sample.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

from slim.model.ragged import Plan, Segments


@dataclass
class Targets:
    """What is to be predicted.

    Attributes
    ----------
    cell_K, sample_K, kind_K : cell, sample and kind of each target, sample by sample
    row_K : row of each target among the cells of the whole-brain plan
    joint, slots : attention over context and targets of a sample together, and over those of one slot
    joint_J : rows of cat(context, targets) in the order both expect; back_K the targets' rows in that order
    rebuilt_G : targets whose voxels are rebuilt; value_GE rows of their tokens in the voxel table, -1 where none is;
    patch_GE : rows in the patch table, likewise
    """

    cell_K: Tensor
    sample_K: Tensor
    kind_K: Tensor
    row_K: Tensor
    joint: Segments
    slots: Segments
    joint_J: Tensor
    back_K: Tensor
    rebuilt_G: Tensor
    value_GE: Tensor
    patch_GE: Tensor


@dataclass
class Batch:
    """A micro-batch: values, the context's plan, the plan of all brain tokens, and the targets.

    `damaged` names the samples that were left out, with reasons; where nothing else was there the batch is `empty`, and
    what it holds stands for nothing.
    """

    keys: list[str]
    epochs: list[int]
    voxels: Voxels
    brain_QV: Tensor
    whole: Plan
    context: Plan | None = None
    targets: Targets | None = None
    damaged: dict[str, str] = field(default_factory=dict)
    empty: bool = False

    def pack(self) -> PackedBatch:
        """The same in few tensors, to be sent between processes and to a device."""
        plans = Packed([self.whole, self.context, self.targets])
        return PackedBatch(self.keys, self.epochs, self.voxels, self.brain_QV, plans, self.damaged, self.empty)

    def to(self, device: torch.device | str) -> Batch:
        return self.pack().to(device)


@dataclass
class PackedBatch:
    """A batch on its way from a loading process."""

    keys: list[str]
    epochs: list[int]
    voxels: Voxels
    brain_QV: Tensor
    plans: Packed
    damaged: dict[str, str]
    empty: bool

    def to(self, device: torch.device | str) -> Batch:
        """The batch on `device`."""
        whole, context, targets = self.plans.to(device)
        voxels, brain_QV = self.voxels.to(device), self.brain_QV.to(device)
        return Batch(self.keys, self.epochs, voxels, brain_QV, whole, context, targets, dict(self.damaged), self.empty)


@dataclass
class Voxels:
    """The values of a batch, as gathered in the shards.

    Attributes
    ----------
    value_RV : fluctuation of every kept patch in every frame of every sample, global-SD units
    baseline_QV, spread_QV : run mean (global z) and SD (global-SD units) of every patch of every sample
    second_BT : time of every frame in its run, s
    """

    value_RV: Tensor
    baseline_QV: Tensor
    spread_QV: Tensor
    second_BT: Tensor

    def to(self, device: torch.device | str) -> Voxels:
        return replace(self, **{name: value.to(device, non_blocking=True) for name, value in vars(self).items()})


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
