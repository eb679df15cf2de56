"""A callback in the processes of a run, by the documented way: `SLIM_CALLBACKS`."""

from __future__ import annotations

import os
import textwrap
from pathlib import Path

_MODULE = """
import json, os, sys, time
from slim.training.callbacks import Callback

class AtEachStep(Callback):
    def on_step(self, step):
        number, keys = step.number, step.keys
{body}
"""


def at_each_step(folder: Path, body: str) -> dict[str, str]:
    """The environment in which every process of a run carries out `body` at each step; it sees `number` and `keys`."""
    folder.mkdir(exist_ok=True)
    (folder / "step_hook.py").write_text(_MODULE.format(body=textwrap.indent(textwrap.dedent(body), " " * 8)))
    path = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {"PYTHONPATH": path, "SLIM_CALLBACKS": "step_hook:AtEachStep"}
