"""Packages that only some commands need, and the extra of this software that installs each of them."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.util import find_spec

from shards.core.errors import UserError

# By the name that is imported; `[project.optional-dependencies]` of pyproject.toml has the versions.
EXTRAS = {
    "deepspeed": "train",
    "webdataset": "train",
    "wandb": "train",
    "peft": "lora",
    "submitit": "slurm",
    "matplotlib": "report",
    "PIL": "report",
    "plotly": "report",
    "huggingface_hub": "hub",
    "aiohttp": "http",
    "s3fs": "s3",
}


class ExtraMissing(UserError, ImportError):
    """A package of an extra is not installed.

    Parameters
    ----------
    modules : iterable of str
        Names of `EXTRAS`.
    """

    def __init__(self, modules: Iterable[str]):
        self.modules = tuple(modules)
        extras = ",".join(sorted({EXTRAS[name] for name in self.modules}))
        hint = f"Install it: pip install 'slim-brain[{extras}]'"
        super().__init__(", ".join(self.modules), "", "no such package", "an installed one", hint)

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.modules,)


def require(*modules: str) -> None:
    """Raise ExtraMissing if one of these modules is not installed; none of them is imported."""
    if missing := [name for name in modules if find_spec(name) is None]:
        raise ExtraMissing(missing)
