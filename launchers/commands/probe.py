"""Score a frozen encoder on a task, beside random weights and baselines.

    slim-brain probe RUN_OR_WEIGHTS [...] --data DATASET --task TASK.yaml [--task TASK.yaml ...] [key=value ...]

The baselines are the functional connectome and the mean image. RUN_OR_WEIGHTS is a run folder (its newest complete
checkpoint is taken), one of its checkpoints, an exported folder or its name on the hub. Give several if one recipe was
trained with several seeds: their scores are averaged. A later call with another task adds to the same report.
`pooling=mean` sets a key of all tasks, and `hcp_sex.pooling=mean` sets it for the task of this name. The keys are shown
by `slim-brain config explain task`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from shards.core.cli import DONE, Parser, call_of, summary
from shards.core.errors import ConfigError
from shards.core.presets import find
from shards.core.progress import progress
from shards.core.room import require_room
from shards.core.settings import typed
from slim.checkpoints.run_folder import PROBE, REPORT
from slim.checkpoints.source import require_weights

if TYPE_CHECKING:
    from shards.format.reader import Dataset
    from slim.checkpoints.seen import Person
    from slim.evaluation.division import Splits
    from slim.evaluation.results import TaskResult
    from slim.evaluation.task import Cases, Task
    from slim.inference.slim_brain import SlimBrain


def _parser() -> Parser:
    parser = Parser(
        "probe", __doc__.splitlines()[0], "runs/name --data data/mylab --task configs/downstream/synthetic_group.yaml"
    )
    parser.add_argument(
        "runs",
        nargs="+",
        metavar="RUN_OR_WEIGHTS",
        help="a run, a checkpoint, an export or OWNER/NAME; several: the same recipe with other seeds",
    )
    parser.add_settings("keys of all tasks, such as pooling=mean; NAME.key=value: of the task NAME")
    parser.add_argument("--data", required=True, metavar="DATASET", help="a dataset that make-shards wrote")
    parser.add_argument(
        "--task",
        required=True,
        action="append",
        metavar="TASK",
        help=f"a YAML file, or a name that {call_of('config', '--list')} shows; may be given more than once",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FOLDER",
        help="folder of the report (default: report/ in the first run; NAME-results/report for an export)",
    )
    parser.add_argument(
        "--weights",
        choices=("encoder", "target"),
        help="the online encoder (default) or its moving average; an export has one of them",
    )
    parser.add_argument(
        "--random-seeds", type=int, default=3, metavar="N", help="random encoders to average over (default 3)"
    )
    parser.add_argument("--events", type=Path, metavar="FOLDER", help="folder of the tables of events (states)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    if args.random_seeds < 1:
        raise ConfigError("command line", "--random-seeds", args.random_seeds, "1 or more")

    from shards.format.reader import Dataset
    from slim.evaluation.division import divide_shares, make_splits
    from slim.evaluation.task import find_cases, load_tasks

    args.task = [find("task", given, "--task") for given in args.task]
    tasks, changes = zip(*load_tasks(args.task, args.settings), strict=True)
    for number, task in enumerate(tasks):
        if task.name in [other.name for other in tasks[:number]]:
            raise ConfigError(args.task[number], "name", f"{task.name} a second time", "a different name for each task")
    dataset = Dataset(args.data)
    for source in args.runs:
        require_weights(source)

    import torch

    from slim.evaluation import probe
    from slim.inference.slim_brain import SlimBrain

    device = "cuda" if torch.cuda.is_available() else "cpu"
    trained = [SlimBrain.from_pretrained(path, args.weights).to(device) for path in args.runs]
    ours = trained[0]
    for model, path in zip(trained, args.runs, strict=True):
        model.check_data(dataset)
        model.check_unseen(dataset)
        _check_recipe(model, ours, path, args.runs[0])
    cases, shares = [], []
    for task, path, words in zip(tasks, args.task, changes, strict=True):  # all, before anything is encoded
        with typed(words, path):
            cases.append(find_cases(task, dataset, path, args.events))
            shares.append(divide_shares(task, cases[-1], make_splits(task, cases[-1], path), path))

    sessions = {session.key: session for case in cases for session in case.sessions}
    # With the seed of a run, the random weights are the initial weights of that run.
    seeds = [model.settings.run.seed for model in trained]
    while len(seeds) < args.random_seeds:
        seeds.append(max(seeds) + 1)
    models = [("ours", model) for model in trained]
    models += [("random", SlimBrain.random(ours, seed)) for seed in seeds[: args.random_seeds]]
    asked = list(zip(tasks, cases, shares, strict=True))
    scored: dict[str, dict[float, dict[str, list[probe.Scores]]]] = {
        task.name: {share: {} for share in split_of} for task, _, split_of in asked
    }

    def score(task: Task, case: Cases, split_of: dict[float, Splits], name: str, method: probe.Method) -> None:
        for share, splits in split_of.items():
            found = scored[task.name][share].setdefault(name, [])
            found.append(probe.score_and_permute(task, case, splits, method))

    out = args.out or ours.results / REPORT
    require_room(out, "--out")
    for name, model in models:  # one after another: features of all sessions are large
        features = {}
        with progress(f"encode, {name}", len(sessions), "sessions") as advance:
            for key, session in sessions.items():
                features[key] = model.encode_session(dataset, session)
                advance(1, key)
        with progress(f"probe, {name}", len(tasks), "fits") as advance:
            for task, case, split_of in asked:
                score(task, case, split_of, name, probe.encoder_method(task, case, features, device))
                advance(1, task.name)
    with progress("probe, baselines", len(asked), "tasks") as advance:
        for task, case, split_of in asked:
            for name, method in probe.baselines(task, case, dataset).items():
                score(task, case, split_of, name, method)
            advance(1, task.name)

    results: list[TaskResult] = []
    seen = _seen(trained, dataset)
    for (task, case, split_of), words in zip(asked, changes, strict=True):
        result = probe.summarise_shares(task, case, split_of, scored[task.name])
        facts = result.facts.with_facts(
            run=args.runs[0],
            runs=args.runs,
            random_seeds=seeds[: args.random_seeds],
            data=str(args.data),
            changed=words,
            step=ours.step,
            weights=ours.made["weights"],
            short_sessions=sum(session.n_kept < ours.settings.windows.k for session in case.distinct()),
            subjects_seen_in_pretraining=None if seen is None else len(seen.intersection(case.subjects)),
        )
        results.append(replace(result, facts=facts))
    report = probe.write_report(out, results)
    for result in results:
        _print(result)
    summary(
        {"report": str(out / PROBE), "step": ours.step, **report.tree()},
        f"look at {out / (tasks[0].name + '.png')}",
        args.json,
    )
    return DONE


def _check_recipe(model: SlimBrain, first: SlimBrain, path: str, first_path: str) -> None:
    """Refuse a run with another recipe, and a run that is given twice."""
    mine, its = ({**one.settings.model_dump(mode="json"), "run": None, "step": one.step} for one in (model, first))
    for name, expected in its.items():
        if mine[name] != expected:
            hint = "Probe each recipe in a separate call"
            raise ConfigError(path, name, mine[name], f"{expected}, as {first_path} has", hint)
    if model is not first and model.checksum == first.checksum:
        raise ConfigError(path, "weights", f"those of {first_path}", "a run with another seed")


def _seen(models: list[SlimBrain], dataset: Dataset) -> set[Person] | None:
    """People of the dataset that any model has seen in pretraining; None if this is unknown for a model."""
    everybody: set[Person] = set()
    for model in models:
        found = model.seen_people(dataset)
        if found is None:
            return None
        everybody |= found
    return everybody


def _print(result: TaskResult) -> None:
    from slim.evaluation import display

    facts = result.facts
    about = f"{facts.sessions} sessions, {facts.test_subjects} test subjects, {facts.pooling} pooling"
    display.print_table(result, f"{result.name}: {about}")
    if facts.listed_without_scan:
        print(f"  {facts.listed_without_scan} listed people have no scan in the dataset")
    for share in facts.shares:
        print(f"  {display.percent(share.share)} of the training people: {share.people_by_class}")
    for reason, count in facts.left_out.items():
        print(f"  {count} sessions left out: {reason}")
    if facts.short_sessions:
        print(f"  {facts.short_sessions} sessions have fewer windows than samples in pretraining; all were encoded")
    if facts.subjects_seen_in_pretraining is None:
        print("  which subjects were seen in pretraining is unknown: version 0.1 did not record it")
    else:
        seen = facts.subjects_seen_in_pretraining
        print(f"  {seen} of {facts.subjects} subjects were seen in pretraining, without labels")
