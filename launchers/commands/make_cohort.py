"""Write a synthetic cohort with known truth: no licence, nothing to download.

    slim-brain make-cohort --out cohort
    slim-brain make-cohort --out cohort --subjects 8 --frames 200 --voxel-mm 2 --seed 1

The cohort is a BIDS derivative in MNI space; `shards/synthetic/write.py` describes its files and what is planted in
them. The same call over the same folder writes the same bytes again, so repeat a call that was stopped to finish it.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from shards.core.cli import DONE, Parser, call_of, summary
from shards.core.progress import duration, progress
from shards.synthetic.truth import SyntheticCohort


def main(argv: Sequence[str] | None = None) -> int:
    usual = SyntheticCohort()
    parser = Parser(
        "make-cohort",
        __doc__.splitlines()[0],
        "--out cohort --subjects 24 --sessions 2",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write")
    for name, unit in (
        ("subjects", "number of subjects"),
        ("sessions", "sessions of each subject"),
        ("frames", "frames of each session"),
        ("voxel_mm", "edge of a voxel, mm"),
        ("tr", "repetition time, s"),
        ("snr", "network activity over noise in a voxel"),
        ("seed", "the same seed gives the same bytes"),
        ("recipe", "3 adds traits that are finer than parcels"),
    ):
        value = getattr(usual, name)
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            type=type(value),
            default=value,
            metavar="N",
            help=f"{unit} (default {value})",
        )
    parser.add_argument(
        "--noise",
        type=Path,
        metavar="SCAN",
        help="surrogates of this scan as noise (default: a random field)",
    )
    arguments = parser.parse_args(argv)
    cohort = SyntheticCohort(**{name: getattr(arguments, name) for name in asdict(usual)})

    from shards.synthetic.write import write_cohort

    begun = time.monotonic()
    with progress("synthetic cohort", len(cohort.runs()), "runs") as advance:
        write_cohort(arguments.out, cohort, advance)
    config = arguments.out / "cohort.yaml"
    facts = {"cohort": str(config), "runs": len(cohort.runs())} | asdict(cohort)
    facts["noise"] = None if cohort.noise is None else str(cohort.noise)
    facts["time"] = duration(time.monotonic() - begun)
    next_step = call_of("make-shards", config, "--out", f"{arguments.out}-shards")
    summary(facts, next_step, arguments.json)
    return DONE
