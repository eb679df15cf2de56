"""The subjects seen in training.

    RUN/seen.json    {"people": ["hcp/100307", ...], "salt": null, "sessions": [857, 120]}

A subject is written as `people/subject`, where `people` is the name of the population in the cohort file. The same
subject is therefore recognised in another dataset. A run that began with the weights of another has the subjects of
that run under `before`. The file is written before the first step and copied into every checkpoint; `sessions` counts
the training sessions of each dataset. An export has salted hashes instead of names. The names cannot be read from the
hashes, but anyone who has or guesses a name can test it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from shards.core.errors import ConfigError
from shards.core.files import dump, write_atomically
from shards.format.session_record import SessionRecord
from slim.checkpoints.run_folder import SEEN

_DIGITS = 24  # hexadecimal digits of a hash: 96 bits

Person = tuple[str, str]  # people, subject


@dataclass(frozen=True)
class Seen:
    """The subjects seen in training.

    Attributes
    ----------
    people : frozenset of str
        `people/subject` for each subject, or its hash.
    salt : str or None
        Salt of the hashes; None if `people` holds names.
    sessions : tuple of int
        Number of training sessions of each dataset; empty if unknown.
    before : Seen, optional
        The subjects seen by the weights that the run began with.
    """

    people: frozenset[str]
    salt: str | None = None
    sessions: tuple[int, ...] = ()
    before: Seen | None = None

    @classmethod
    def of(cls, sessions: Sequence[Iterable[SessionRecord]]) -> Seen:
        """Collect the subjects from the training sessions of each dataset."""
        parts = [[*part] for part in sessions]
        names = frozenset(_name(session.person) for part in parts for session in part)
        return cls(names, None, tuple(map(len, parts)))

    def has(self, who: Person) -> bool:
        """Whether this subject was seen in training, or by the weights that it began with."""
        name = _name(who)
        mine = (name if self.salt is None else _hash(self.salt, name)) in self.people
        return mine or (self.before is not None and self.before.has(who))

    @property
    def count(self) -> int:
        """Number of subjects. Someone whose name is hashed differently in the weights before is counted twice."""
        listed: set[tuple[str | None, str]] = set()
        part: Seen | None = self
        while part is not None:
            listed |= {(part.salt, name) for name in part.people}
            part = part.before
        return len(listed)

    def hashed(self, salt: str) -> Seen:
        """Replace names by salted hashes; without effect if they are hashes already."""
        before = None if self.before is None else self.before.hashed(salt)
        if self.salt is not None:
            return replace(self, before=before)
        return Seen(frozenset(_hash(salt, name) for name in self.people), salt, self.sessions, before)

    def tree(self) -> dict[str, object]:
        """The attributes as JSON-serialisable data."""
        found: dict[str, object] = {"people": sorted(self.people), "salt": self.salt, "sessions": list(self.sessions)}
        return found if self.before is None else found | {"before": self.before.tree()}

    @classmethod
    def from_tree(cls, tree: Any, where: str | Path) -> Seen:
        """Read the result of `tree`; errors name `where`."""
        try:
            people, salt, sessions = tree["people"], tree["salt"], tree["sessions"]
            if not (isinstance(salt, str | None) and isinstance(people, list)):
                raise TypeError("`people` is not a list")
            if not all(isinstance(name, str) for name in people):
                raise TypeError("`people` has an entry that is not text")
            if not all(type(count) is int and 0 <= count < 2**53 for count in sessions):
                raise TypeError("`sessions` is not a list of counts")
            before = None if tree.get("before") is None else cls.from_tree(tree["before"], where)
            return cls(frozenset(people), salt, tuple(sessions), before)
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            got = f"an invalid list of subjects ({error!r})"
            expected = "the subjects seen in training"
            raise ConfigError(where, "people", got, expected, "Copy the folder again") from None

    def write(self, folder: Path) -> None:
        """Write FOLDER/seen.json."""
        write_atomically(folder / SEEN, dump(self.tree()) + "\n")

    @classmethod
    def read(cls, folder: Path) -> Seen | None:
        """Read FOLDER/seen.json; None if it does not exist, as in runs of version 0.1."""
        path = folder / SEEN
        if not path.is_file():
            return None
        try:
            tree = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError, OSError) as error:
            expected = "JSON with the subjects seen in training"
            raise ConfigError(path, "", f"invalid JSON ({error})", expected, "Copy the folder again") from None
        return cls.from_tree(tree, path)


def _name(who: Person) -> str:
    return "/".join(who)


def _hash(salt: str, name: str) -> str:
    return hashlib.sha256(f"{salt}/{name}".encode()).hexdigest()[:_DIGITS]
