"""Names of the files in a run folder.

RUN/config.yaml       the merged configuration
    dataset.json      the manifest of its first dataset, without shards
    provenance.json   commit, versions, and settings chosen automatically (`slim.checkpoints.provenance`)
    start.safetensors weights that the run began with, if they were given (`slim.checkpoints.start`)
    seen.json         subjects seen in training (`slim.checkpoints.seen`)
    answers.json      labels of the subjects of a fine-tuning (`slim.finetune.labels`)
    configs/          all configurations that the run was trained with (`slim.training.compatibility`)
    checkpoints/      step-00000100/ ..., and `latest` (`slim.checkpoints.checkpoint`); `best` with `run.probe`
    metrics.jsonl     one line for each logged step
    probe.jsonl       one line for each probe during training (`slim.evaluation.validation`)
    skipped.jsonl     samples that could not be read
    wandb/id          ID of the run in wandb, used to resume it
    slurm/            scripts, logs and notes of SLURM jobs
    finetune/         fine-tunings of this pretraining run, each a folder of runs
    report/           index.html, the report page; report.json, results of probes; explain/, pictures
"""

from __future__ import annotations

CONFIG, DATASET, PROVENANCE, SEEN, ANSWERS = (
    "config.yaml",
    "dataset.json",
    "provenance.json",
    "seen.json",
    "answers.json",
)
START = "start.safetensors"
ABOUT_RUN = (CONFIG, DATASET)  # copied into every checkpoint
ALSO_ABOUT_RUN = (PROVENANCE, SEEN)  # likewise; runs of version 0.1 have none
CONFIGS = "configs"

CHECKPOINTS = "checkpoints"
LATEST, BEST = "latest", "best"
COMPLETE, WEIGHTS = "COMPLETE", "weights.safetensors"  # in each checkpoint

METRICS, PROBES = "metrics.jsonl", "probe.jsonl"
SKIPPED = "skipped.jsonl"
WANDB_ID = "wandb/id"

SLURM = "slurm"
FINETUNE = "finetune"
REPORT = "report"
PAGE, PROBE, EXPLAIN = "index.html", "report.json", "explain"  # in RUN/report
