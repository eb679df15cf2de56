"""Convert cohorts of NIfTI runs into Zarr-backed WebDataset shards of ranked windows.

    python tools/make_shards.py COHORT.yaml [COHORT.yaml ...] --out DATASET [--workers N] [key=value ...]

A second call with the same arguments goes on where the first was stopped, reads no unchanged run again, and tries none
again that was refused (unless with --retry-refused). `--dry-run` tells what is there and what will be refused.
"""

from __future__ import annotations

import os
from contextlib import closing
from pathlib import Path
from typing import Any

import torch

from shards import layout, page, survey
from shards.console import DONE, REFUSED, Parser, progress, run, summary
from shards.convert import Conversion, ConvertSettings
from shards.errors import ConfigError
from shards.settings import check, override
from slim.parcels import make_parcels
from slim.saliency import make_ranker
from slim.temporal import CONFIG_FILE, Extractor, train_extractor

STEPS = ("find", "harmonise", "rank", "pack")


def main() -> int:
    parser = Parser(__doc__.splitlines()[0], "python tools/make_shards.py mylab.yaml --out data/mylab grid.mm=2")
    parser.add_argument("arguments", nargs="+", metavar="COHORT.yaml|key=value", help="cohort files, then settings")
    parser.add_argument("--out", required=True, type=Path, metavar="DATASET", help="folder of the dataset")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), metavar="N", help="processes")
    parser.add_argument("--only", default=",".join(STEPS), metavar="STEPS", help=f"some of {','.join(STEPS)}")
    parser.add_argument("--ranker", default="mutual", metavar="NAME", help="how windows are scored (default: mutual)")
    parser.add_argument("--extractor", type=Path, metavar="PATH", help="a trained temporal extractor")
    parser.add_argument("--retry-refused", action="store_true", help="try runs again that were refused before")
    parser.add_argument("--dry-run", action="store_true", help="tell what was found and what will be refused, and stop")
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
    ranking = {"name": args.ranker, "extractor": None}
    given = Extractor.load(args.extractor) if args.extractor else None
    if args.ranker == "mutual":
        ranking["extractor"] = given.checksum if given else "trained on this dataset"
    elif given:
        raise ConfigError("command line", "--extractor", f"one with --ranker {args.ranker}", "--ranker mutual")
    else:
        make_ranker(args.ranker)  # an unknown name is told before anything is read
    parcels = make_parcels(settings.grid.grid(), settings.parcels)
    conversion = Conversion(cohorts, args.out, settings, ranking, parcels, args.workers, args.retry_refused)
    if args.dry_run:
        return dry_run(conversion, args.json)
    with closing(conversion):
        return make(conversion, steps, given, args.json)


def make(conversion: Conversion, steps: list[str], given: Extractor | None, as_json: bool) -> int:
    """Take the steps of a conversion and tell what came of them."""
    conversion.open()
    conversion.find()
    conversion.begin()
    if "harmonise" in steps and "rank" not in steps:
        conversion.harmonise(conversion.runs)
    if "rank" in steps or "pack" in steps:
        name = conversion.configuration["ranking"]["name"]
        learned = name == "mutual"
        if learned and not prepare_extractor(conversion, given, may_train="rank" in steps):
            return all_refused(conversion, as_json)
        ranker = make_ranker(name, conversion.folder / layout.EXTRACTOR if learned else None)
    if "rank" in steps:
        conversion.rank(ranker, only_harmonised="harmonise" not in steps)
    refused = conversion.refused()
    if "pack" not in steps:
        summary({"runs": len(conversion.runs), "refused": len(refused)}, "go on with --only rank or pack", as_json)
        return REFUSED if refused else DONE
    manifest = conversion.pack(ranker.identity())
    if manifest is None:
        return all_refused(conversion, as_json)
    report = conversion.folder / layout.REPORT / "index.html"
    if conversion.previous is None or manifest is not conversion.previous.manifest or not report.is_file():
        report = page.write(conversion.folder)
    tell_losses(conversion, refused)
    facts = {
        "dataset": str(conversion.folder),
        "sessions": sum(manifest["sessions"].values()),
        **manifest["sessions"],
        "refused": len(refused),
        "shards": len(manifest["shards"]),
        "bytes": sum(shard["bytes"] for shard in manifest["shards"]),
        "report": str(report),
    }
    next_step = f"look at {report}, then python tools/pretrain.py CONFIG.yaml data={conversion.folder}"
    summary(facts, next_step, as_json)
    return REFUSED if refused else DONE


def tell_losses(conversion: Conversion, refused: list[dict[str, Any]]) -> None:
    """What was refused, left out, passed over, or taken on an assumption."""
    tell([f"refused: {line['reason']}" for line in refused], layout.FAILED)
    lines = layout.read_lines(conversion.folder / layout.SESSIONS)
    kept = {line["key"] for line in lines} | {line["key"] for line in refused}
    tell([f"left out: {key} is no longer found" for key in conversion.before if key not in kept], "no file")
    tell_passed_over(conversion)
    moved = "moved by {centred_by_mm} mm to the middle of the grid; not registered"
    assumed = "orientation {orientation_assumed} assumed, its header has none: check left and right"
    for field, what in (
        ("centred_by_mm", f"native space: {{key}} {moved}"),
        ("orientation_assumed", f"{{key}}: {assumed}"),
    ):
        tell([what.format(**line) for line in lines if field in line], layout.SESSIONS)


def dry_run(conversion: Conversion, as_json: bool) -> int:
    """Tell what a conversion would find and refuse; writes nothing."""
    conversion.find()
    found, refused = survey.look(conversion)
    for source, facts in found:
        print(survey.line(source, facts, conversion.splits[source.person]))
    for problem in refused:
        print(f"will be refused: {problem.line()}")
    cohorts = survey.cohorts(conversion, found)
    for name, facts in cohorts.items():
        print("\n".join(survey.words(name, facts)))
    tell_passed_over(conversion)
    counts = {
        "runs": len(conversion.runs),
        "subjects": len({source.person for source in conversion.runs}),
        "will_be_refused": len(refused),
    }
    more = {"cohorts": cohorts, "reasons": [problem.line() for problem in refused]}
    summary(counts | more, "run it without --dry-run", as_json)
    return REFUSED if refused else DONE


def tell_passed_over(conversion: Conversion) -> None:
    """Name files that the globs of a pattern reach but its fields do not match: perhaps runs that were meant."""
    for cohort in conversion.found:
        lines = [f"passed over: {path}, which a field of the pattern does not match" for path in cohort.passed_over]
        tell(lines, f"{cohort.settings.name}'s pattern")


def all_refused(conversion: Conversion, as_json: bool) -> int:
    """The end of a conversion in which no run is left."""
    refused = conversion.refused()
    conversion.write_refused()
    tell_passed_over(conversion)
    tell([f"refused: {line['reason']}" for line in refused], layout.FAILED)
    path = conversion.folder / layout.FAILED
    summary({"sessions": 0, "refused": len(refused)}, f"see {path}: no dataset was written", as_json)
    return REFUSED


def prepare_extractor(conversion: Conversion, given: Extractor | None, may_train: bool) -> bool:
    """Put the temporal extractor of a dataset in its place: the given one, or one trained on its training runs.

    False if there is none because every run was refused.
    """
    folder = conversion.folder / layout.EXTRACTOR
    if (folder / CONFIG_FILE).is_file():  # written last
        return True
    if given is not None:
        given.save(folder)
        return True
    if not may_train:
        hint = "Run it without --only, or with --only rank first"
        raise ConfigError("command line", "--only", "pack before rank", "rank before pack", hint)
    sample = conversion.extractor_runs()
    conversion.harmonise(sample)
    while (again := conversion.extractor_runs()) != sample:  # some were refused, others take their place
        sample = again
        conversion.harmonise(sample)
    series = conversion.parcel_series(sample)
    if not series:
        conversion.harmonise(conversion.runs)
        if len(conversion.refused()) == len(conversion.runs):
            return False
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
    return True


def tell(lines: list[str], file: str) -> None:
    """Print the first twenty of many lines and say where all of them stand."""
    for line in lines[:20]:
        print(line)
    if len(lines) > 20:
        print(f"... and {len(lines) - 20} more, see {file}")


if __name__ == "__main__":
    run(main)
