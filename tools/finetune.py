"""Fine-tune a pretrained encoder on a task, and test it once.

    python tools/finetune.py RUN_OR_WEIGHTS --data DATASET --task TASK.yaml [--from-scratch] [key=value ...]

The task has `split.kind: holdout`: one fine-tuning for each of its divisions of the subjects, its best epoch chosen on
validation subjects. The scores join those of tools/probe.py in one report. A call that was stopped goes on when it is
repeated. `run.processes=2` trains in two processes; `head.pooling=attentive`, `optimizer.lr=3e-4`, `run.epochs=50` and
all else that a pretraining configuration says of data, optimizer, precision, zero and run can be set.
"""

from __future__ import annotations

import sys
from typing import Any

from launchers import finetuning, local
from shards.core.cli import DONE, Parser, run, summary
from shards.core.errors import Stopped
from slim.checkpoints.run_folder import PROBE


def main() -> int:
    parser = Parser(
        __doc__.splitlines()[0],
        "python tools/finetune.py runs/name --data data/mylab --task configs/downstream/synthetic_group.yaml",
    )
    finetuning.add_arguments(parser)
    args = parser.parse_args()
    method = finetuning.open_call(args, train)  # what is wrong with the call is told before anything is trained

    from slim.checkpoints.seen import Person
    from slim.evaluation import probe
    from slim.finetune.method import SCRATCH

    task, name, step = method.task, method.name, method.ours.step
    report = finetuning.report_of(method, args)
    seen = set[Person]() if name == SCRATCH else method.ours.seen_people(method.dataset)
    found, _ = probe.run_task(task, method.cases, {name: method}, args.task)
    facts = {
        "run": str(args.run),
        "data": args.data,
        "step": 0 if name == SCRATCH else step,
        "subjects_seen_in_pretraining": None if seen is None else len(seen.intersection(method.cases.subjects)),
        "runs": method.runs,
        "settings": method.settings(0).model_dump(
            mode="json", include={"head", "optimizer", "run", "zero", "precision"}
        ),
    }
    about = probe.task_facts(task, method.cases, method.splits) | {name: facts}
    whole = probe.write_report(report, {task.name: {name: found[name]}}, {task.name: about})
    results, about = whole["tasks"][task.name], whole["facts"][task.name]
    _table(task.name, results, about)
    summary(
        {
            "report": str(report / PROBE),
            "runs": str(method.folder),
            "best_steps": ", ".join(str(one["best_step"]) for one in method.runs),
            "tasks": {task.name: results},
            "facts": {task.name: about},
        },
        "" if args.from_scratch else "the same with --from-scratch tells what pretraining adds",
        args.json,
    )
    return DONE


def train(settings: Any) -> None:
    """Run a fine-tuning to its end, in `run.processes` processes."""
    print(f"fine-tune in {settings.run.out}", file=sys.stderr)
    result = local.train(settings)
    for text in result["warnings"]:
        print(f"warning: {text}")
    if not result["finished"]:
        raise Stopped(
            f"by {result['stopped']} at step {result['step']} of {result['steps']} of {settings.run.out}; "
            "the same command continues from there"
        )


def _table(name: str, results: dict[str, Any], facts: dict[str, Any]) -> None:
    """All methods of the task, those of probe.py among them."""
    from rich.console import Console
    from rich.table import Table

    def cell(score: dict[str, float | None]) -> str:
        text = ["n/a" if score[part] is None else f"{score[part]:.3f}" for part in ("value", "low", "high")]
        return rf"{text[0]} \[{text[1]}, {text[2]}]"

    table = Table(title=f"{name}: {facts['test_subjects']} test subjects in each division", title_justify="left")
    metrics = list(next(iter(results.values())))
    for column in ("method", *metrics):
        table.add_column(column.replace("_", " "), no_wrap=True)
    for method, scores in results.items():
        table.add_row(method.replace("_", " "), *[cell(scores[metric]) for metric in metrics])
    console = Console()
    if not console.is_terminal:
        console.width = 130  # a log file has no width of its own
    console.print(table)


if __name__ == "__main__":
    run(main)
