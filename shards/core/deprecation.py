"""Deprecated names: they keep working, with a warning."""

from __future__ import annotations

import warnings
from typing import Any


def warn_renamed(old: str, new: str, stacklevel: int = 3) -> None:
    """Warn that a name is deprecated; by default at the line that called the caller."""
    warnings.warn(f"{old} is deprecated; use {new}", DeprecationWarning, stacklevel=stacklevel)


class OldName:
    """A read-only attribute that returns the value of another attribute, with a DeprecationWarning.

    Parameters
    ----------
    new : str
        Name of the attribute with the value.
    """

    def __init__(self, new: str):
        self.new = new

    def __set_name__(self, owner: type, name: str) -> None:
        self.old = name

    def __get__(self, instance: Any, owner: type) -> Any:
        if instance is None:
            return self
        value = getattr(instance, self.new)
        warn_renamed(f"{owner.__name__}.{self.old}", self.new)
        return value

    def __set__(self, instance: Any, value: Any) -> None:
        raise AttributeError(f"{self.old} is read-only; set {self.new}")


def renamed_state(kind: type, state: dict[str, object]) -> dict[str, object]:
    """Rename attributes in the state of an object that was pickled with their older names."""
    new = {name: old.new for name, old in vars(kind).items() if isinstance(old, OldName)}
    return {new.get(name, name): value for name, value in state.items()}
