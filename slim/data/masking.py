"""Masking: draw the context and the targets of a sample, as a pure function of (seed, epoch, sample key).

Whole cells are drawn, not tokens, so that no pooled token mixes context and targets. A cell is a place (in the spatial
cell grid) at a slot (in the temporal cell grid). The context is a set of places at a set of slots. There are three
kinds of target:

- cross-time: places of the context, at other slots;
- cross-location: other places, at slots of the context;
- double-cross: other places at other slots.

Legend: S slots; L places; K chosen cells.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from shards.format.stream import generator
from slim.config import KINDS, TokenMaskSettings


@dataclass(frozen=True)
class Mask:
    """Context and targets of one sample, as flat cell indices (slot * places + place).

    Attributes
    ----------
    context_K, target_K : int64 array
        Cells, in ascending order.
    kind_K : int64 array
        Kind of each target, as an index into KINDS.
    rebuilt_K : bool array
        Targets that MAE reconstructs.
    """

    context_K: np.ndarray
    target_K: np.ndarray
    kind_K: np.ndarray
    rebuilt_K: np.ndarray


def choose(size_L: np.ndarray, share: float, rng: np.random.Generator) -> np.ndarray:
    """Choose items with equal probability, so that their sizes sum to `share` of the total, up to one item.

    This is systematic sampling. The items are placed on a circle in random order, each with an arc of its size. An arc
    of `share` of the circle starts at a random point, and all items with a midpoint inside it are chosen. A midpoint is
    covered with probability `share`, independent of the item's size. At least one item is chosen and, if there are two
    or more, at least one is not.

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
    """Draw the context and the targets of one sample.

    Parameters
    ----------
    size_SL : int (S, L)
        Number of brain tokens in each cell. Cells without brain tokens are never drawn.
    settings : TokenMaskSettings
    seed, epoch : int
    key : str
    """
    rng = generator(seed, epoch, key, "mask")
    places = np.flatnonzero(size_SL.any(axis=0))
    in_place = np.zeros(size_SL.shape[1], bool)
    in_place[places] = choose(size_SL[:, places].sum(axis=0), settings.context_places, rng)
    slots = np.flatnonzero(size_SL.any(axis=1))
    in_slot = np.zeros(len(size_SL), bool)
    in_slot[slots] = choose(size_SL[slots].sum(axis=1), settings.context_times, rng)
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
