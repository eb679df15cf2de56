"""The settings of the temporal extractor and its training."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from typing import Annotated, TypeVar

from pydantic import Field

from shards.core.settings import Settings, Unit

S = TypeVar("S")


class ExtractorSettings(Settings):
    """The temporal extractor that is trained if none is given."""

    sessions: Annotated[int, Unit("sessions")] = Field(
        24, ge=1, le=256, description="number of training sessions, drawn from all of them"
    )
    steps: Annotated[int, Unit("steps")] = Field(1200, ge=1, description="optimizer steps")
    seed: int = Field(0, ge=0, description="seed of the draw of sessions, the weights, crops and masks")

    def draw(self, sessions: Iterable[S], key: Callable[[S], str]) -> list[S]:
        """Draw the sessions for its training, sorted by key. The draw depends only on the seed and the keys."""
        shuffled = sorted(sessions, key=lambda s: hashlib.sha256(f"{self.seed}/{key(s)}".encode()).hexdigest())
        return sorted(shuffled[: self.sessions], key=key)
