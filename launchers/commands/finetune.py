"""Fine-tune a pretrained encoder on a task, and test it once.

    slim-brain finetune RUN_OR_WEIGHTS --data DATASET --task TASK.yaml [--from-scratch] [key=value ...]

The task needs `split.kind: holdout`. Each of its divisions of the subjects is fine-tuned once, and the best epoch is
chosen on validation subjects. The scores are added to the report of `slim-brain probe`. Repeat a stopped call to
continue it. `run.processes=2` trains in two processes. `head.pooling=attentive`, `optimizer.lr=3e-4`, `run.epochs=50`
and every other setting that a pretraining has in data, optimizer, precision, zero and run can be given. `lora.rank=8`
trains low-rank updates of the weights, `freeze=2` leaves the first two stages as they are.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from launchers.arguments import add_finetuning
from shards.core.cli import DONE, Parser, summary
from shards.core.errors import Stopped
from slim.checkpoints.run_folder import PROBE


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(
        "finetune",
        __doc__.splitlines()[0],
        "runs/name --data data/mylab --task configs/downstream/synthetic_group.yaml",
    )
    add_finetuning(parser)
    args = parser.parse_args(argv)

    from launchers import finetuning

    method = finetuning.open_call(args, train)  # checks the call before anything is trained

    from slim.checkpoints.seen import Person
    from slim.evaluation import display, probe
    from slim.finetune.method import SCRATCH

    task, name, step = method.task, method.name, method.ours.step
    if len(task.split.share) > 1:
        print("split.share: fine-tuning takes all training people; slim-brain probe scores the shares", file=sys.stderr)
    report, trained = finetuning.report_of(method, args), method.trained()
    seen = set[Person]() if name == SCRATCH else method.ours.seen_people(method.dataset)
    found = probe.run_task(task, method.cases, {name: method}, args.task)
    facts = {
        "run": str(args.run),
        "data": args.data,
        "step": 0 if name == SCRATCH else step,
        "subjects_seen_in_pretraining": None if seen is None else len(seen.intersection(method.cases.subjects)),
        "trained_parameters": trained,
        "runs": [asdict(one) for one in method.runs],
        "settings": method.settings(0).model_dump(
            mode="json", include={"head", "freeze", "lora", "optimizer", "run", "zero", "precision"}
        ),
    }
    about = probe.task_facts(task, method.cases, method.splits).with_facts(**{name: facts})
    whole = probe.write_report(report, [replace(found, facts=about)])
    result, tree = whole.results[task.name], whole.tree()
    then = "the same command with --from-scratch shows what pretraining adds"
    if method.settings(0).lora is not None or method.settings(0).freeze:
        then = "the same command without lora and freeze, and with another --out, trains all weights"
    title = f"{task.name}: {result.facts.test_subjects} test subjects in each division"
    display.print_table(result, title, compared=False)
    summary(
        {
            "report": str(report / PROBE),
            "runs": str(method.folder),
            "trained": f"{trained} parameters, for which AdamW keeps {trained * 8 / 2**20:.2f} MiB of moments",
            "best_steps": ", ".join(str(one.best_step) for one in method.runs),
            "tasks": {task.name: tree["tasks"][task.name]},
            "facts": {task.name: tree["facts"][task.name]},
        },
        "" if args.from_scratch else then,
        args.json,
    )
    return DONE


def train(settings: Any) -> None:
    """Run a fine-tuning to its end, in `run.processes` processes."""
    from launchers import local

    print(f"fine-tune in {settings.run.out}", file=sys.stderr)
    result = local.train(settings)
    for text in result.warnings:
        print(f"warning: {text}")
    if not result.finished:
        raise Stopped(
            f"by {result.stopped} at step {result.step} of {result.steps} of {settings.run.out}; "
            "the same command continues from there"
        )
