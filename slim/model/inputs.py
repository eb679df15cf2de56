"""The content of a micro-batch: voxel values, layouts of tokens, and targets.

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
    """The targets of a batch.

    Attributes
    ----------
    cell_K, sample_K, kind_K : int tensors
        Cell, sample and kind of each target, sample by sample.
    of_kind : sequence of int
        Number of targets of each kind.
    row_K : int tensor
        Row of each target in the cells of the whole-brain plan.
    joint, slots : Segments
        Attention over the context and targets of a sample, and over those of one slot.
    joint_J, back_K : int tensors
        Rows of cat(context, targets) in the order that `joint` and `slots` use; rows of the targets in that order.
    rebuilt_G : int tensor
        Targets that are reconstructed.
    value_GE, patch_GE : int tensors
        Rows of their tokens in the tables of voxel values and of patches; -1 where a token has no brain.
    """

    cell_K: Tensor
    sample_K: Tensor
    kind_K: Tensor
    of_kind: list[int]
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
    """A micro-batch: voxel values, the plans of the context and of all brain tokens, and the targets.

    `damaged` holds the keys of samples that were left out, with reasons. If no sample is left, `empty` is True and the
    batch holds a placeholder.
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
        """Pack the batch into few tensors, to send it to another process or a device."""
        plans = Packed([self.whole, self.context, self.targets])
        return PackedBatch(self.keys, self.epochs, self.voxels, self.brain_QV, plans, self.damaged, self.empty)

    def to(self, device: torch.device | str) -> Batch:
        return self.pack().to(device)


@dataclass
class PackedBatch:
    """A packed batch, as a loading process sends it."""

    keys: list[str]
    epochs: list[int]
    voxels: Voxels
    brain_QV: Tensor
    plans: Packed
    damaged: dict[str, str]
    empty: bool

    def to(self, device: torch.device | str) -> Batch:
        """Unpack the batch on `device`."""
        whole, context, targets = self.plans.to(device)
        voxels, brain_QV = self.voxels.to(device), self.brain_QV.to(device)
        return Batch(self.keys, self.epochs, voxels, brain_QV, whole, context, targets, dict(self.damaged), self.empty)


@dataclass
class Voxels:
    """The voxel values of a batch, as stored in the shards.

    Attributes
    ----------
    value_RV : Tensor
        Fluctuation of every kept patch in every frame of every sample, in global-SD units.
    baseline_QV, spread_QV : Tensor
        Mean over the scan (global z) and SD (global-SD units) of every patch of every sample.
    second_BT : Tensor
        Time of every frame in its scan, in s.
    """

    value_RV: Tensor
    baseline_QV: Tensor
    spread_QV: Tensor
    second_BT: Tensor

    def to(self, device: torch.device | str) -> Voxels:
        return replace(self, **{name: value.to(device, non_blocking=True) for name, value in vars(self).items()})


class Packed:
    """A tree of dataclasses and lists with all integer tensors in one buffer.

    A plan has thousands of small tensors. Sent one by one, each needs a file descriptor and a copy to the device;
    packed, they need only one.
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
        """Rebuild the tree on `device`; its tensors are views of one buffer."""
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
    """Apply `change` to the parts of a list or dataclass; other objects are returned unchanged."""
    if isinstance(item, list):
        return [change(part) for part in item]
    if is_dataclass(item) and not isinstance(item, _Slot | type):
        return type(item)(**{name: change(value) for name, value in vars(item).items()})
    return item
