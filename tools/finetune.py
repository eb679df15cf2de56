"""Fine-tune a pretrained encoder on a task, and test it once.

    python tools/finetune.py RUN_OR_WEIGHTS --data DATASET --task TASK.yaml [--from-scratch] [key=value ...]

The task has `split.kind: holdout`: one fine-tuning for each of its divisions of the subjects, its best epoch chosen on
validation subjects. The scores join those of tools/probe.py in one report. A call that was stopped goes on when it is
repeated. `run.processes=2` trains in two processes; `head.pooling=attentive`, `optimizer.lr=3e-4`, `run.epochs=50` and
all else that a pretraining configuration says of data, optimizer, precision, zero and run can be set.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from launchers import local
from shards.console import DONE, Parser, run, summary
from shards.errors import Stopped
from shards.reader import Dataset
from slim.task import find_cases, load_task, make_splits


def main() -> int:
    parser = Parser(
        __doc__.splitlines()[0],
        "python tools/finetune.py runs/name --data data/mylab --task configs/downstream/synthetic_group.yaml",
    )
    parser.add_argument("run", metavar="RUN_OR_WEIGHTS", help="as for probe.py")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of the fine-tuning, such as run.epochs=50")
    parser.add_argument("--data", required=True, metavar="DATASET", help="of make_shards.py")
    parser.add_argument("--task", type=Path, required=True, metavar="TASK.yaml", help="with split.kind holdout")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="of the report and the runs (default: in RUN)")
    parser.add_argument("--weights", choices=("encoder", "target"), help="as for probe.py")
    parser.add_argument("--from-scratch", action="store_true", help="from random weights: what does pretraining add?")
    args = parser.parse_args()
    task = load_task(args.task)

    import torch

    from slim import probe, tuned
    from slim.brain import SlimBrain

    tuned.refuse(task, args.task)
    dataset = Dataset(args.data)
    ours = SlimBrain.from_pretrained(args.run, args.weights)
    ours.check_data(dataset)
    ours.check_unseen(dataset)
    cases = find_cases(task, dataset, ours.settings.windows.k, args.task)
    splits = make_splits(task, cases, args.task)
    name = tuned.SCRATCH if args.from_scratch else tuned.FINETUNED
    folder = (args.out or ours.results) / "finetune" / f"{task.name}-{name}"
    device = "cuda" if torch.cuda.is_available() else "cpu"
    method = tuned.Finetuned(
        ours, task.name, dataset, cases, splits, folder, args.overrides, args.from_scratch, train, device
    )
    report = args.out or ours.results / "report"
    # What is wrong with settings or report is told before anything is trained.
    for number in range(len(splits)):
        method.settings(number)
    tuned.check_report(report, task, cases, splits)

    found, _ = probe.run_task(task, cases, {name: method}, args.task)
    facts = {
        "run": str(args.run),
        "data": args.data,
        "step": 0 if args.from_scratch else ours.step,
        "runs": method.runs,
        "settings": method.settings(0).model_dump(
            mode="json", include={"head", "optimizer", "run", "zero", "precision"}
        ),
    }
    about = probe.task_facts(task, cases, splits) | {name: facts}
    whole = probe.write_report(report, {task.name: {name: found[name]}}, {task.name: about})
    results, about = whole["tasks"][task.name], whole["facts"][task.name]
    _table(task.name, results, about)
    summary(
        {
            "report": str(report / "report.json"),
            "runs": str(folder),
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
    config = local.prepare_run(settings)
    print(f"fine-tune in {settings.run.out}", file=sys.stderr)
    result = local.run(config, settings.run.processes)
    for text in result["warnings"]:
        print(f"warning: {text}")
    if not result["finished"]:
        raise Stopped(
            f"by {result['stopped']} at step {result['step']} of {result['steps']} of {settings.run.out}; "
            "the same command goes on from there"
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
