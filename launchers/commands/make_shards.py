"""Convert preprocessed fMRI runs into a dataset of ranked windows.

    slim-brain make-shards COHORT.yaml [COHORT.yaml ...] --out DATASET [--workers N] [key=value ...]

The dataset holds WebDataset shards of Zarr arrays. A second call with the same arguments continues where the first one
stopped. It skips scans that have not changed, and scans that were refused (unless with --retry-refused). `--dry-run`
shows what was found and what will be refused. `--slurm SLURM.yaml` converts on a cluster, in an array of `--workers`
tasks; `slim-brain slurm shards` has more flags.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from contextlib import closing

from launchers.arguments import STEPS, add_conversion, checked_conversion
from shards.core.cli import Parser, call_of, summary
from shards.core.errors import ConfigError
from shards.core.presets import find


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser("make-shards", __doc__.splitlines()[0], "mylab.yaml --out data/mylab grid.mm=2")
    add_conversion(parser)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), metavar="N", help="processes")
    parser.add_argument("--only", default=",".join(STEPS), metavar="STEPS", help=f"some of {','.join(STEPS)}")
    parser.add_argument(
        "--slurm", metavar="SLURM", help="convert on a cluster with these settings, as the command slurm does"
    )
    parser.add_argument("--dry-run", action="store_true", help="show what was found and what will be refused, and stop")
    args = parser.parse_args(argv)
    steps = args.only.split(",")
    unknown = set(steps) - set(STEPS)
    if unknown:
        raise ConfigError("command line", "--only", sorted(unknown)[0], f"some of {', '.join(STEPS)}")
    if args.workers < 1:
        raise ConfigError("command line", "--workers", args.workers, "1 or more")
    if args.slurm is not None:
        return on_a_cluster(args, steps, sys.argv[1:] if argv is None else argv)
    cohorts, settings = checked_conversion(args)

    from launchers.cluster import conversion_jobs
    from launchers.conversion import conversion_of, dry_run, make

    conversion, given = conversion_of(args, cohorts, settings, args.workers)
    if args.dry_run:
        return dry_run(conversion, args.json)
    conversion_jobs.refuse_another(conversion.folder)
    with closing(conversion):
        status, facts, following = make(conversion, steps, given)
    summary(facts, following, args.json)
    return status


def on_a_cluster(args: argparse.Namespace, steps: list[str], argv: Sequence[str]) -> int:
    """Convert with SLURM jobs, and wait until they have finished."""
    if set(steps) != set(STEPS):
        raise ConfigError("command line", "--only", f"{args.only} with --slurm", "all steps: the jobs take one each")
    from launchers.cluster.scheduler import SlurmSettings
    from shards.core.settings import load

    cluster = load(SlurmSettings, find("slurm", args.slurm, "--slurm"))
    args.out = args.out.resolve()
    cohorts, settings = checked_conversion(args)

    from launchers.cluster import conversion_jobs
    from launchers.conversion import conversion_of

    conversion, given = conversion_of(args, cohorts, settings, cluster.cpus_per_task or 1)
    jobs = conversion_jobs.Chain(conversion, given, cluster, args.workers, None)
    if args.dry_run:
        return jobs.dry_run()
    return jobs.convert(shlex.split(call_of("make-shards", *argv)), follow=True, as_json=args.json)
