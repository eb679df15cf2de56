"""The answers a fine-tuning run is given: those of its training and validation subjects, and of nobody else.

    RUN/answers.json    how many classes, and of each session in `train` and `val`: [subject, answer]

Whoever trains reads this file and the samples it names. Sessions of test subjects do not exist for it, nor does any
label of the dataset.
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
    """What is to be learned.

    Attributes
    ----------
    classes : K; 0 in a regression
    train, val : of each session, by key: number of its subject, and its class or value
    """

    classes: int
    train: dict[str, tuple[int, float]]
    val: dict[str, tuple[int, float]]

    def write(self, folder: Path) -> None:
        """To RUN/answers.json."""
        write_atomically(folder / ANSWERS, dump(asdict(self)))

    @classmethod
    def read(cls, folder: Path) -> Answers:
        """Raises ConfigError where tools/finetune.py has left none."""
        path = folder / ANSWERS
        try:
            return cls(**json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise ConfigError(path, "", error, "the answers that tools/finetune.py writes", "Start it again") from None

    @property
    def outputs(self) -> int:
        """Numbers a model says of a sample: one for each class, or the value."""
        return max(1, self.classes)

    @property
    def guess(self) -> float:
        """`slim.finetune.task.validation_loss` of equal chances, or of the mean of those fitted on."""
        if self.classes:
            return math.log(self.classes)
        return float(np.mean([answer**2 for answer in dict(self.val.values()).values()]))

    def digest(self) -> str:
        """Hash of all of it."""
        return digest(asdict(self))

    def open(self, path: str) -> Dataset:
        """The dataset as far as these answers go: other sessions and all labels are left out."""
        dataset = Dataset(path)
        split_of = dict.fromkeys(self.train, "train") | dict.fromkeys(self.val, "val")
        missing = split_of.keys() - {session.key for session in dataset.sessions}
        if missing:
            raise ConfigError(
                path, "sessions", f"none of key {min(missing)}", "all that the answers name", "Start finetune.py again"
            )
        dataset.sessions = [
            session.model_copy(update={"split": split_of[session.key], "labels": {}})
            for session in dataset.sessions
            if session.key in split_of
        ]
        return dataset

    def class_weights(self) -> np.ndarray:
        """Times a session of each class counts, (K,), so that all classes count alike; mean 1 over the sessions."""
        count_K = np.bincount([int(answer) for _, answer in self.train.values()], minlength=self.classes)
        return len(self.train) / (self.classes * np.maximum(count_K, 1))
