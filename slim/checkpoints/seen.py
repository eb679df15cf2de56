"""Who was seen in training, person by person.

    RUN/seen.json    {"people": ["hcp/100307", ...], "salt": null, "sessions": [857, 120]}

A person is `people/subject`, as a cohort file names them, so somebody is recognised in another dataset, or in one that
has grown. The file is written before the first step and copied into every checkpoint; `sessions` counts the training
sessions of each dataset. An export keeps salted hashes in place of names. A hash does not tell its name, but whoever
has a list of names, or guesses one, can test it against the hashes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shards.core.errors import ConfigError
from shards.core.files import dump, write_atomically
from shards.format.session_record import SessionRecord
from slim.checkpoints.run_folder import SEEN

_DIGITS = 24  # of a hash: 96 bits

Person = tuple[str, str]  # people, subject


@dataclass(frozen=True)
class Seen:
    """The people whose sessions were trained on.

    Attributes
    ----------
    people : frozenset of str
        `people/subject` of each, or its hash.
    salt : str or None
        What the hashes begin with; None where `people` are names.
    sessions : tuple of int
        Training sessions of each dataset of the run; empty where that is not known.
    """

    people: frozenset[str]
    salt: str | None = None
    sessions: tuple[int, ...] = ()

    @classmethod
    def of(cls, sessions: Sequence[Iterable[SessionRecord]]) -> Seen:
        """Of the training sessions of each dataset."""
        parts = [[*part] for part in sessions]
        names = frozenset(_name(session.person) for part in parts for session in part)
        return cls(names, None, tuple(map(len, parts)))

    def has(self, who: Person) -> bool:
        """Whether a person is among them."""
        name = _name(who)
        return (name if self.salt is None else _hash(self.salt, name)) in self.people

    def hashed(self, salt: str) -> Seen:
        """Without names; as it is where it has none."""
        if self.salt is not None:
            return self
        return Seen(frozenset(_hash(salt, name) for name in self.people), salt, self.sessions)

    def tree(self) -> dict[str, Any]:
        """For JSON."""
        return {"people": sorted(self.people), "salt": self.salt, "sessions": list(self.sessions)}

    @classmethod
    def from_tree(cls, tree: Any, where: str | Path) -> Seen:
        """From `tree`; ConfigError names `where`."""
        try:
            people, salt, sessions = tree["people"], tree["salt"], tree["sessions"]
            if not (isinstance(salt, str | None) and isinstance(people, list)):
                raise TypeError("people that are no list")
            if not all(isinstance(name, str) for name in people):
                raise TypeError("people that are no text")
            if not all(type(count) is int and 0 <= count < 2**53 for count in sessions):
                raise TypeError("sessions that are no counts")
            return cls(frozenset(people), salt, tuple(sessions))
        except (KeyError, TypeError, ValueError) as error:
            got = f"no list of people ({error!r})"
            raise ConfigError(where, "people", got, "who was seen in training", "Copy the folder again") from None

    def write(self, folder: Path) -> None:
        """To FOLDER/seen.json."""
        write_atomically(folder / SEEN, dump(self.tree()) + "\n")

    @classmethod
    def read(cls, folder: Path) -> Seen | None:
        """From FOLDER/seen.json; None where there is none, as in runs of version 0.1."""
        path = folder / SEEN
        if not path.is_file():
            return None
        try:
            tree = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError, OSError) as error:
            raise ConfigError(path, "", f"no JSON ({error})", "who was seen in training") from None
        return cls.from_tree(tree, path)


def _name(who: Person) -> str:
    return "/".join(who)


def _hash(salt: str, name: str) -> str:
    return hashlib.sha256(f"{salt}/{name}".encode()).hexdigest()[:_DIGITS]
