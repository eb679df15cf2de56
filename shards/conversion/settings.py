"""The settings of a conversion, besides its cohorts and its ranker."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from typing import Annotated, TypeVar

from pydantic import Field

from shards.conversion.session import SessionSettings
from shards.conversion.splits import DatasetSplitSettings
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


class ShardSettings(Settings):
    """Files of the dataset."""

    mb: Annotated[float, Unit("MB")] = Field(1000, gt=0, description="size at which a shard is closed, in 10^6 bytes")


class ConvertSettings(SessionSettings):
    """All settings of a conversion, besides its cohorts and its ranker."""

    split: DatasetSplitSettings = DatasetSplitSettings()
    extractor: ExtractorSettings = ExtractorSettings()
    shards: ShardSettings = ShardSettings()
