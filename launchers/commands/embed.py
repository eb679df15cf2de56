"""Encode scans straight from NIfTI: a vector for each window or run.

    slim-brain embed WEIGHTS run.nii.gz [more.nii.gz ...] --out vectors.npz [--per run] [--pooling mean+sd]

Scans are harmonised, ranked and encoded as the training data of the weights were. WEIGHTS is a folder of `slim-brain
export`, its name on the hub, a run, or a checkpoint. A scan that cannot be converted is named and the
others are encoded (exit status 1). The file, for `numpy.load`, holds

    vectors    float32, a row for each window (each run, with --per run), run after run, windows in time order
    run        number of the run that each row is of, into `keys` and `sources`
    start      s from the start of the run, of each row's window (--per window)
    tr         s, of each run: TR of the frames that were encoded
    source_tr  s, of each run: TR of the scan, as it was read or stated with --tr
    keys       names of the runs
    sources    their files: of an absolute path the last part, all of it with --paths
    places     flat places of the cells, with --pooling location: those that hold brain in all runs given here
    answers    of fine-tuned weights, a row for each run: the probability of each of `classes`, or the value
    classes    their names
    about      JSON: weights, their checksum, step, stage, pooling, versions, what was assumed about each run

What was assumed about a run (its space, its orientation ...) is printed, a line each: `assumed: FILE: ...`.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from shards.core.cli import DONE, REFUSED, Parser, summary
from shards.core.errors import ConfigError, DatasetError, RunRefused
from shards.core.progress import progress
from shards.core.room import require_room
from slim import __version__
from slim.checkpoints.source import require_weights


def _parser() -> Parser:
    parser = Parser("embed", __doc__.splitlines()[0], "export/ sub-01_bold.nii.gz --out vectors.npz")
    parser.add_argument("weights", metavar="WEIGHTS", help="an exported folder, OWNER/NAME on the hub, or a run")
    parser.add_argument("runs", nargs="+", metavar="run.nii.gz", help="preprocessed 4-D BOLD")
    parser.add_argument("--out", required=True, type=Path, metavar="FILE.npz", help="file to write the vectors to")
    parser.add_argument("--per", choices=("window", "run"), default="window", help="one vector for each window or run")
    parser.add_argument("--pooling", default="mean", metavar="NAME", help="mean (default), mean+sd or location")
    parser.add_argument("--stage", type=int, metavar="N", help="stage of the encoder, from 1 (default: the last)")
    parser.add_argument(
        "--mask", action="append", metavar="FILE", help="brain mask, one for all runs or one for each in their order"
    )
    parser.add_argument("--confounds", action="append", metavar="FILE", help="confounds tables, one for each run")
    parser.add_argument(
        "--space", choices=("MNI", "native"), help="native: the brain mask is moved to the middle of the grid"
    )
    parser.add_argument("--tr", type=float, metavar="S", help="TR in s, if the header is wrong")
    parser.add_argument("--dummy", metavar="N", default="auto", help="volumes dropped at the start (default: found)")
    parser.add_argument("--orientation", metavar="LAS", help="orientation of files that state none in the header")
    parser.add_argument("--paths", action="store_true", help="keep absolute paths whole in the file")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    masks = _each(args.mask, "--mask", len(args.runs), shared=True)
    tables = _each(args.confounds, "--confounds", len(args.runs), shared=False)
    dummy = int(args.dummy) if args.dummy.isdigit() else args.dummy
    stated = {"space": args.space, "tr": args.tr, "dummy": dummy, "orientation": args.orientation}
    if args.out.suffix != ".npz":
        raise ConfigError("command line", "--out", args.out, "a name that ends with .npz")

    require_room(args.out.parent, "--out")
    require_weights(args.weights)

    import numpy as np
    import torch

    from shards.conversion.session import assumptions
    from shards.core.files import atomically, dump, without_folders
    from slim.config import FinetuneSettings
    from slim.inference.slim_brain import SlimBrain
    from slim.inference.vectors import check_fixed, common_places, vectors

    check_fixed(args.per, args.pooling)
    shown = str if args.paths else without_folders  # the file is sent to others
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = SlimBrain.from_pretrained(args.weights).to(device)
    sources, found, refused = [], [], []
    assumed: dict[str, list[str]] = {}
    answers: list[Any] | None = None if model.head is None else []
    with progress("encode", len(args.runs), "runs") as advance:
        for source, mask, table in zip(args.runs, masks, tables, strict=True):
            try:
                made = model.convert(source, mask=mask, confounds=table, **stated)
                found.append(model.encode_converted(made, args.stage))
                sources.append(source)
                assumed[source] = assumptions(made.meta)
                if answers is not None:
                    answers.append(model.outputs_converted(made))
            except (RunRefused, DatasetError) as error:
                refused.append(error.line())
            advance(1, source)
    for line in refused:
        print(f"refused: {line}")
    for source, lines in assumed.items():
        for line in lines:
            print(f"assumed: {source}: {line}")
    facts: dict[str, object] = {"runs": len(found), "refused": len(refused), "reasons": refused}
    if not found:
        summary(facts, "nothing was written: correct the runs above, or give others", args.json)
        return REFUSED
    arrays: dict[str, Any] = {"keys": [item.key for item in found], "sources": [*map(shown, sources)]}
    arrays |= {name: np.array([getattr(item, name) for item in found]) for name in ("tr", "source_tr")}
    facts |= {"TR": _trs(arrays["tr"], arrays["source_tr"]), "assumed": assumed}
    facts |= {name: arrays[name].tolist() for name in ("tr", "source_tr")}
    places = [item.places for item in found]
    if args.pooling == "location":
        arrays["places"] = common_places(found)
        places = [arrays["places"]] * len(found)
    rows = [np.atleast_2d(vectors(item, args.per, args.pooling, at)) for item, at in zip(found, places, strict=True)]
    arrays["vectors"] = np.concatenate(rows)
    arrays["run"] = np.repeat(np.arange(len(rows)), [len(part) for part in rows])
    if args.per == "window":
        arrays["start"] = np.concatenate([item.window_onsets for item in found])
    if answers is not None and isinstance(model.settings, FinetuneSettings):
        classes = model.settings.answer.classes
        arrays |= {"answers": np.stack(answers), "classes": list(classes)}
        said = [
            f"{classes[row.argmax()]} ({row.max():.2f})" if classes else f"{row[0]:.4g}" for row in arrays["answers"]
        ]
        facts |= {"label": model.settings.answer.label, "answers": said}
    about = {
        "weights": args.weights,
        "checksum": model.checksum,
        "step": model.step,
        "stage": args.stage,
        "per": args.per,
        "pooling": args.pooling,
        "stated": stated,
        "assumed": assumed,
        "versions": {"slim-brain": __version__, **{name: version(name) for name in ("torch", "numpy")}},
    }
    with atomically(args.out) as file:
        np.savez(file, **arrays, about=shown(dump(about)))
    count, length = arrays["vectors"].shape
    facts |= {"out": str(args.out), "vectors": count, "length": length, "per": args.per, "step": model.step}
    summary(facts, f"numpy.load('{args.out}')['vectors'], float32 {count} x {length}", args.json)
    return REFUSED if refused else DONE


def _trs(tr: Any, source_tr: Any) -> str:
    """The TRs as text: each different one, and the TR it was resampled to."""
    pairs = sorted(set(zip(source_tr.tolist(), tr.tolist(), strict=True)))
    return ", ".join(f"{old:g} s" if old == new else f"{old:g} s brought to {new:g} s" for old, new in pairs)


def _each(given: list[str] | None, option: str, runs: int, shared: bool) -> list[str | None]:
    """A file for each run."""
    if given is None:
        return [None] * runs
    if shared and len(given) == 1:
        return [given[0]] * runs
    if len(given) != runs:
        expected = f"{'one, or ' if shared else ''}{runs}, one for each run"
        raise ConfigError("command line", option, f"{len(given)} files", expected)
    return [*given]
