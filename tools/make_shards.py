"""Convert cohorts of NIfTI runs into Zarr-backed WebDataset shards of ranked windows.

    python tools/make_shards.py COHORT.yaml [COHORT.yaml ...] --out DATASET [--workers N] [key=value ...]

A second call with the same arguments goes on where the first was stopped and reads no unchanged run again; refused
runs are tried again.
"""

from __future__ import annotations

import os
from pathlib import Path

from shards import layout, page
from shards.console import DONE, REFUSED, Parser, progress, run, summary
from shards.convert import Conversion, ConvertSettings
from shards.errors import ConfigError
from shards.settings import check, override

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

    import torch

    from slim.saliency import make_ranker
    from slim.temporal import CONFIG_FILE, Extractor, parcels_from_mask, train_extractor

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
        trained = (trained_here / CONFIG_FILE).is_file()  # written last
        if learned and not trained and given:
            given.save(trained_here)
        elif learned and not trained:
            if "rank" not in steps:
                raise ConfigError(
                    "command line",
                    "--only",
                    args.only,
                    "rank before pack",
                    "Run it without --only, or with --only rank first",
                )
            sample = conversion.extractor_runs()
            conversion.harmonise(sample)
            series = conversion.parcel_series(sample)
            if not series:
                refused = conversion.refused()
                raise ConfigError(
                    cohorts[0],
                    "root",
                    f"no training run that could be read ({refused[0]['reason']})",
                    "runs to train the temporal extractor on",
                    "Mend them, or give --extractor",
                )
            chosen = settings.extractor
            with progress("train the temporal extractor", chosen.steps, "steps") as advance:
                train_extractor(series, settings.windows.frames, chosen.steps, chosen.seed, advance).save(trained_here)
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
    for line in refused:
        print(f"refused: {line['reason']}")
    moved = [line for line in layout.read_lines(args.out / layout.SESSIONS) if "centred_by_mm" in line]
    for line in moved:
        print(
            f"native space: {line['key']} moved by {line['centred_by_mm']} mm to the middle of the grid; not registered"
        )
    summary(facts, f"look at {facts['report']}, then python tools/pretrain.py CONFIG.yaml data={args.out}", args.json)
    return REFUSED if refused else DONE


if __name__ == "__main__":
    run(main)
