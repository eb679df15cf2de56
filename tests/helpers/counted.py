"""The middle preset of the counts: large enough for segments, small enough for a test."""

from __future__ import annotations

import numpy as np

from slim.config import PRESETS, ModelSettings, PredictorSettings, PretrainSettings
from slim.model.geometry import Geometry
from slim.model.inputs import Batch
from slim.planning.step_cost import make_batch

# Wide enough that nearly all memory lies in tensors far larger than 512 bytes.
MIDDLE = ModelSettings(
    embed=32,
    heads=2,
    depths=(1, 2, 2),
    unit=(5, 4, 4, 4),
    strides=((5, 2, 2, 2),),
    predictor=PredictorSettings(width=96, depth=2, heads=3),
)


def settings(**other) -> PretrainSettings:
    given = {"data": "x", "model": PRESETS["tiny"], "precision": "fp32", "chunk_tokens": None, "windows": {"k": 2}}
    return PretrainSettings(**given | {"run": {"out": "x", "batch": 1}} | other)


def prepared(settings: PretrainSettings, patches: int = 6) -> tuple[Geometry, Batch]:
    """Geometry, and a batch of one box of a brain on a cubic grid of so many patches."""
    geometry = Geometry((settings.windows.k * 5, *[patches] * 3), settings.model.unit, settings.model.strides)
    brain_XYZ = np.zeros([patches * 4] * 3, bool)
    brain_XYZ[4:-4, 3:-2, 5 : -patches - 1] = True
    return geometry, make_batch(settings, geometry, brain_XYZ)


def zero_settings(
    stage: int, accumulate: int = 1, processes: int = 1, model: ModelSettings = MIDDLE
) -> PretrainSettings:
    run = {"out": "x", "batch": 1, "accumulate": accumulate, "processes": processes}
    return settings(model=model, zero={"stage": stage}, run=run)
