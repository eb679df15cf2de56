"""Write the HTML page of a dataset or of a run, or of several runs side by side.

    slim-brain report DATASET_OR_RUN
    slim-brain report DATASET --states TASK
    slim-brain report RUN --watch
    slim-brain report RUN RUN ... --out FILE

The page is a file that works alone; interactive views, loaded when they are opened, lie beside it. A folder with a
manifest.json is a dataset, one with a config.yaml is a run. The command can be called while a run is still training.
Somebody else may have written the configuration of a run, so its URLs are opened only with --data.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

from shards.core.cli import DONE, Parser, call_of, summary
from shards.core.errors import ConfigError
from shards.core.room import require_room
from slim.checkpoints.run_folder import CONFIG, PAGE, REPORT

ALL = "all"


def _number_or_all(text: str) -> int | str:
    """A number of sessions, or all of them."""
    if text == ALL:
        return ALL
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a number of sessions or {ALL}")
    return int(text)


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser("report", __doc__.splitlines()[0], "runs/quickstart/pretrain")
    parser.add_argument(
        "folders",
        nargs="+",
        type=Path,
        metavar="DATASET_OR_RUN",
        help="the folder of a dataset or of a run; several runs are compared",
    )
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="the page of several runs (default: report/ in the folder)"
    )
    parser.add_argument("--private", action="store_true", help="replace the names of people on a page by numbers")
    parser.add_argument(
        "--embed",
        type=int,
        metavar="N",
        help="sessions of a dataset with a picture in the page itself (default: 6, to 12 with more than five cohorts)",
    )
    parser.add_argument(
        "--pictures",
        type=_number_or_all,
        metavar="N|all",
        help="sessions of a dataset with a picture; those that are not embedded are files beside the page (default 12)",
    )
    parser.add_argument(
        "--states", metavar="TASK", help="a task of type state; its events are shown on the page of a dataset"
    )
    parser.add_argument("--events", type=Path, metavar="FOLDER", help="folder of the tables of events")
    parser.add_argument(
        "--parcels", type=Path, metavar="FILE", help="label image of the parcels, if the dataset was made with one"
    )
    parser.add_argument("--paths", action="store_true", help="keep absolute paths whole on the page of a run")
    parser.add_argument(
        "--data",
        action="store_true",
        help="open the URLs in the configuration of a run, to count its steps",
    )
    parser.add_argument(
        "--watch",
        type=int,
        nargs="?",
        const=30,
        metavar="SECONDS",
        help="write the page of a run again every so many seconds (default 30) until the run ends; a browser follows",
    )
    args = parser.parse_args(argv)
    if args.watch is not None and args.watch < 1:
        raise ConfigError("command line", "--watch", args.watch, "1 or more seconds")

    if args.embed is not None and args.embed < 0:
        raise ConfigError("command line", "--embed", args.embed, "0 or more sessions")

    from shards.format.layout import MANIFEST

    for flag, value in (("--states", args.states), ("--events", args.events), ("--parcels", args.parcels)):
        for folder in args.folders if value is not None else ():
            if not (folder / MANIFEST).is_file():
                raise ConfigError(folder, flag, "no manifest.json in it", "the folder of a dataset")
    if len(args.folders) > 1:
        if args.watch is not None:
            raise ConfigError("command line", "--watch", "several runs", "one run")
        return _compare(args)
    if args.out is not None:
        expected = "no --out: the page of one dataset or run is in its folder"
        raise ConfigError("command line", "--out", args.out, expected, "Name two runs or more, or leave it out")

    (folder,) = args.folders
    if args.watch is not None and not (folder / CONFIG).is_file():
        raise ConfigError(folder, "--watch", "no config.yaml in it", "the folder of a run, which can be watched")
    for flag in ("embed", "pictures"):
        if getattr(args, flag) is not None and not (folder / MANIFEST).is_file():
            raise ConfigError(folder, f"--{flag}", "no manifest.json in it", "the folder of a dataset")
    if folder.is_dir():
        require_room(folder / REPORT, "report")
    if (folder / MANIFEST).is_file():
        from launchers.given_data import given_for
        from shards.reporting import dataset_page
        from shards.reporting.pictures import DRAWN

        drawn = {None: DRAWN, ALL: None}.get(args.pictures, args.pictures)
        given = given_for(folder, args.parcels, args.states, args.events)
        kind, path = "dataset", dataset_page.write(folder, args.private, args.embed, drawn, given)
        following = f"open {path}, then {call_of('pretrain', 'CONFIG.yaml', f'data={folder}')}"
    elif (folder / CONFIG).is_file():
        from slim.config import FinetuneSettings, load_run
        from slim.reporting import run_page

        if args.watch is not None:
            _watch(folder, args)
        kind, path = "run", run_page.write(folder, args.paths, remote=args.data, private=args.private)
        following = f"open {path}, then {call_of('probe', folder, '--data', 'DATASET', '--task', 'TASK.yaml')}"
        if isinstance(load_run(folder / CONFIG), FinetuneSettings):
            following = f"open {path}; its scores stand in the report of finetune"
    else:
        got = "neither manifest.json nor config.yaml in it" if folder.is_dir() else "no such folder"
        raise ConfigError(folder, "", got, "the folder of a dataset or of a run")
    summary({"kind": kind, "report": str(path), "bytes": path.stat().st_size}, following, args.json)
    return DONE


def _watch(folder: Path, args: argparse.Namespace) -> None:
    """Write the page again and again, until the run has ended or somebody stops it (Ctrl-C)."""
    from slim.reporting import run_page

    print(f"{folder / REPORT / PAGE} is written again every {args.watch} s; stop with Ctrl-C", flush=True)
    try:
        while not run_page.has_ended(folder, args.data):
            run_page.write(folder, args.paths, args.data, args.watch, args.private)
            time.sleep(args.watch)
    except KeyboardInterrupt:
        print("stopped watching", flush=True)


def _compare(args: argparse.Namespace) -> int:
    """Write the page of several runs."""
    if args.out is None or args.out.suffix != ".html":
        raise ConfigError("command line", "--out", args.out or "nothing", "the page of several runs, FILE.html")
    for folder in args.folders:
        if not (folder / CONFIG).is_file():
            got = "no config.yaml in it" if folder.is_dir() else "no such folder"
            raise ConfigError(folder, "", got, "the folder of a run", "Only runs are compared")
    require_room(args.out.parent, "--out")

    from slim.reporting import runs_page

    path = runs_page.write(args.folders, args.out, args.paths, remote=args.data)
    summary({"kind": "runs", "report": str(path), "bytes": path.stat().st_size}, f"open {path}", args.json)
    return DONE
