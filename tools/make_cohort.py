"""Write a synthetic BIDS-derivative cohort in MNI space with known truth: no licence, nothing to download.

    python tools/make_cohort.py --out cohort
    python tools/make_cohort.py --out cohort --subjects 8 --frames 200 --voxel-mm 2 --seed 1

The files, and what is planted in them, are described in `shards/synthetic/write.py`. The same call over the same
folder writes the same bytes again, so a call that was stopped is finished by repeating it.
"""

from __future__ import annotations

import shlex
import time
from dataclasses import asdict
from pathlib import Path

from shards.core.cli import DONE, Parser, duration, progress, run, summary
from shards.synthetic.truth import SyntheticCohort
from shards.synthetic.write import write_cohort


def main() -> int:
    usual = SyntheticCohort()
    parser = Parser(
        "Write a synthetic BIDS-derivative cohort in MNI space with known truth.",
        "python tools/make_cohort.py --out cohort --subjects 24 --sessions 2",
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
    ):
        value = getattr(usual, name)
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            type=type(value),
            default=value,
            metavar="N",
            help=f"{unit} (default {value})",
        )
    arguments = parser.parse_args()
    cohort = SyntheticCohort(**{name: getattr(arguments, name) for name in asdict(usual)})

    begun = time.monotonic()
    with progress("synthetic cohort", len(cohort.runs()), "runs") as advance:
        write_cohort(arguments.out, cohort, advance)
    config = arguments.out / "cohort.yaml"
    facts = {"cohort": str(config), "runs": len(cohort.runs())} | asdict(cohort)
    facts["time"] = duration(time.monotonic() - begun)
    next_step = ["python", "tools/make_shards.py", str(config), "--out", f"{arguments.out}-shards"]
    summary(facts, shlex.join(next_step), arguments.json)
    return DONE


if __name__ == "__main__":
    run(main)
