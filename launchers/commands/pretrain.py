"""Pretrain an encoder on this machine.

    slim-brain pretrain CONFIG.yaml [key=value ...]

`run.processes=2` starts two processes. A second call continues from the newest complete checkpoint in `run.out`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

from shards.core.cli import DONE, RESUME, Parser, call_of, summary


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser("pretrain", __doc__.splitlines()[0], "configs/pretrain/lean.yaml data=DATASET run.processes=2")
    parser.add_argument("config", metavar="CONFIG.yaml")
    parser.add_settings("settings of the pretraining, such as run.steps=2000")
    args = parser.parse_args(argv)

    from shards.format.layout import read_manifest
    from slim.config import load_config

    settings = load_config(args.config, args.settings)
    for item in settings.data:
        read_manifest(item.path)

    from launchers import local

    result = local.train(settings)  # checks the settings before it starts processes
    out = settings.run.out
    facts = {"run": out, **{name: value for name, value in asdict(result).items() if value is not None}}
    for text in result.warnings:
        print(f"warning: {text}")
    if result.finished:
        following = call_of("probe", out, "--data", settings.data[0].path, "--task", "TASK.yaml")
    else:
        again = "with run.resume=auto " if settings.run.resume == "never" else ""
        following = (
            f"stopped by {result.stopped} at step {result.step} of {result.steps}; "
            f"{again}the same command continues from there"
        )
    summary(facts, following, args.json)
    return DONE if result.finished else RESUME
