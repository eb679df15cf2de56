"""Test on synthetic cohorts with known truth whether pretraining learns.

    slim-brain experiments --out runs/experiments [--only PARTS] [--seeds N] [key=value ...]

Compares objectives, views, rankers, targets and poolings, asks for traits that are finer than parcels, and tells how
scores depend on the number of people in pretraining and of windows encoded. Makes two cohorts of each kind (people to
pretrain on, and others to probe), converts them, pretrains every variant with every seed, probes all of them on the
people nobody was trained on, and writes `tables.md` and `results.json`. What is there is not made again. key=value goes
to the pretraining of all variants.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from launchers.experiments.kinds import FINE, Kind, real_noise
from launchers.experiments.tables import Tables, head
from launchers.experiments.trials import (
    LENGTHS,
    OBJECTIVES,
    PARTS,
    RANKERS,
    TARGETS,
    VIEWS,
    Experiments,
    Trial,
    answer_all,
)
from shards.core.cli import DONE, Parser, summary
from shards.core.errors import ConfigError
from shards.core.files import dump, write_atomically
from shards.core.settings import check_keys, override
from slim.config import PretrainSettings, renamed_assignments


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser("experiments", __doc__.splitlines()[0], "--out runs/experiments --seeds 1 run.steps=300")
    parser.add_settings("settings for every pretraining")
    parser.add_argument("--out", type=Path, default=Path("runs/experiments"), metavar="FOLDER")
    parser.add_argument("--only", default=",".join(PARTS), metavar="PARTS", help=f"some of {','.join(PARTS)}")
    parser.add_argument("--snr", default="0.9,0.3", metavar="A,B", help="voxel signal-to-noise ratios")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="training seeds of the main table")
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="processes at a time, one core each")
    parser.add_argument("--tables", action="store_true", help="only write the tables of the results that exist")
    args = parser.parse_args(argv)
    parts = args.only.split(",")
    if unknown := set(parts) - set(PARTS):
        raise ConfigError("command line", "--only", min(unknown), f"some of {', '.join(PARTS)}")
    try:
        snrs = [float(value) for value in args.snr.split(",")]
    except ValueError:
        raise ConfigError("command line", "--snr", args.snr, "numbers such as 0.9,0.3") from None
    if min(args.seeds, args.jobs) < 1:
        raise ConfigError("command line", "--seeds, --jobs", min(args.seeds, args.jobs), "1 or more")
    check_keys(PretrainSettings, override({}, renamed_assignments(args.settings)))
    work = Experiments(args.out.resolve(), args.seeds, args.jobs, args.settings)
    kinds = [Kind.of_snr(snr) for snr in snrs]
    trials = work.trials(parts, kinds)
    shown = kinds + ([FINE] if {"fine", "people", "windows"} & set(parts) else [])
    if "noise" in parts and (real := real_noise()) is not None:
        shown.append(real)
    elif "noise" in parts:
        print("noise: left out, since SLIM_REAL_DATA does not name a folder of real scans", file=sys.stderr)
    first = Trial(OBJECTIVES[0], 0, kinds[0])
    checked = [trial for trial in (first, Trial(OBJECTIVES[0], 0, FINE)) if "checkpoint" in parts and trial in trials]
    if not args.tables:
        work.prepare(trials, parts, kinds)
        answer_all(work, trials)
        for kind in shown:
            if kind in {trial.kind for trial in trials}:
                work.baselines(kind)
        if "windows" in parts:
            work.evaluate_windows(Trial(OBJECTIVES[0], 0, FINE))
        for trial in checked:
            work.evaluate_checkpoints(trial)
    from launchers.experiments.figure import save_people

    tables = Tables(work, trials)
    text = [
        tables.main(kind, name) + "\n" + tables.verdict(kind, name) for kind in shown for name in ("", *kind.poolings)
    ]
    small = {
        "steps": ("steps", LENGTHS, "all steps (default)"),
        "view": ("view", VIEWS, "view: voxel (default)"),
        "ranker": ("windows", RANKERS, "ranked (default)"),
        "targets": ("targets", TARGETS, "all three kinds (default)"),
    }
    text += [tables.small(*small[part], kinds[0]) for part in parts if part in small]
    text += [tables.poolings(kinds[0])] if "pooling" in parts else []
    text += [tables.poolings(FINE)] if "fine" in parts else []
    text += [tables.windows_table(FINE)] if "windows" in parts else []
    text += [tables.checkpoints_table(trial) for trial in checked]
    if "people" in parts:
        text += [tables.people_table()]
        words = dict(zip([f"synthetic_{task}" for task in FINE.tasks], head(FINE), strict=True))
        save_people(work.out / "people.png", tables.people(), tables.baseline("connectome_kept", FINE), words)
    write_atomically(work.out / "tables.md", "\n".join(text))
    write_atomically(work.out / "results.json", dump(tables.results) + "\n")
    print("\n".join(text))
    summary(
        {"tables": str(work.out / "tables.md"), "runs": len(tables.trials)}, f"read {work.out / 'tables.md'}", args.json
    )
    return DONE
