"""Notes which settings the code reads, in every Python process that has this folder on its path.

A line for each, `RunSettings.batch`, goes to a file of the process in the folder `NOTED_READS`. What a setting's own
check reads, pydantic or a whole `model_dump`, is no use of it and is not noted.
"""

from __future__ import annotations

import os
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

_NOTED = Path(os.environ["NOTED_READS"])


class _Finder(MetaPathFinder):
    """Has the base of all settings note once it is loaded."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name != "shards.core.settings":
            return None
        sys.meta_path.remove(self)
        spec = PathFinder.find_spec(name, path)
        assert spec is not None and spec.loader is not None
        load = spec.loader.exec_module

        def load_and_note(module: ModuleType) -> None:
            load(module)
            _note_reads(module.Settings)

        spec.loader.exec_module = load_and_note  # type: ignore[method-assign]
        return spec


def _note_reads(base: type) -> None:
    noted: set[str] = set()

    def get(self: Any, name: str) -> Any:
        kind = type(self)
        if name[0] != "_" and name in kind.__pydantic_fields__:
            code, checks = sys._getframe(1).f_code, kind.__pydantic_decorators__
            is_check = code.co_name in {*checks.field_validators, *checks.model_validators}
            owner = next(one for one in reversed(kind.__mro__) if name in getattr(one, "__pydantic_fields__", ()))
            field = f"{owner.__name__}.{name}"
            if field not in noted and not is_check and "/pydantic/" not in code.co_filename:
                noted.add(field)
                with open(_NOTED / str(os.getpid()), "a", encoding="utf-8") as file:
                    file.write(f"{field}\n")
        return object.__getattribute__(self, name)

    base.__getattribute__ = get  # type: ignore[method-assign]


sys.meta_path.insert(0, _Finder())
