"""Grids, mask units and pooling as plain integers, for any number of dimensions.

A token grid is divided into mask units; pooling steps merge tokens inside a unit; the tokens that end in one token of
the last level form a cell. Only the shape of things is decided here: no tensor of features is touched.

Legend: A axes (time first); L all tokens of the dense grid in C order.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import prod

import numpy as np

from shards.core.errors import ConfigError
from slim.config import ModelSettings

Ints = tuple[int, ...]


@dataclass(frozen=True)
class Geometry:
    """The token grid and how it is divided.

    Parameters
    ----------
    tokens : tuple of int
        Tokens along each axis, (T, X, Y, Z) for fMRI.
    unit : tuple of int
        Tokens of a mask unit along each axis; divides `tokens`.
    strides : tuple of tuples of int
        Pooling steps in order; their product divides `unit`.
    global_steps : int
        How many of the steps, the last ones, are taken where attention is global. The others merge tokens while
        attention stays inside mask units.

    Raises
    ------
    ConfigError
        If the sizes do not fit into each other; names the axis, the rule and both numbers.
    """

    tokens: Ints
    unit: Ints
    strides: tuple[Ints, ...]
    global_steps: int = 0

    def __post_init__(self) -> None:
        for name, sizes in (("unit", self.unit), *((f"strides[{i}]", s) for i, s in enumerate(self.strides))):
            if len(sizes) != len(self.tokens):
                raise ConfigError("model", name, f"{len(sizes)} axes", f"{len(self.tokens)}, as the token grid has")
            if min(sizes) < 1:
                raise ConfigError("model", name, min(sizes), "sizes of 1 or more")
        for axis, (size, unit, cell) in enumerate(zip(self.tokens, self.unit, self.cell, strict=True)):
            if size % unit:
                raise ConfigError(
                    "model",
                    f"unit[{axis}]",
                    unit,
                    f"a divisor of the {size} tokens on that axis",
                    "Change the unit, or the data's grid and windows.k",
                )
            if unit % cell:
                raise ConfigError("model", f"strides, axis {axis}", f"a product of {cell}", f"a divisor of unit {unit}")

    @property
    def local_steps(self) -> int:
        """Pooling steps while attention stays inside mask units."""
        return len(self.strides) - self.global_steps

    @property
    def cell(self) -> Ints:
        """Tokens of a cell along each axis."""
        return tuple(prod(s[axis] for s in self.strides) for axis in range(len(self.tokens)))

    @property
    def cells(self) -> Ints:
        """Cells along each axis."""
        return tuple(size // cell for size, cell in zip(self.tokens, self.cell, strict=True))

    def window_of_slot(self, frames: int) -> np.ndarray:
        """Window of so many frames that holds the middle of each slot of cells along the first axis, int (S,)."""
        return ((np.arange(self.cells[0]) + 0.5) * self.cell[0] // frames).astype(int)

    def _parent(self, block: Ints) -> np.ndarray:
        """Flat index of the block of `block` tokens that holds each token; int64 (L,)."""
        places = np.indices(self.tokens).reshape(len(self.tokens), -1)
        coarse = tuple(size // step for size, step in zip(self.tokens, block, strict=True))
        return np.ravel_multi_index(tuple(p // step for p, step in zip(places, block, strict=True)), coarse)

    @cached_property
    def unit_of(self) -> np.ndarray:
        """Mask unit of each token, int64 (L,)."""
        return self._parent(self.unit)

    @cached_property
    def ancestors(self) -> tuple[np.ndarray, ...]:
        """For each pooling step, the token of the next level that each token of the grid ends in; int64 (L,)."""
        result, block = [], (1,) * len(self.tokens)
        for stride in self.strides:
            block = tuple(size * step for size, step in zip(block, stride, strict=True))
            result.append(self._parent(block))
        return tuple(result)

    @cached_property
    def cell_of(self) -> np.ndarray:
        """Cell of each token, int64 (L,)."""
        return self.ancestors[-1] if self.strides else np.arange(prod(self.tokens))

    @cached_property
    def order(self) -> np.ndarray:
        """Position of each token when units, cells, ... , children lie one after another; int64 (L,).

        Sorting any subset of tokens by it makes every unit, and every pooled token's children, contiguous.
        """
        keys = [np.arange(prod(self.tokens)), *self.ancestors, self.unit_of]
        rank = np.empty(prod(self.tokens), np.int64)
        rank[np.lexsort(keys)] = np.arange(prod(self.tokens))
        return rank


def geometry_of(sizes: ModelSettings, tokens: tuple[int, ...]) -> Geometry:
    """The token grid (time, x, y, z), divided as the sizes of a model say.

    Raises
    ------
    ConfigError
        If they do not fit.
    """
    # The first block of a stage pools, and attends where the stage before it did.
    return Geometry(tokens, sizes.unit, sizes.strides, max(0, len(sizes.strides) - sizes.local_stages))
