"""Context and targets of a sample: a pure function of (seed, epoch, sample key).

Cells, not tokens, are chosen: the tokens that end in one token of the last level are context together or not at all,
so nothing of a target reaches the context at any level. A cell is a place (of the cell grid in space) at a slot (of the
cell grid in time). Context is some places at some slots; the three kinds of target are

- cross-time: places of the context at other slots,
- cross-location: other places at slots of the context,
- double-cross: neither.

Legend: S slots; L places; K chosen cells.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from shards.format.stream import generator
from slim.config import KINDS, TokenMaskSettings


@dataclass(frozen=True)
class Mask:
    """Flat cells (slot * places + place) of one sample.

    Attributes
    ----------
    context_K, target_K : int64, ascending
    kind_K : int64, index into KINDS of each target
    rebuilt_K : bool, the targets whose voxels MAE rebuilds
    """

    context_K: np.ndarray
    target_K: np.ndarray
    kind_K: np.ndarray
    rebuilt_K: np.ndarray


def choose(size_L: np.ndarray, share: float, rng: np.random.Generator) -> np.ndarray:
    """Choose items so that each is as likely as any other and their sizes sum to `share` of all, within one item.

    Systematic sampling: the items are laid round a circle in random order, each as long as its size, an arc of `share`
    of the circle starts at a random point, and the items whose middle it covers are chosen. A middle is covered with
    probability `share` whatever the item's size, so neither large nor late items are favoured. At least one item is
    chosen and, if there are two or more, at least one is left.

    Returns
    -------
    bool (L,)
    """
    order = rng.permutation(len(size_L))
    size = size_L[order].astype(np.float64)
    middle = np.cumsum(size) - size / 2
    total = size.sum()
    start = rng.random() * total
    inside = np.mod(middle - start, total) < share * total
    if not inside.any():
        inside[rng.integers(len(inside))] = True
    elif inside.all() and len(inside) > 1:
        inside[rng.integers(len(inside))] = False
    chosen = np.zeros(len(size_L), bool)
    chosen[order] = inside
    return chosen


def draw(size_SL: np.ndarray, settings: TokenMaskSettings, seed: int, epoch: int, key: str) -> Mask:
    """Draw context and targets of one sample.

    Parameters
    ----------
    size_SL : int (S, L)
        Brain tokens of each cell; cells without any belong to nothing.
    settings : TokenMaskSettings
    seed, epoch : int
    key : str
    """
    rng = generator(seed, epoch, key, "mask")
    places = np.flatnonzero(size_SL.any(axis=0))
    in_place = np.zeros(size_SL.shape[1], bool)
    in_place[places] = choose(size_SL[:, places].sum(axis=0), settings.context_places, rng)
    in_slot = choose(size_SL.sum(axis=1), settings.context_times, rng)
    exists = size_SL > 0
    context = exists & in_slot[:, None] & in_place
    kinds = (~in_slot[:, None] & in_place, in_slot[:, None] & ~in_place, ~in_slot[:, None] & ~in_place)
    kind_SL = np.full(size_SL.shape, -1)
    for number, where in enumerate(kinds):
        cells = np.flatnonzero(exists & where & (KINDS[number] in settings.kinds))
        if len(cells) and settings.targets < 1:
            cells = cells[choose(size_SL.ravel()[cells], settings.targets, rng)]
        kind_SL.flat[cells] = number
    target_K = np.flatnonzero(kind_SL >= 0)
    rebuilt_K = (
        choose(size_SL.ravel()[target_K], settings.rebuilt, rng)
        if settings.rebuilt < 1
        else np.ones(len(target_K), bool)
    )
    return Mask(np.flatnonzero(context), target_K, kind_SL.ravel()[target_K], rebuilt_K)
