"""Code that processes of a run carry out around each step, put there from outside."""

from __future__ import annotations

import textwrap
from pathlib import Path

_HOOK = """
import importlib.abc, importlib.machinery, json, os, sys, time
class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != "slim.training.skipped":
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        load = spec.loader.exec_module
        def exec_module(module):
            load(module)
            original = module.Skipped.step
            def step(self, number, skipped, keys):
{body}
                return original(self, number, skipped, keys)
            module.Skipped.step = step
        spec.loader.exec_module = exec_module
        return spec
sys.meta_path.insert(0, Finder())
"""


def at_each_step(folder: Path, body: str) -> None:
    """Have every process with this folder on PYTHONPATH run `body` at each step; it sees `number` and `keys` of it."""
    folder.mkdir(exist_ok=True)
    (folder / "sitecustomize.py").write_text(_HOOK.format(body=textwrap.indent(textwrap.dedent(body), " " * 16)))
