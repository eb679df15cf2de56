"""Train the temporal extractor that ranks windows, on converted datasets.

    slim-brain train-extractor DATASET [DATASET ...] --out FOLDER [--steps N] [--seed K] [--sessions N]

It learns from the training split alone. `--sessions` sessions are drawn with the seed, and only those are read. The
same seed and datasets give the same bytes. `slim-brain make-shards --extractor FOLDER` ranks windows with it.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from shards.conversion.extractor_settings import ExtractorSettings
from shards.core.cli import DONE, Parser, call_of, summary
from shards.core.errors import ConfigError
from shards.core.progress import progress
from shards.core.settings import check

if TYPE_CHECKING:
    from shards.format.reader import Dataset


def main(argv: Sequence[str] | None = None) -> int:
    default = ExtractorSettings()
    parser = Parser("train-extractor", __doc__.splitlines()[0], "data/mylab --out extractors/mylab")
    parser.add_argument("datasets", nargs="+", metavar="DATASET", help="a dataset that make-shards wrote")
    parser.add_argument("--out", required=True, type=Path, metavar="FOLDER", help="folder to write the extractor to")
    parser.add_argument("--steps", type=int, default=default.steps, metavar="N", help=f"default: {default.steps}")
    parser.add_argument("--seed", type=int, default=default.seed, metavar="K", help=f"default: {default.seed}")
    parser.add_argument(
        "--sessions",
        type=int,
        default=default.sessions,
        metavar="N",
        help=f"training sessions drawn, at most 256 (default: {default.sessions})",
    )
    args = parser.parse_args(argv)
    tree = {"sessions": args.sessions, "steps": args.steps, "seed": args.seed}
    chosen = check(ExtractorSettings, tree, "command line")

    from shards.format.reader import Dataset

    datasets = [Dataset(folder) for folder in args.datasets]
    frames = check_datasets(datasets)
    make_room(args.out)

    import torch

    from slim.ranking.extractor_training import train_extractor

    torch.set_num_threads(1)  # the result does not depend on the number of cores
    train = [(dataset, session) for dataset in datasets for session in dataset.of_split("train")]
    drawn = chosen.draw(train, lambda pair: pair[1].key)
    series = []
    with progress("read the parcels", len(drawn), "sessions") as advance:
        for dataset, session in drawn:
            arrays = dataset.read(session, ("roi", "roi_centre"))
            series.append((arrays["roi"], arrays["roi_centre"]))
            advance(1, session.key)
    with progress("train the temporal extractor", chosen.steps, "steps") as advance:
        extractor = train_extractor(series, frames, chosen.steps, chosen.seed, advance)
    extractor.save(args.out)
    facts: dict[str, object] = {
        "extractor": str(args.out),
        "checksum": extractor.checksum,
        "sessions": len(series),
        "of": len(train),
        "steps": chosen.steps,
        "seed": chosen.seed,
        "frames": frames,
        "parameters": extractor.parameters,
    }
    following = call_of("make-shards", "COHORT.yaml", "--out", "DATASET", "--extractor", args.out)
    summary(facts, following, args.json)
    return DONE


def check_datasets(datasets: list[Dataset]) -> int:
    """The number of frames in a window, which must be the same in all datasets.

    Raises
    ------
    ConfigError
        If the window lengths differ, a dataset is given twice, or a dataset has no training session.
    """
    first = datasets[0]
    for number, dataset in enumerate(datasets):
        if dataset.folder in [other.folder for other in datasets[:number]]:
            raise ConfigError("command line", "DATASET", f"{dataset.folder} a second time", "each dataset once")
        if not dataset.of_split("train"):
            hint = "Leave it out, or convert a cohort with more subjects"
            raise ConfigError(dataset.folder, "train", "no session", "at least one to learn from", hint)
        if dataset.frames != first.frames:
            expected = f"{first.frames}, those of {first.folder}"
            hint = "Train an extractor for each window length"
            raise ConfigError(dataset.folder, "windows.frames", dataset.frames, expected, hint)
    return first.frames


def make_room(out: Path) -> None:
    """Make the folder of the extractor, before training starts.

    Weights without a configuration, which a killed call leaves, are overwritten.
    """
    hint = "Give another --out"
    if out.is_file():
        raise ConfigError(out, "--out", "a file", "a folder", hint)
    try:
        out.mkdir(parents=True, exist_ok=True)
        found = sorted(path.name for path in out.iterdir() if not path.name.endswith(".tmp"))
    except OSError as error:
        raise ConfigError(out, "--out", error.strerror, "a folder that can be written", hint) from None
    if not os.access(out, os.W_OK):
        raise ConfigError(out, "--out", "a folder that cannot be written", "one that can", hint)
    from slim.ranking.extractor import WEIGHTS_FILE

    if set(found) - {WEIGHTS_FILE}:
        raise ConfigError(out, "--out", f"a folder with {', '.join(found[:3])}", "a new or empty folder", hint)
