"""Make the transform and the model from the arguments of Brainmarks (`--overrides model_kwargs.NAME=VALUE`)."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import Field

from shards.core.errors import ConfigError
from shards.core.settings import PathText, Settings, Unit, check
from slim.brainmarks.template import Template
from slim.brainmarks.token_model import TokenModel
from slim.brainmarks.transform import Converter, ScanTransform
from slim.inference.slim_brain import SlimBrain

SOURCE = "SLIM_BRAINMARKS_SOURCE"
_WHERE = "model_kwargs"


class PluginSettings(Settings):
    """The arguments of `slim_brain`."""

    source: str | None = Field(None, description=f"a run, an export or OWNER/NAME on the hub; by default ${SOURCE}")
    weights: Literal["encoder", "target"] | None = Field(None, description="as in SlimBrain.from_pretrained")
    extractor: PathText | None = Field(None, description="as in SlimBrain.from_pretrained")
    parcels: PathText | None = Field(None, description="as in SlimBrain.from_pretrained")
    windows: Annotated[int, Unit("windows")] = Field(8, ge=1, description="number of most salient windows used")
    components: Annotated[int, Unit("axes")] = Field(
        3, ge=0, description="principal axes of `cov`, the representation cls; 0 for none, which needs no fit"
    )
    fit_scans: Annotated[int, Unit("scans")] = Field(
        64, ge=1, description="training scans on which they are fitted, spread over the training split"
    )
    memory: PathText | None = Field(None, description="folder where converted scans are kept between epochs and calls")


def make(**arguments: Any) -> tuple[ScanTransform, TokenModel]:
    """The transform and the model.

    Parameters
    ----------
    **arguments
        See `PluginSettings`.

    Raises
    ------
    ConfigError, CheckpointError
        If an argument is unknown or wrong, there is no source, or the template or a file of the weights is missing.
    """
    settings = check(PluginSettings, arguments, _WHERE)
    source = settings.source or os.environ.get(SOURCE)
    if not source:
        hint = f"Give --overrides {_WHERE}.source=EXPORT, or set {SOURCE}"
        raise ConfigError(_WHERE, "source", "nothing", "a run, an export or OWNER/NAME on the hub", hint)
    model = SlimBrain.from_pretrained(source, settings.weights, settings.extractor, settings.parcels)
    model.require_dropped("the model of Brainmarks")
    recipe, template = model.recipe, Template.fetch()
    windows = recipe.settings.windows.model_copy(update={"keep": settings.windows})
    recipe = replace(recipe, settings=recipe.settings.model_copy(update={"windows": windows}))
    places = template.places(recipe.settings.grid.grid(), model.geometry)
    tokens = TokenModel(model, places, settings.windows, settings.components)
    return ScanTransform(Converter(recipe, template, settings.memory), tokens, settings.fit_scans), tokens
