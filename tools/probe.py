"""Probe a pretrained encoder, beside random weights, the connectome and the mean image.

    python tools/probe.py RUN_OR_WEIGHTS --data DATASET --task TASK.yaml [--task TASK.yaml ...] [--out FOLDER]

RUN_OR_WEIGHTS is a run folder (its newest complete checkpoint is taken) or one of its checkpoints. A later
call with another task adds to the same report.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from shards.console import DONE, Parser, progress, run, summary
from shards.errors import ConfigError
from shards.reader import Dataset
from slim.task import Cases, find_cases, load_task, make_splits


def main() -> int:
    parser = Parser(
        __doc__.splitlines()[0],
        "python tools/probe.py runs/name --data data/mylab --task configs/downstream/synthetic_group.yaml",
    )
    parser.add_argument("run", type=Path, metavar="RUN_OR_WEIGHTS", help="a run, or one of its checkpoints")
    parser.add_argument("--data", required=True, metavar="DATASET", help="of make_shards.py")
    parser.add_argument(
        "--task", type=Path, required=True, action="append", metavar="TASK.yaml", help="may be given more than once"
    )
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="of the report (default: RUN/report)")
    parser.add_argument(
        "--weights",
        choices=("encoder", "target"),
        default="encoder",
        help="the online encoder (default) or its moving average",
    )
    parser.add_argument("--events", type=Path, metavar="FOLDER", help="where the tables of events lie (states)")
    args = parser.parse_args()
    tasks = [load_task(path) for path in args.task]
    for number, task in enumerate(tasks):
        if task.name in [other.name for other in tasks[:number]]:
            raise ConfigError(args.task[number], "name", f"{task.name} a second time", "names that differ")
    dataset = Dataset(args.data)

    import torch

    from slim import probe
    from slim.brain import SlimBrain

    device = "cuda" if torch.cuda.is_available() else "cpu"
    ours = SlimBrain.from_pretrained(args.run, args.weights).to(device)
    ours.check_data(dataset)
    cases = [
        find_cases(task, dataset, ours.settings.windows.k, path, args.events)
        for task, path in zip(tasks, args.task, strict=True)
    ]
    for task, case, path in zip(tasks, cases, args.task, strict=True):
        make_splits(task, case, path)  # what is wrong with a task is told before anything is encoded

    sessions = {session["key"]: session for case in cases for session in case.sessions}
    # With the run's seed, random weights are those that training began with.
    models = {"ours": ours, "random": SlimBrain.random(ours, ours.settings.run.seed)}
    encoded: dict[str, dict[str, Any]] = {name: {} for name in models}
    with progress("encode", len(models) * len(sessions), "sessions") as advance:
        for name, model in models.items():
            for key, session in sessions.items():
                encoded[name][key] = model.encode_session(dataset, session)
                advance(1, name)

    results, facts = {}, {}
    seen = ours.was_trained_on(dataset)
    with progress("probe", sum(4 + bool(task.confounds) for task in tasks), "fits") as advance:
        for task, case, path in zip(tasks, cases, args.task, strict=True):
            methods = probe.make_methods(task, case, dataset, encoded, device)
            results[task.name], facts[task.name] = probe.run_task(task, case, methods, path, advance)
            facts[task.name] |= {
                "run": str(args.run),
                "data": str(args.data),
                "step": ours.step,
                "weights": args.weights,
                "subjects_seen_in_pretraining": _in_train(case) if seen else 0,
            }
    out = args.out or ours.run_folder / "report"
    report = probe.write_report(out, results, facts)
    for task in tasks:
        _table(task.name, results[task.name], facts[task.name])
    summary(
        {"report": str(out / "report.json"), "step": ours.step, **report},
        f"look at {out / (tasks[0].name + '.png')}",
        args.json,
    )
    return DONE


def _in_train(case: Cases) -> int:
    """Subjects of the dataset's training split."""
    return len({(s["cohort"], s["subject"]) for s in case.sessions if s["split"] == "train"})


def _table(name: str, results: dict[str, Any], facts: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    def cell(score: dict[str, float | None]) -> str:
        text = {part: "n/a" if value is None else f"{value:.3f}" for part, value in score.items()}
        return f"{text['value']} [{text['low']}, {text['high']}]".replace("[", r"\[")

    table = Table(
        title=f"{name}: {facts['sessions']} sessions, {facts['test_subjects']} test subjects, "
        f"{facts['pooling']} pooling",
        title_justify="left",
    )
    metrics = list(results["ours"])
    for column in ("method", *metrics):
        table.add_column(column.replace("_", " "), no_wrap=True)
    for method, scores in results.items():
        table.add_row(method.replace("_", " "), *[cell(scores[metric]) for metric in metrics])
    table.add_section()
    for method, scores in facts["differences"].items():
        table.add_row(f"ours - {method}", *[cell(scores[metric]) for metric in metrics])
    if "chance" in facts:
        table.add_row("chance", *[f"{facts['chance'][metric]:.3f}" for metric in metrics])
    console = Console()
    if not console.is_terminal:
        console.width = 130  # a log file has no width of its own
    console.print(table)
    for reason, count in facts["left_out"].items():
        print(f"  {count} sessions left out: {reason}")
    if facts["subjects_seen_in_pretraining"]:
        print(
            f"  {facts['subjects_seen_in_pretraining']} of {facts['subjects']} subjects were seen in "
            "pretraining, without labels"
        )


if __name__ == "__main__":
    run(main)
