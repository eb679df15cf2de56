"""The steps of a conversion and their messages. One process does all of them here; on a cluster each is a job."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from shards.conversion import dry_run as survey
from shards.conversion.convert import Conversion
from shards.conversion.session import Parcels, by_assumption, is_harmonised
from shards.conversion.settings import ConvertSettings
from shards.core.cli import DONE, REFUSED, call_of, summary
from shards.core.errors import ConfigError
from shards.core.files import printable
from shards.core.progress import progress
from shards.core.settings import digest
from shards.format import layout
from shards.format.reader import Dataset
from shards.format.refusal import Refusal
from slim.ranking.extractor import CONFIG_FILE, Extractor
from slim.ranking.extractor_training import train_extractor
from slim.ranking.parcels import make_parcels
from slim.ranking.rankers import Ranker, make_ranker, versions

Ended = tuple[int, dict[str, object], str]  # exit status, facts of the summary, what to do next


def conversion_of(
    args: argparse.Namespace, cohorts: list[Path], settings: ConvertSettings, workers: int
) -> tuple[Conversion, Extractor | None]:
    """Make the conversion of a command line, and load its extractor if one is given. No cohort is read yet.

    Parameters
    ----------
    args : argparse.Namespace
        The arguments of `launchers.arguments.add_conversion`.
    cohorts, settings
        As returned by `launchers.arguments.checked_conversion`.
    workers : int

    Raises
    ------
    UserError
        If an argument is wrong.
    """
    one_thread()
    ranking: dict[str, object] = {"name": args.ranker, "extractor": None}
    given = Extractor.load(args.extractor) if args.extractor else None
    if args.ranker == "mutual":
        ranking["extractor"] = given.checksum if given else "trained on this dataset"
    elif given:
        got, expected = f"an extractor with --ranker {args.ranker}", "--ranker mutual, the only one that uses it"
        raise ConfigError("command line", "--extractor", got, expected, "Remove --extractor or change --ranker")
    version = args.ranker_version
    if version is None:
        version = _version_before(args.out, settings, ranking) or versions(args.ranker)[-1]
    elif version not in (known := versions(args.ranker)):
        expected = f"{' or '.join(map(str, known))}, the versions of {args.ranker}"
        raise ConfigError("command line", "--ranker-version", version, expected)
    ranking |= _named(version)
    parcels = parcels_of(settings)
    return Conversion(cohorts, args.out, settings, ranking, parcels, workers, args.retry_refused), given


def _named(version: int) -> dict[str, object]:
    """A version in the configuration of a conversion, without version 1: earlier conversions do not name it."""
    return {"version": version} if version > 1 else {}


def _version_before(folder: Path, settings: ConvertSettings, ranking: dict[str, object]) -> int | None:
    """The version of the ranker in the earlier conversion in a folder; None if it had other settings, or none is there.

    So that a dataset of an earlier version can be continued, and all of its sessions are ranked alike.
    """
    found = set()
    for path in (folder / layout.WORK / "configuration", folder / layout.MANIFEST):
        try:
            text = path.read_text(encoding="utf-8")
            found.add(text.strip() if path.parent != folder else json.loads(text)["configuration_hash"])
        except (OSError, ValueError, KeyError, TypeError):  # reported where the conversion is opened
            continue
    for version in versions(str(ranking["name"])):
        configuration = {"settings": settings.model_dump(mode="json"), "ranking": ranking | _named(version)}
        if digest(configuration) in found:
            return version
    return None


def parcels_of(settings: ConvertSettings) -> Parcels:
    """The parcels from which the temporal extractor and the ranker take their time series."""
    return make_parcels(settings.grid.grid(), settings.parcels)


def one_thread() -> None:
    """Use one thread, so that the trained extractor does not depend on the number of cores."""
    torch.set_num_threads(1)


def make(conversion: Conversion, steps: Sequence[str], given: Extractor | None) -> Ended:
    """Do steps of a conversion in this process and its workers."""
    conversion.open()
    conversion.find()
    conversion.begin()
    if "harmonise" in steps and "rank" not in steps:
        conversion.harmonise(conversion.runs)
    if ("rank" in steps or "pack" in steps) and not prepare_extractor(conversion, given, may_train="rank" in steps):
        return all_refused(conversion)
    if "rank" in steps:
        waiting = "harmonise" not in steps
        runs = [run for run in conversion.runs if not waiting or is_harmonised(conversion.folder, run)]
        conversion.rank(ranker_of(conversion), runs)
    if "pack" in steps:
        return finish(conversion)
    refused = conversion.refused()
    facts: dict[str, object] = {"runs": len(conversion.runs), "refused": len(refused)}
    return REFUSED if refused else DONE, facts, "call it with --only rank or --only pack"


def lacks_extractor(conversion: Conversion) -> bool:
    """Whether the ranker needs a temporal extractor that is not trained yet."""
    learns = conversion.configuration["ranking"]["name"] == "mutual"
    return learns and not (conversion.folder / layout.EXTRACTOR / CONFIG_FILE).is_file()  # written last


def ranker_of(conversion: Conversion) -> Ranker:
    """The ranker of a conversion. Its extractor, if it needs one, must be in the dataset folder."""
    ranking = conversion.configuration["ranking"]
    name, version = ranking["name"], ranking.get("version", 1)
    return make_ranker(name, conversion.folder / layout.EXTRACTOR if name == "mutual" else None, version=version)


def prepare_extractor(conversion: Conversion, given: Extractor | None, may_train: bool) -> bool:
    """Copy the given temporal extractor into the dataset folder, or train one on the training scans.

    Returns False if there is no extractor because every scan was refused.
    """
    if not lacks_extractor(conversion):
        return True
    folder = conversion.folder / layout.EXTRACTOR
    if given is not None:
        given.save(folder)
        return True
    if not may_train:
        hint = "Run it without --only, or with --only rank first"
        raise ConfigError("command line", "--only", "pack, but the scans are not ranked", "rank before pack", hint)
    sample = conversion.extractor_runs()
    conversion.harmonise(sample)
    while (again := conversion.extractor_runs()) != sample:  # others replace the scans that were refused
        sample = again
        conversion.harmonise(sample)
    series = conversion.parcel_series(sample)
    if not series:
        conversion.harmonise(conversion.runs)
        if len(conversion.refused()) == len(conversion.runs):
            return False
        reason = conversion.refused()[0].reason
        raise ConfigError(
            conversion.cohorts[0],
            "root",
            f"no readable training scan ({reason})",
            "training scans for the temporal extractor",
            "Repair them, or give a trained extractor with --extractor",
        )
    chosen, frames = conversion.settings.extractor, conversion.settings.windows.frames
    with progress("train the temporal extractor", chosen.steps, "steps") as advance:
        train_extractor(series, frames, chosen.steps, chosen.seed, advance).save(folder)
    return True


def finish(conversion: Conversion) -> Ended:
    """Pack the dataset, write its report page, and print what it holds and what was refused."""
    ranker = ranker_of(conversion)
    manifest = conversion.pack(ranker.identity())
    if manifest is None:
        return all_refused(conversion)
    refused = conversion.refused()
    report = conversion.folder / layout.REPORT / layout.PAGE
    if conversion.state.dataset is None or manifest is not conversion.state.dataset.manifest or not report.is_file():
        from shards.reporting import dataset_page  # imports matplotlib
        from shards.reporting.windows_view import Given

        report = dataset_page.write(conversion.folder, given=Given(conversion.parcels, energies=ranker.energies))
    _tell_losses(conversion, refused, str(report))
    facts = {
        "dataset": str(conversion.folder),
        "sessions": sum(manifest.sessions.values()),
        **manifest.sessions,
        "refused": len(refused),
        "shards": len(manifest.shards),
        "bytes": sum(shard.bytes for shard in manifest.shards),
        "report": str(report),
    }
    next_step = f"look at {report}, then {call_of('pretrain', 'CONFIG.yaml', f'data={conversion.folder}')}"
    return REFUSED if refused else DONE, facts, next_step


def all_refused(conversion: Conversion) -> Ended:
    """Finish a conversion in which all scans were refused."""
    refused = conversion.refused()
    conversion.write_refused()
    _tell_passed_over(conversion)
    _tell([f"refused: {line.reason}" for line in refused], layout.FAILED)
    path = conversion.folder / layout.FAILED
    return REFUSED, {"sessions": 0, "refused": len(refused)}, f"see {path}: no dataset was written"


def dry_run(conversion: Conversion, as_json: bool) -> int:
    """Print what a conversion would find and refuse, without writing anything."""
    conversion.find()
    found, refused = survey.look(conversion)
    for source, facts in found:
        print(survey.line(source, facts, conversion.splits[source.person]))
    for problem in refused:
        print(f"will be refused: {problem.line()}")
    cohorts = survey.cohorts(conversion, found)
    for name, about in cohorts.items():
        print("\n".join(survey.words(name, about)))
    _tell_passed_over(conversion)
    counts = {
        "runs": len(conversion.runs),
        "subjects": len({source.person for source in conversion.runs}),
        "will_be_refused": len(refused),
    }
    more: dict[str, object] = {
        "cohorts": {name: asdict(facts) for name, facts in cohorts.items()},
        "reasons": [problem.line() for problem in refused],
    }
    titles = {"will_be_refused": "refusals"}  # the lines above say "will be refused" of one run each
    summary({**counts, **more}, "run it without --dry-run", as_json, titles)
    return REFUSED if refused else DONE


def _tell_losses(conversion: Conversion, refused: list[Refusal], report: str) -> None:
    """Print which scans were refused, left out or ignored, and which assumptions were made."""
    _tell([f"refused: {line.reason}" for line in refused], layout.FAILED)
    sessions = Dataset(conversion.folder).sessions
    kept = {session.key for session in sessions} | {line.key for line in refused}
    _tell([f"left out: {key} is no longer found" for key in conversion.state.sessions if key not in kept], "no file")
    _tell_passed_over(conversion)
    moved = [
        f"native space: {session.key} moved by {session.centred_by_mm} mm to the middle of the grid; not registered"
        for session in sessions
        if session.centred_by_mm is not None
    ]
    _tell(moved, layout.SESSIONS)
    to_check = by_assumption(sessions).items()
    _tell([f"{keys[0]}{f' and {len(keys) - 1} more' * (len(keys) > 1)}: {words}" for words, keys in to_check], report)


def _tell_passed_over(conversion: Conversion) -> None:
    """Print which files were ignored, among them files that only the glob of a pattern matches, and missing labels."""
    for cohort in conversion.found:
        for note in cohort.notes:
            print(f"{cohort.settings.name}: {note}")
        lines = [
            f"ignored: {printable(path)}, because a field of the pattern does not match" for path in cohort.passed_over
        ]
        _tell(lines, f"{cohort.settings.name}'s pattern")


def _tell(lines: list[str], file: str) -> None:
    """Print the first twenty lines, and the file that lists all of them."""
    for line in lines[:20]:
        print(line)
    if len(lines) > 20:
        print(f"... and {len(lines) - 20} more, see {file}")
