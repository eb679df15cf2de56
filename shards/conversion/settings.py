"""The settings of a conversion, besides its cohorts and its ranker."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from shards.conversion.extractor_settings import ExtractorSettings
from shards.conversion.session import SessionSettings
from shards.conversion.splits import DatasetSplitSettings
from shards.core.settings import Settings, Unit


class ShardSettings(Settings):
    """Files of the dataset."""

    mb: Annotated[float, Unit("MB")] = Field(1000, gt=0, description="size at which a shard is closed, in 10^6 bytes")


class ConvertSettings(SessionSettings):
    """All settings of a conversion, besides its cohorts and its ranker."""

    split: DatasetSplitSettings = DatasetSplitSettings()
    extractor: ExtractorSettings = ExtractorSettings()
    shards: ShardSettings = ShardSettings()
