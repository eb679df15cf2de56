"""The labels of a fine-tuning run: those of its training and validation subjects only.

    RUN/answers.json    number of classes, and for each session in `train` and `val`: [subject, class or value]

The training processes read this file and the samples it names. They do not see sessions of test subjects, nor other
labels of the dataset.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from shards.core.errors import ConfigError
from shards.core.files import dump, write_atomically
from shards.core.settings import digest
from shards.format.reader import Dataset
from slim.checkpoints.run_folder import ANSWERS


@dataclass(frozen=True)
class Answers:
    """The labels of the training and validation sessions.

    Attributes
    ----------
    classes : int
        K; 0 for a regression.
    train, val : dict
        For each session, by key: the number of its subject, and its class or value.
    """

    classes: int
    train: dict[str, tuple[int, float]]
    val: dict[str, tuple[int, float]]

    def write(self, folder: Path) -> None:
        """Write RUN/answers.json."""
        write_atomically(folder / ANSWERS, dump(asdict(self)))

    @classmethod
    def read(cls, folder: Path) -> Answers:
        """Read RUN/answers.json; raises ConfigError if slim-brain finetune has not written it."""
        path = folder / ANSWERS
        try:
            return cls(**json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise ConfigError(
                path, "", error, "the answers that slim-brain finetune writes", "Start it again"
            ) from None

    @property
    def outputs(self) -> int:
        """Number of outputs of a model: one for each class, or one for a value."""
        return max(1, self.classes)

    @property
    def guess(self) -> float:
        """Validation loss of guessing: equal probabilities, or the mean of the training values."""
        if self.classes:
            return math.log(self.classes)
        return float(np.mean([answer**2 for answer in dict(self.val.values()).values()]))

    def digest(self) -> str:
        """Hash of all labels."""
        return digest(asdict(self))

    def open(self, path: str) -> Dataset:
        """Open a dataset with only these sessions, and without labels."""
        dataset = Dataset(path)
        split_of = dict.fromkeys(self.train, "train") | dict.fromkeys(self.val, "val")
        missing = split_of.keys() - {session.key for session in dataset.sessions}
        if missing:
            raise ConfigError(
                path,
                "sessions",
                f"none of key {min(missing)}",
                "all that the answers name",
                "Start slim-brain finetune again",
            )
        dataset.sessions = [
            session.model_copy(update={"split": split_of[session.key], "labels": {}})
            for session in dataset.sessions
            if session.key in split_of
        ]
        return dataset

    def class_weights(self) -> np.ndarray:
        """Weight of a session of each class, (K,), that gives all classes equal weight; the mean over sessions is 1."""
        count_K = np.bincount([int(answer) for _, answer in self.train.values()], minlength=self.classes)
        return len(self.train) / (self.classes * np.maximum(count_K, 1))
