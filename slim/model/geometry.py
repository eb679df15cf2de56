"""The geometry of tokens in integers: grids, mask units, pooling and cells, for any number of dimensions.

The token grid is divided into mask units. Pooling steps merge tokens inside a unit. A cell is the set of tokens that
are merged into one token of the last level. No features are computed here.

Legend: A axes (time first); L all tokens of the dense grid, in C order unless said otherwise; C cells.
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
    """A token grid with its mask units and pooling steps.

    Parameters
    ----------
    tokens : tuple of int
        Tokens along each axis, (T, X, Y, Z) for fMRI.
    unit : tuple of int
        Tokens of a mask unit along each axis; must divide `tokens`.
    strides : tuple of tuples of int
        Pooling steps in order; their product must divide `unit`.
    global_steps : int
        Number of pooling steps, counted from the last, in stages with global attention. The earlier steps are in stages
        with attention inside mask units.

    Raises
    ------
    ConfigError
        If the sizes do not divide each other. It names the axis, the rule and both numbers.
    """

    tokens: Ints
    unit: Ints
    strides: tuple[Ints, ...]
    global_steps: int = 0

    def __post_init__(self) -> None:
        for name, sizes in (("unit", self.unit), *((f"strides[{i}]", s) for i, s in enumerate(self.strides))):
            if len(sizes) != len(self.tokens):
                raise ConfigError("model", name, f"{len(sizes)} axes", f"{len(self.tokens)}, as in the token grid")
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
        """Number of pooling steps in the stages with attention inside mask units."""
        return len(self.strides) - self.global_steps

    @property
    def cell(self) -> Ints:
        """Tokens of a cell along each axis."""
        return tuple(prod(s[axis] for s in self.strides) for axis in range(len(self.tokens)))

    @property
    def cells(self) -> Ints:
        """Cells along each axis."""
        return tuple(size // cell for size, cell in zip(self.tokens, self.cell, strict=True))

    def slots(self, frames: int) -> int:
        """Number of slots that the first `frames` frames occupy; they may fill the last one in part."""
        return -(-frames // self.cell[0])

    def window_of_slot(self, frames: int, windows: int) -> np.ndarray:
        """For each slot of this many windows of `frames` frames, the window with the middle of its frames, int (S,)."""
        first_S = np.arange(self.slots(windows * frames)) * self.cell[0]
        stop_S = np.minimum(first_S + self.cell[0], windows * frames)
        return ((first_S + stop_S) / 2 // frames).astype(int)

    def _parent(self, block: Ints) -> np.ndarray:
        """For each token, the flat index of its block; a block has `block` tokens along each axis. int64 (L,)."""
        places = np.indices(self.tokens).reshape(len(self.tokens), -1)
        coarse = tuple(size // step for size, step in zip(self.tokens, block, strict=True))
        return np.ravel_multi_index(tuple(p // step for p, step in zip(places, block, strict=True)), coarse)

    @cached_property
    def unit_of(self) -> np.ndarray:
        """Mask unit of each token, int64 (L,)."""
        return self._parent(self.unit)

    @cached_property
    def ancestors(self) -> tuple[np.ndarray, ...]:
        """For each pooling step, the token of the next level into which each token is merged; int64 (L,)."""
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
    def in_order(self) -> np.ndarray:
        """All tokens, ordered by unit, then cell, down to the children of one token; int32 (L,).

        Every unit, and the tokens that are merged into one token of any level, is a block of fixed size in this order.
        In any subset of the tokens in this order they stay contiguous.
        """
        return np.lexsort([np.arange(prod(self.tokens)), *self.ancestors, self.unit_of]).astype(np.int32)

    @cached_property
    def frame_in_order(self) -> np.ndarray:
        """Position on the first axis of each token of `in_order`, int32 (L,)."""
        return self.in_order // np.int32(prod(self.tokens[1:]))

    @cached_property
    def space_in_order(self) -> np.ndarray:
        """Flat position on the other axes of each token of `in_order`, int32 (L,)."""
        return self.in_order % np.int32(prod(self.tokens[1:]))

    @cached_property
    def cell_in_order(self) -> np.ndarray:
        """The cells in the order of `in_order`, int32 (C,)."""
        return self.cell_of[self.in_order[:: prod(self.cell)]].astype(np.int32)


def geometry_of(sizes: ModelSettings, tokens: tuple[int, ...]) -> Geometry:
    """The geometry of a token grid (time, x, y, z) for a model of these sizes.

    Raises
    ------
    ConfigError
        If the grid and the sizes of the model do not fit together.
    """
    # The first block of a stage pools; its attention has the range of the stage before.
    return Geometry(tokens, sizes.unit, sizes.strides, max(0, len(sizes.strides) - sizes.local_stages))
