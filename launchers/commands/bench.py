"""Measure speed and memory against the software that this one replaces.

    slim-brain bench NAME [--repeat N] [--small] [--out FILE] [key=value ...]

Look at the ratios, not at the times. All processes run on one thread each. What is compared with what is written at the
head of `launchers/benches/NAME.py`.
"""

from __future__ import annotations

import importlib
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from launchers.benches import BENCHES
from shards.core.cli import DONE, REFUSED, Parser, summary
from shards.core.errors import ConfigError
from shards.core.progress import duration
from shards.core.settings import check, override

THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMEXPR_NUM_THREADS")


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser("bench", __doc__.splitlines()[0], "shards --repeat 3 frames=400")
    known = "; ".join(f"{name}: {what}" for name, what in BENCHES.items())
    parser.add_argument("bench", choices=BENCHES, metavar="NAME", help=known)
    parser.add_settings("sizes of the bench")
    parser.add_argument("--repeat", type=int, default=3, metavar="N", help="rounds of A B A B (default 3)")
    parser.add_argument("--small", action="store_true", help="a short trial of the call; its ratios mean nothing")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the JSON object to a file, too")
    args = parser.parse_args(argv)
    if args.repeat < 1:
        raise ConfigError("command line", "--repeat", args.repeat, "1 or more")
    if args.out and (args.out.is_dir() or not os.access(args.out.parent, os.W_OK)):
        raise ConfigError("command line", "--out", args.out, "a file in a folder that can be written")

    os.environ.update(dict.fromkeys(THREADS, "1"))  # before numpy is imported, and for the processes started here
    from launchers.benches import common
    from shards.core import files

    module = importlib.import_module(f"launchers.benches.{args.bench}")
    settings = check(module.Bench, override(module.SMALL if args.small else {}, args.settings), "command line")
    begun = time.monotonic()

    def tell(what: str) -> None:
        print(f"bench {args.bench}: {duration(time.monotonic() - begun)}: {what}", file=sys.stderr, flush=True)

    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        result = module.run(settings, args.repeat, Path(folder), tell)
    facts = {"bench": args.bench} | result.facts()
    common.show(facts)
    required = [ratio for ratio in facts["ratios"] if ratio["met"] is not None]
    facts["requirements_met"] = f"{sum(ratio['met'] for ratio in required)} of {len(required)}"
    facts["time"] = duration(time.monotonic() - begun)
    if args.out:
        files.write_atomically(args.out, files.dump(facts) + "\n")
    summary(facts, "", args.json)
    missed = [ratio["name"] for ratio in required if not ratio["met"]] if result.strict else []
    if missed:
        print(f"error: requirements not met: {'; '.join(missed)}", file=sys.stderr)
    return REFUSED if missed else DONE
