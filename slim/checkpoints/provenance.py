"""Where a run comes from: the commit and the versions of the software, and the settings it chose for the user.

    RUN/provenance.json    {"commit": "5e1f...", "software": "0.1.0", "versions": {"torch": "2.10.0", ...},
                            "chosen": {"loss.sig_samples": 8}}

It is written whenever a run begins or goes on, and copied into every checkpoint. Version 0.1 wrote no such file: its
commit and versions stand in comments above the merged configuration, and are read from there.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, JsonValue, StrictStr

from shards.core.files import dump, write_atomically
from shards.core.settings import check
from slim.checkpoints.checkpoint import CheckpointError
from slim.checkpoints.run_folder import CONFIG, PROVENANCE

UNKNOWN = "unknown"
_COMMENT = re.compile(r"^# (commit|\w+(?= \d+\.)) (\S+)$", re.MULTILINE)
_MOST_BYTES = 1 << 20
_AGAIN = "Copy or download the folder again"

Text = Annotated[StrictStr, Field(max_length=500)]


class Provenance(BaseModel):
    """What is in provenance.json.

    Attributes
    ----------
    commit : str
        Of this software, with `+` if its files have changes; `unknown` where git does not track them.
    software : str
        Version of slim-brain; `unknown` of a run of version 0.1.
    versions : dict of str to str
        Of torch, deepspeed, numpy and zarr.
    chosen : dict
        Settings of the run that differ from those asked for, with the values that were chosen.
    """

    model_config = ConfigDict(extra="ignore", frozen=True)

    commit: Text = UNKNOWN
    software: Text = UNKNOWN
    versions: dict[Text, Text] = Field(default_factory=dict, max_length=1000)
    chosen: dict[Text, JsonValue] = Field(default_factory=dict, max_length=1000)

    def write(self, folder: Path) -> None:
        """To FOLDER/provenance.json."""
        write_atomically(folder / PROVENANCE, dump(self.model_dump(mode="json")) + "\n")

    @classmethod
    def read(cls, folder: Path) -> Provenance:
        """That of a run or a checkpoint.

        Raises
        ------
        CheckpointError
            If the file is too large or holds something else.
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
        """From `# commit HASH`, `# numpy 2.4.6`, ... in the config.yaml of version 0.1."""
        notes = dict(_COMMENT.findall(text))
        return cls(commit=notes.pop("commit", UNKNOWN), versions=notes)

    def named(self) -> dict[str, str]:
        """All versions, with that of this software where it is known."""
        own = {} if self.software == UNKNOWN else {"slim-brain": self.software}
        return {**self.versions, **own}

    def comments(self) -> str:
        """The same for people who read config.yaml, above the settings there."""
        lines = (f"# {name} {number}\n" for name, number in sorted(self.named().items()))
        return f"# merged configuration\n# commit {self.commit}\n{''.join(lines)}"
