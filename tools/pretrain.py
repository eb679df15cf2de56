"""Pretrain on this machine.

    python tools/pretrain.py CONFIG.yaml [key=value ...]

`run.processes=2` starts two processes. A second call goes on from the newest complete checkpoint in `run.out`.
"""

from __future__ import annotations

from dataclasses import asdict

from launchers import local
from shards.core.cli import DONE, RESUME, Parser, run, summary
from slim.config import load_config


def main() -> int:
    parser = Parser(
        __doc__.splitlines()[0], "python tools/pretrain.py configs/pretrain/lean.yaml data=DATASET run.processes=2"
    )
    parser.add_argument("config", metavar="CONFIG.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_args()
    settings = load_config(args.config, args.overrides)
    result = local.train(settings)  # what can be wrong is told in one line, before processes are started
    out = settings.run.out
    facts = {"run": out, **{name: value for name, value in asdict(result).items() if value is not None}}
    for text in result.warnings:
        print(f"warning: {text}")
    if result.finished:
        following = f"python tools/probe.py {out} --data {settings.data[0].path} --task TASK.yaml"
    else:
        again = "with run.resume=auto " if settings.run.resume == "never" else ""
        following = (
            f"stopped by {result.stopped} at step {result.step} of {result.steps}; "
            f"{again}the same command continues from there"
        )
    summary(facts, following, args.json)
    return DONE if result.finished else RESUME


if __name__ == "__main__":
    run(main)
