"""Configurations that ship with this software and are found by name: `lean`, `hcp_sex`.

They lie in the folder `configs/` of a checkout. `shards/configs` is a link to it, so that they are data of an installed
package, too.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from shards.core.cli import call_of
from shards.core.errors import ConfigError, did_you_mean
from shards.core.files import printable

Kind = Literal["pretrain", "cohort", "task", "slurm", "model"]
KINDS: tuple[Kind, ...] = get_args(Kind)
FOLDER = (Path(__file__).parents[1] / "configs").resolve()
_FOLDERS: dict[Kind, tuple[str, ...]] = {
    "pretrain": ("pretrain", "."),
    "cohort": ("cohorts",),
    "task": ("downstream",),
    "slurm": ("slurm",),
    "model": ("model",),
}
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A configuration that ships with this software.

    Attributes
    ----------
    description : str
        The first line of its file, a comment.
    """

    kind: Kind
    name: str
    path: Path
    description: str


def presets(kind: Kind) -> dict[str, Preset]:
    """Those of a kind by name, in alphabetical order."""
    found = {}
    for path in sorted(path for folder in _FOLDERS[kind] for path in (FOLDER / folder).glob("*.yaml")):
        with open(path, encoding="utf-8") as file:
            line = file.readline()
        found[path.stem] = Preset(kind=kind, name=path.stem, path=path, description=line.lstrip("#").strip())
    return dict(sorted(found.items()))


def find(kind: Kind, given: str | Path, field: str) -> Path:
    """The file that a user names: a path, or the name of a preset.

    A file of that path is taken before a preset of that name, with a warning in the log.

    Parameters
    ----------
    kind : {"pretrain", "cohort", "task", "slurm", "model"}
    given : str or Path
    field : str
        The option or argument, for errors.

    Raises
    ------
    ConfigError
        If it is neither.
    """
    text, path, known = str(given), Path(given), presets(kind)
    if os.path.isfile(text):
        if text in known:
            _LOG.warning("%s: the file of this name is used, not the preset; ./%s says so", text, text)
        return path
    if text in known:
        return known[text].path
    if os.path.lexists(text):  # a folder, or a link to nowhere: told by whoever reads it
        return path
    hint = did_you_mean(path.stem, known, f"{call_of('config', '--list')} says what each is for")
    expected = f"a YAML file, or one of {', '.join(known)}"
    if path.suffix or len(path.parts) > 1:
        raise ConfigError(printable(text), "", "no such file", expected, hint)
    raise ConfigError("command line", field, text, expected, hint)
