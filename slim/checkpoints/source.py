"""What a user can give as weights: a path, or a name on the Hugging Face hub. It is checked without importing torch."""

from __future__ import annotations

import re
from pathlib import Path

from shards.core.errors import ConfigError
from slim.checkpoints.run_folder import BEST, CHECKPOINTS, LATEST

HUB_NAME = re.compile(r"([\w.-]+/([\w.-]+))(?:@([\w./-]+))?")  # OWNER/NAME, or OWNER/NAME@REVISION
ACCEPTED = "a run, one of its checkpoints, an exported folder, or OWNER/NAME[@REVISION] on the Hugging Face hub"


def is_on_hub(source: str | Path) -> bool:
    """Whether weights are named as on the hub, and no folder on this machine can be meant."""
    return isinstance(source, str) and HUB_NAME.fullmatch(source) is not None and not Path(source).parent.exists()


def names_checkpoint(path: Path) -> bool:
    """Whether a file names a checkpoint beside it: RUN/checkpoints/latest, or best."""
    return path.name in (LATEST, BEST) and path.parent.name == CHECKPOINTS and path.is_file()


def require_weights(source: str | Path) -> None:
    """Raise ConfigError if weights are neither a folder nor a name on the hub."""
    if not Path(source).is_dir() and not names_checkpoint(Path(source)) and not is_on_hub(source):
        raise ConfigError(source, "", "no such folder", ACCEPTED)
