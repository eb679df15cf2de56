"""Count the steps of many chunks in a short time: most of them are merged to a few.

Chunks of the local stages have the same calls, and the FLOPs of several chunks together are those of one that holds all
their segments. So chunks are merged with their neighbours, and a merged chunk stands for as many as it holds. Chunks
that may have the peak of memory stay as they are: those with the most tokens, and with the most rows before pooling.
The first and the last stay, too, because gradients of parameters are made by the last, added to by those before, and
complete after the first.

Legend: U segments; M pooled tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
from torch import Tensor

from slim.model.hiera import Hiera
from slim.model.inputs import Voxels
from slim.model.ragged import Chunk, Plan, children, segments
from slim.planning.counting import Footprint


def merge(plan: Plan, encoder: Hiera, found: Footprint) -> Plan:
    """A plan with fewer chunks; the encoder tells a footprint for how many chunks the present one stands.

    In the backward pass, a chunk is computed again when its gradients are needed, which begins its part of it.
    """
    groups = _groups(plan.chunks)
    chunks = [_joined([plan.chunks[number] for number in group]) for group in groups]
    for chunk, group in zip(chunks, groups, strict=True):
        for tensor in _tensors(chunk) if len(group) > 1 else ():
            found.ignore(tensor)
    stands_for = {chunk.first: len(group) for chunk, group in zip(chunks, groups, strict=True)}
    local = encoder._local

    def told(voxels: Voxels, base_QC: Tensor | None, plan: Plan, chunk: Chunk, stop: int) -> Tensor:
        found.stands_for = stands_for[chunk.first]
        out_NC = local(voxels, base_QC, plan, chunk, stop)
        if found.part != "backward":
            found.stands_for = 1
        return out_NC

    encoder._local = told  # type: ignore[method-assign]
    return replace(plan, chunks=chunks)


def _groups(chunks: Sequence[Chunk]) -> list[list[int]]:
    """Numbers of consecutive chunks that are merged."""
    kept = {0, len(chunks) - 1, _largest([chunk.stop - chunk.first for chunk in chunks])}
    for level in range(len(chunks[0].children)):
        kept.add(_largest([len(chunk.children[level].first_M) * chunk.children[level].most for chunk in chunks]))
    alone = [[number] for number in sorted(kept)]
    between = [list(range(one + 1, other)) for (one,), (other,) in pairwise(alone)]
    return sorted(group for group in alone + between if group)


def _largest(sizes: Sequence[int]) -> int:
    return int(np.argmax(sizes))


def _joined(chunks: Sequence[Chunk]) -> Chunk:
    """Consecutive chunks as one."""
    if len(chunks) == 1:
        return chunks[0]

    def lengths(bounds: Sequence[Tensor]) -> np.ndarray:
        return np.concatenate([bound_U.diff().numpy() for bound_U in bounds])

    levels = [lengths([chunk.levels[i].q_bound for chunk in chunks]) for i in range(len(chunks[0].levels))]
    return Chunk(
        chunks[0].first,
        chunks[-1].stop,
        [segments(length_U, length_U) for length_U in levels],
        [segments(above_U, below_U) for below_U, above_U in pairwise(levels)],
        [
            children(np.concatenate([chunk.children[i].length_M.numpy() for chunk in chunks]))
            for i in range(len(chunks[0].children))
        ],
    )


def _tensors(tree: Any) -> Iterator[Tensor]:
    """All tensors of a tree of dataclasses and lists."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, list):
        for part in tree:
            yield from _tensors(part)
    elif is_dataclass(tree):
        for field in fields(tree):
            yield from _tensors(getattr(tree, field.name))
