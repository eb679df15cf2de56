"""Provenance of a run: commit and versions of the software, and the settings that it chose automatically.

    RUN/provenance.json    {"commit": "5e1f...", "software": "0.1.0", "versions": {"torch": "2.10.0", ...},
                            "chosen": {"loss.sig_samples": 8}}

The file is written whenever a run is started or resumed, and copied into every checkpoint. Version 0.1 did not write
it; its commit and versions are read from the comments in config.yaml.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, JsonValue, StrictInt, StrictStr

from shards.core.files import dump, write_atomically
from shards.core.settings import check
from slim.checkpoints.checkpoint import CheckpointError
from slim.checkpoints.run_folder import CONFIG, PROVENANCE

UNKNOWN = "unknown"
_COMMENT = re.compile(r"^# (commit|\w+(?= \d+\.)) (\S+)$", re.MULTILINE)
_MOST_BYTES = 1 << 20
_AGAIN = "Copy or download the folder again"

Text = Annotated[StrictStr, Field(max_length=500)]


class Ancestor(BaseModel):
    """The weights that a run began with.

    Attributes
    ----------
    source : str
        As the user named it: a folder, or a name on the hub.
    run : str
        Name of the run that made them.
    step : int
    weights : "encoder" or "target"
    commit : str
        Commit of the software that made them.
    checksum : str
        SHA-256 of RUN/start.safetensors.
    before : Ancestor, optional
        The weights that this run had begun with.
    """

    model_config = ConfigDict(extra="ignore", frozen=True)

    source: Text
    run: Text
    step: Annotated[StrictInt, Field(ge=0)]
    weights: Text
    commit: Text = UNKNOWN
    checksum: Text
    before: Ancestor | None = None

    def line(self) -> list[Ancestor]:
        """These weights, those that their run had begun with, and so on."""
        return [self, *(self.before.line() if self.before is not None else [])]


class Provenance(BaseModel):
    """The content of provenance.json.

    Attributes
    ----------
    commit : str
        Commit of this software, with `+` if its files have changes; `unknown` if git does not track them.
    software : str
        Version of slim-brain; `unknown` for runs of version 0.1.
    versions : dict of str to str
        Versions of torch, deepspeed, numpy and zarr.
    chosen : dict
        Settings that the software changed or filled in, with their values.
    init : Ancestor, optional
        The weights that the run began with; None if they were random.
    """

    model_config = ConfigDict(extra="ignore", frozen=True)

    commit: Text = UNKNOWN
    software: Text = UNKNOWN
    versions: dict[Text, Text] = Field(default_factory=dict, max_length=1000)
    chosen: dict[Text, JsonValue] = Field(default_factory=dict, max_length=1000)
    init: Ancestor | None = None

    def write(self, folder: Path) -> None:
        """Write FOLDER/provenance.json."""
        write_atomically(folder / PROVENANCE, dump(self.model_dump(mode="json")) + "\n")

    @classmethod
    def read(cls, folder: Path) -> Provenance:
        """Read the provenance of a run or a checkpoint.

        Raises
        ------
        CheckpointError
            If the file is too large or has other content.
        """
        path = folder / PROVENANCE
        if not path.is_file():
            return cls._of_comments((folder / CONFIG).read_text(encoding="utf-8"))
        try:
            if path.stat().st_size > _MOST_BYTES:
                raise ValueError(f"more than {_MOST_BYTES} bytes")
            tree = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise CheckpointError(path, "", f"unreadable ({error!r})", "a JSON object", _AGAIN) from None
        return check(cls, tree, path, CheckpointError)

    @classmethod
    def _of_comments(cls, text: str) -> Provenance:
        """Read the comments `# commit HASH`, `# numpy 2.4.6`, ... in a config.yaml of version 0.1."""
        notes = dict(_COMMENT.findall(text))
        return cls(commit=notes.pop("commit", UNKNOWN), versions=notes)

    def named(self) -> dict[str, str]:
        """All versions, with the version of slim-brain if it is known."""
        own = {} if self.software == UNKNOWN else {"slim-brain": self.software}
        return {**self.versions, **own}

    def comments(self) -> str:
        """The provenance as YAML comments, for readers of config.yaml."""
        lines = (f"# {name} {number}\n" for name, number in sorted(self.named().items()))
        return f"# merged configuration\n# commit {self.commit}\n{''.join(lines)}"
