"""Names of the files in a run folder, once for all who write or read them."""

from __future__ import annotations

METRICS = "metrics.jsonl"


SKIPPED = "skipped.jsonl"


WANDB_ID = "wandb/id"


SEEN = "seen.json"


CHECKPOINTS = "checkpoints"


ABOUT_RUN = ("config.yaml", "dataset.json")  # of the run's folder

CONFIGS = "configs"  # of the run's folder: every configuration it was trained with, see `slim.training.compatibility`
