"""The sizes of a model, with the presets that ship."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from shards.core.settings import Contradiction, Settings, Unit

MOST_CHANNELS, MOST_BLOCKS = 16384, 1024  # far above any model; guards against files from others with huge sizes


class PredictorSettings(Settings):
    """The predictor of the JEPA objective."""

    width: Annotated[int, Unit("channels")] = Field(192, ge=8, le=MOST_CHANNELS, description="channels of a token")
    depth: Annotated[int, Unit("blocks")] = Field(4, ge=1, le=MOST_BLOCKS, description="transformer blocks")
    heads: Annotated[int, Unit("heads")] = Field(
        6, ge=1, le=MOST_CHANNELS, description="attention heads; must divide width"
    )

    @model_validator(mode="after")
    def _divides(self) -> PredictorSettings:
        if self.width % self.heads:
            raise Contradiction("heads", self.heads, f"a divisor of width, {self.width}")
        return self


class ModelSettings(Settings):
    """Sizes of the encoder and the predictor. Axes are (time, x, y, z) in tokens; a token is a patch in a frame."""

    embed: Annotated[int, Unit("channels")] = Field(
        ge=8, le=MOST_CHANNELS, description="channels of the first stage; doubled at each stage"
    )
    heads: Annotated[int, Unit("heads")] = Field(
        ge=1, le=MOST_CHANNELS, description="heads of the first stage; doubled at each stage"
    )
    depths: Annotated[tuple[int, ...], Unit("blocks")] = Field(
        min_length=1, max_length=8, description="blocks of each stage"
    )
    unit: Annotated[tuple[int, int, int, int], Unit("tokens")] = Field(
        description="size of a mask unit along time, x, y and z"
    )
    strides: Annotated[tuple[tuple[int, int, int, int], ...], Unit("tokens")] = Field(
        description="pooling along time, x, y and z at the start of stages 2, 3, ..."
    )
    local_stages: Annotated[int, Unit("stages")] = Field(
        2, ge=1, description="stages whose attention stays inside mask units"
    )
    mlp_ratio: Annotated[float, Unit("ratio")] = Field(
        4.0, gt=0, le=64, description="hidden channels of an MLP, relative to its input"
    )
    predictor: PredictorSettings = PredictorSettings()

    @model_validator(mode="after")
    def _consistent(self) -> ModelSettings:
        if min(self.depths) < 1:
            raise Contradiction("depths", list(self.depths), "1 or more blocks in each stage")
        if sum(self.depths) > MOST_BLOCKS:
            raise Contradiction("depths", list(self.depths), f"at most {MOST_BLOCKS} blocks in all")
        if self.embed % self.heads:
            raise Contradiction("heads", self.heads, f"a divisor of embed, {self.embed}")
        if self.local_stages > len(self.depths):
            expected = f"at most {len(self.depths)}, the number of stages in depths"
            raise Contradiction("local_stages", self.local_stages, expected)
        if len(self.strides) > len(self.depths) - 1:
            expected = f"at most {len(self.depths) - 1}, one for every stage except the first"
            raise Contradiction("strides", f"{len(self.strides)} strides", expected)
        return self


PRESETS: dict[str, ModelSettings] = {
    # the sizes of arXiv 2512.21881
    "published": ModelSettings(
        embed=64, heads=1, depths=(2, 3, 16, 3), unit=(8, 8, 8, 8), strides=((2, 2, 2, 2), (2, 2, 2, 2))
    ),
    # mask units are aligned with windows of 5 frames, which halves the FLOPs of a step
    "lean": ModelSettings(
        embed=64, heads=1, depths=(2, 3, 16, 3), unit=(5, 4, 4, 4), strides=((5, 2, 2, 2), (1, 2, 2, 2))
    ),
    "large": ModelSettings(
        embed=192,
        heads=3,
        depths=(2, 3, 16, 3),
        unit=(8, 8, 8, 8),
        strides=((2, 2, 2, 2), (2, 2, 2, 2)),
        predictor=PredictorSettings(width=384, depth=6, heads=12),
    ),
    # for coarse grids (8 mm, 6 x 6 x 6 patches), tests and first trials
    "tiny": ModelSettings(
        embed=32,
        heads=2,
        depths=(1, 2, 1),
        unit=(5, 2, 2, 2),
        strides=((5, 1, 1, 1),),
        local_stages=1,
        predictor=PredictorSettings(width=64, depth=2, heads=4),
    ),
}
