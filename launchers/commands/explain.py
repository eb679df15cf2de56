"""Map the voxels and windows that the predictions of a task rest on.

    slim-brain explain RUN_OR_WEIGHTS --data DATASET --task TASK.yaml [--subjects N] [key=value ...]

Computes integrated gradients of the score of a linear probe. The probe is fitted without the explained subjects. For a
task of type state, the windows in one state (`--class`) are explained. Writes maps (NIfTI on the
dataset's grid), pictures and facts to RUN/report/explain; `slim-brain report` shows them on the page of the run.
`pooling=mean` sets a key of the task (and of that of `--states`), `hcp_sex.pooling=mean` of the task of this name.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from shards.core.cli import DONE, Parser, call_of, summary
from shards.core.errors import ConfigError
from shards.core.presets import find
from shards.core.progress import progress
from shards.core.room import require_room
from shards.core.settings import typed
from slim.checkpoints.run_folder import EXPLAIN, REPORT
from slim.checkpoints.source import require_weights


def _parser() -> Parser:
    parser = Parser(
        "explain", __doc__.splitlines()[0], "runs/name --data data/mylab --task configs/downstream/synthetic_score.yaml"
    )
    parser.add_argument("run", metavar="RUN_OR_WEIGHTS", help="a run, a checkpoint, an export or OWNER/NAME")
    parser.add_settings("keys of the task, such as pooling=mean; NAME.key=value: of the task NAME alone")
    parser.add_argument("--data", required=True, metavar="DATASET", help="a dataset that make-shards wrote")
    parser.add_argument(
        "--task", required=True, metavar="TASK", help="a task of type classification, regression or state"
    )
    parser.add_argument("--subjects", type=int, default=8, metavar="N", help="test subjects to explain (default: 8)")
    parser.add_argument("--class", dest="label", metavar="NAME", help="class to explain (default: the last)")
    parser.add_argument(
        "--start",
        choices=("still", "empty"),
        default="still",
        help="baseline of the gradients: every voxel at its mean (still, default), or no anatomy either (empty)",
    )
    parser.add_argument(
        "--states", metavar="TASK", help="a task of type state; its events are drawn beside the windows"
    )
    parser.add_argument("--events", type=Path, metavar="FOLDER", help="folder of the tables of events")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="folder of the maps (default: RUN/report/explain)")
    parser.add_argument(
        "--weights",
        choices=("encoder", "target"),
        help="the online encoder (default) or its moving average; an export has one of them",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    if args.subjects < 1:
        raise ConfigError("command line", "--subjects", args.subjects, "1 or more")

    from shards.format.reader import Dataset
    from slim.evaluation.events import read as read_events
    from slim.evaluation.task import find_cases, load_tasks

    args.task = find("task", args.task, "--task")
    if args.states:
        args.states = find("task", args.states, "--states")
    paths = [args.task, *([args.states] if args.states else [])]
    (task, words), *others = load_tasks(paths, args.settings)
    dataset = Dataset(args.data)
    source = args.task if task.type == "state" and not args.states else args.states
    states = others[0][0] if others else task if source else None
    if states is not None and states.events is None:
        raise ConfigError(source, "type", states.type, "state, a task with events")
    require_weights(args.run)

    import torch

    from slim.explain import explain
    from slim.explain.explanation import Explanation
    from slim.explain.integrated_gradients import TOLERANCE, check_start
    from slim.inference.slim_brain import SlimBrain

    with typed(words, args.task):
        explain.check_task(task, args.task)
    model = SlimBrain.from_pretrained(args.run, args.weights).to("cuda" if torch.cuda.is_available() else "cpu")
    model.check_data(dataset)
    model.check_unseen(dataset)
    check_start(model, args.start)
    with typed(words, args.task):
        cases = find_cases(task, dataset, args.task, args.events)
    output, unit = 0, f"predicted {task.label}"
    if task.type != "regression":
        label = args.label or cases.classes[-1]
        if label not in cases.classes:
            raise ConfigError("command line", "--class", label, f"one of {', '.join(cases.classes)}")
        output, unit = cases.classes.index(label), f"logit of {label}"
        unit += ", mean over the windows of a session in that state" if task.type == "state" else ""
    elif args.label:
        raise ConfigError("command line", "--class", args.label, "no --class, because a regression has no classes")
    with typed(words, args.task):
        asked = explain.choose(task, cases, args.task, args.subjects, output)

    out = args.out or model.results / REPORT / EXPLAIN
    require_room(out, "--out")
    features, sessions = {}, cases.distinct()
    with progress("encode", len(sessions), "sessions") as advance:
        for session in sessions:
            features[session.key] = model.encode_session(dataset, session)
            advance(1, "")
    about = Explanation(
        task=task.name,
        type=task.type,
        label=task.label,
        classes=tuple(cases.classes),
        score=unit,
        pooling=task.pooling,
        start=args.start,
        tolerance=TOLERANCE,
        run=str(args.run),
        data=str(args.data),
        step=model.step,
        weights=model.made["weights"],
        space="native" if any(session.space == "native" for session in cases.sessions) else "MNI",
    )
    scores = explain.fitted_scores(task, cases, asked, features, output)
    explained = explain.explain(model, dataset, scores, args.start)
    events = None
    if states is not None and states.events is not None:
        root = args.events or source.parent / (states.events.root or ".")
        events = partial(read_events, states.events, root, where=source)
    with progress("explain", len(asked), "sessions") as advance:
        whole = explain.write(out, dataset, explained, about, advance, events)
    for found in whole.remarks():
        print(found.text)
    page = f", then {call_of('report', model.run_folder)}" if model.results == model.run_folder else ""
    summary(
        {"map": str(out / f"{task.name}.nii.gz"), "explained": len(asked), **whole.tree()},
        f"look at {out / (task.name + '.png')}" + page,
        args.json,
    )
    return DONE
