"""Small inputs of the encoder."""

from __future__ import annotations

import numpy as np

from slim.config import ModelSettings, PretrainSettings, TokenMaskSettings
from slim.data.collate import collate
from slim.data.masking import draw
from slim.data.samples import Sample, cell_sizes
from slim.model.geometry import Geometry, geometry_of
from slim.model.inputs import Batch

V = 8

SIZES = ModelSettings(
    embed=16, heads=2, depths=(1, 2, 2), unit=(4, 4, 4, 4), strides=((2, 2, 2, 2), (2, 1, 1, 1)), local_stages=2
)

GLOBAL = SIZES.model_copy(update={"local_stages": 1})  # its second pooling happens where attention is global

GEOMETRY = geometry_of(SIZES, (8, 4, 4, 8))


def make_sample(seed: int, brain: float = 0.35, geometry: Geometry = GEOMETRY, frames: int | None = None) -> Sample:
    """A random sample; with fewer frames than the geometry, one of a short session."""
    rng = np.random.default_rng(seed)
    frames, places = frames or geometry.tokens[0], int(np.prod(geometry.tokens[1:]))
    place = np.sort(rng.choice(places, max(2, int(brain * places)), replace=False))
    n = len(place)
    return Sample(
        f"s{seed}",
        0,
        rng.standard_normal((frames, n, V)).astype(np.float32),
        rng.standard_normal((n, V)).astype(np.float32),
        rng.random((n, V)).astype(np.float32) + 0.5,
        np.ones((n, V), np.uint8),
        place,
        (seed * 7.3 + np.arange(frames) * 0.72).astype(np.float32),
    )


def settings(**other: object) -> PretrainSettings:
    return PretrainSettings(data="x", model=SIZES, precision="fp32", run={"out": "x"}, **other)  # type: ignore[arg-type]


def masked(sample: Sample, epoch: int = 0) -> Sample:
    """The sample, with a mask."""
    size_SL = cell_sizes(GEOMETRY, sample.place, len(sample.second))
    sample.mask = draw(size_SL, TokenMaskSettings(), 0, epoch, sample.key)
    return sample


def make_batch(*seeds: int, epoch: int = 0) -> Batch:
    return collate([masked(make_sample(seed), epoch) for seed in seeds], GEOMETRY, 100)
