"""Names of the files in a run folder, once for all who write or read them.

RUN/config.yaml       the merged configuration
    dataset.json      the manifest of its first dataset, without shards
    provenance.json   commit, versions, and what was chosen for the user (`slim.checkpoints.provenance`)
    seen.json         who is seen in training (`slim.checkpoints.seen`)
    answers.json      of a fine-tuning, what its subjects answer (`slim.finetune.labels`)
    configs/          every configuration it was trained with (`slim.training.compatibility`)
    checkpoints/      step-00000100/ ..., and `latest` (`slim.checkpoints.checkpoint`)
    metrics.jsonl     one line for each logged step
    skipped.jsonl     samples that could not be read
    wandb/id          by which wandb goes on with the run
    slurm/            of jobs: their scripts, logs and notes
    finetune/         of a pretraining: fine-tunings of it, each a folder of runs
    report/           index.html, the page; report.json, what a probe found; explain/, pictures
"""

from __future__ import annotations

CONFIG, DATASET, PROVENANCE, SEEN, ANSWERS = (
    "config.yaml",
    "dataset.json",
    "provenance.json",
    "seen.json",
    "answers.json",
)
ABOUT_RUN = (CONFIG, DATASET)  # copied into every checkpoint
ALSO_ABOUT_RUN = (PROVENANCE, SEEN)  # likewise; runs of version 0.1 have none
CONFIGS = "configs"

CHECKPOINTS = "checkpoints"
LATEST = "latest"
COMPLETE, WEIGHTS = "COMPLETE", "weights.safetensors"  # of a checkpoint

METRICS = "metrics.jsonl"
SKIPPED = "skipped.jsonl"
WANDB_ID = "wandb/id"

SLURM = "slurm"
FINETUNE = "finetune"
REPORT = "report"
PAGE, PROBE, EXPLAIN = "index.html", "report.json", "explain"  # in RUN/report
