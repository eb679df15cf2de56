"""Convert cohorts of NIfTI runs into Zarr-backed WebDataset shards of ranked windows.

    python tools/make_shards.py COHORT.yaml [COHORT.yaml ...] --out DATASET [--workers N] [key=value ...]

A second call with the same arguments goes on where the first was stopped and reads no unchanged run again; refused
runs are tried again.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch

from shards import layout, page
from shards.console import DONE, REFUSED, Parser, progress, run, summary
from shards.convert import Conversion, ConvertSettings
from shards.errors import ConfigError
from shards.settings import check, override
from slim.saliency import make_ranker
from slim.temporal import CONFIG_FILE, Extractor, parcels_from_mask, train_extractor

STEPS = ("find", "harmonise", "rank", "pack")


def main() -> int:
    parser = Parser(__doc__.splitlines()[0], "python tools/make_shards.py mylab.yaml --out data/mylab grid.mm=2")
    parser.add_argument("arguments", nargs="+", metavar="COHORT.yaml|key=value", help="cohort files, then settings")
    parser.add_argument("--out", required=True, type=Path, metavar="DATASET", help="folder of the dataset")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), metavar="N", help="processes")
    parser.add_argument("--only", default=",".join(STEPS), metavar="STEPS", help=f"some of {','.join(STEPS)}")
    parser.add_argument("--ranker", default="mutual", metavar="NAME", help="how windows are scored (default: mutual)")
    parser.add_argument("--extractor", type=Path, metavar="PATH", help="a trained temporal extractor")
    parser.add_argument("--dry-run", action="store_true", help="list what was found and stop")
    args = parser.parse_args()

    cohorts = [Path(a) for a in args.arguments if "=" not in a or Path(a).exists()]
    assignments = [a for a in args.arguments if Path(a) not in cohorts]
    settings = check(ConvertSettings, override({}, assignments), "command line")
    steps = args.only.split(",")
    unknown = set(steps) - set(STEPS)
    if unknown:
        raise ConfigError("command line", "--only", sorted(unknown)[0], f"some of {', '.join(STEPS)}")
    if not cohorts:
        raise ConfigError("command line", "COHORT.yaml", "none", "at least one cohort file")
    if args.workers < 1:
        raise ConfigError("command line", "--workers", args.workers, "1 or more")

    torch.set_num_threads(1)  # the extractor comes out the same on any machine's number of cores
    trained_here = args.out / layout.EXTRACTOR
    ranking = {"name": args.ranker, "extractor": None}
    learned = args.ranker == "mutual"
    given = Extractor.load(args.extractor) if args.extractor else None
    if learned:
        ranking["extractor"] = given.checksum if given else "trained on this dataset"
    elif given:
        raise ConfigError("command line", "--extractor", f"one with --ranker {args.ranker}", "--ranker mutual")
    else:
        make_ranker(args.ranker)  # an unknown name is told before anything is read
    conversion = Conversion(cohorts, args.out, settings, ranking, parcels_from_mask, args.workers)
    if args.dry_run:
        found = conversion.find()
        for item in found:
            mask = item.mask.name if item.mask else "computed"
            print(f"{conversion.splits[item.cohort, item.subject]:<5} {item.key}  {item.source}  mask: {mask}")
        summary({"runs": len(found), "subjects": len(conversion.splits)}, "run it without --dry-run", args.json)
        return DONE

    conversion.open()
    conversion.find()
    conversion.begin()
    if "harmonise" in steps and "rank" not in steps:
        conversion.harmonise(conversion.runs)
    if "rank" in steps or "pack" in steps:
        if learned:
            prepare_extractor(conversion, given, may_train="rank" in steps)
        ranker = make_ranker(args.ranker, trained_here if learned else None)
    if "rank" in steps:
        conversion.rank(ranker, only_harmonised="harmonise" not in steps)
    refused = conversion.refused()
    if "pack" not in steps:
        summary({"runs": len(conversion.runs), "refused": len(refused)}, "go on with --only rank or pack", args.json)
        return REFUSED if refused else DONE
    manifest = conversion.pack(ranker.identity())
    report = args.out / layout.REPORT / "index.html"
    if conversion.previous is None or manifest is not conversion.previous.manifest or not report.is_file():
        report = page.write(args.out)
    refused = conversion.refused()
    facts = {
        "dataset": str(args.out),
        "sessions": sum(manifest["sessions"].values()),
        **manifest["sessions"],
        "refused": len(refused),
        "shards": len(manifest["shards"]),
        "bytes": sum(shard["bytes"] for shard in manifest["shards"]),
        "report": str(report),
    }
    tell([f"refused: {line['reason']}" for line in refused], layout.FAILED)
    lines = layout.read_lines(args.out / layout.SESSIONS)
    kept = {line["key"] for line in lines} | {line["key"] for line in refused}
    tell([f"left out: {key} is no longer found" for key in conversion.before if key not in kept], "no file")
    tell(
        [
            f"native space: {line['key']} moved by {line['centred_by_mm']} mm to the middle of the grid; not registered"
            for line in lines
            if "centred_by_mm" in line
        ],
        layout.SESSIONS,
    )
    summary(facts, f"look at {facts['report']}, then python tools/pretrain.py CONFIG.yaml data={args.out}", args.json)
    return REFUSED if refused else DONE


def prepare_extractor(conversion: Conversion, given: Extractor | None, may_train: bool) -> None:
    """Put the temporal extractor of a dataset in its place: the given one, or one trained on its training runs."""
    folder = conversion.folder / layout.EXTRACTOR
    if (folder / CONFIG_FILE).is_file():  # written last
        return
    if given is not None:
        given.save(folder)
        return
    if not may_train:
        hint = "Run it without --only, or with --only rank first"
        raise ConfigError("command line", "--only", "pack before rank", "rank before pack", hint)
    sample = conversion.extractor_runs()
    conversion.harmonise(sample)
    series = conversion.parcel_series(sample)
    if not series:
        reason = conversion.refused()[0]["reason"]
        raise ConfigError(
            conversion.cohorts[0],
            "root",
            f"no training run that could be read ({reason})",
            "runs to train the temporal extractor on",
            "Mend them, or give --extractor",
        )
    chosen, frames = conversion.settings.extractor, conversion.settings.windows.frames
    with progress("train the temporal extractor", chosen.steps, "steps") as advance:
        train_extractor(series, frames, chosen.steps, chosen.seed, advance).save(folder)


def tell(lines: list[str], file: str) -> None:
    """Print the first twenty of many lines and say where all of them stand."""
    for line in lines[:20]:
        print(line)
    if len(lines) > 20:
        print(f"... and {len(lines) - 20} more, see {file}")


if __name__ == "__main__":
    run(main)
