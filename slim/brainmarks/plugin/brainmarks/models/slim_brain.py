"""Register `slim_brain` in Brainmarks; installed as `brainmarks/models/slim_brain.py`, where the suite finds it.

python -m brainmarks.main_logistic slim_brain patch DATASET --overrides model_kwargs.source=EXPORT
"""

from __future__ import annotations

import sys
from typing import Any

from brainmarks.models.registry import register_model

from shards.core.cli import WRONG
from shards.core.errors import UserError
from slim.brainmarks.constructor import make
from slim.brainmarks.token_model import TokenModel
from slim.brainmarks.transform import ScanTransform


@register_model
def slim_brain(**arguments: Any) -> tuple[ScanTransform, TokenModel]:
    """A pretrained encoder; the arguments are those of `slim.brainmarks.constructor.PluginSettings`."""
    try:
        return make(**arguments)
    except UserError as error:  # the suite would print it below a traceback
        print(f"error: {error.line()}", file=sys.stderr)
        raise SystemExit(WRONG) from None
