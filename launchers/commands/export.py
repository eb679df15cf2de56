"""Write the weights of a run as a folder that any machine can load.

    slim-brain export RUN --out DIR [--weights encoder|target] [--adapter]

RUN is a run folder (its newest complete checkpoint is taken) or one of its checkpoints. The folder holds the encoder
(safetensors), every setting, the temporal extractor, checksums and a model card; `SlimBrain.from_pretrained(DIR)` and
`slim-brain embed DIR` need nothing else, and it can be uploaded to a hub as it is. Somebody else may have written the
configuration of a run, so its URLs are opened only with --data.

Of a fine-tuning by LoRA the whole encoder is written, as of any other. --adapter writes the low-rank updates and the
head alone, with the name and the SHA-256 of the weights that they belong to; --base puts them together again.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from shards.core.cli import DONE, Parser, call_of, summary
from shards.core.errors import ConfigError
from slim.checkpoints.source import require_weights


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser("export", __doc__.splitlines()[0], "runs/lean --out export/lean")
    parser.add_argument("run", metavar="RUN", help="a run, one of its checkpoints, or a file of another --format")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="a new folder")
    parser.add_argument(
        "--weights", choices=("encoder", "target"), help="the online encoder (default) or its moving average"
    )
    parser.add_argument(
        "--extractor", type=Path, metavar="FOLDER", help="the temporal extractor, if the dataset cannot be read here"
    )
    parser.add_argument(
        "--parcels", type=Path, metavar="FILE", help="the label image of the parcels, if the dataset was made with one"
    )
    parser.add_argument(
        "--data", action="store_true", help="open the URLs of training datasets, for the cohorts and sessions in them"
    )
    parser.add_argument(
        "--format", choices=("slim-brain-2026",), help="RUN is the checkpoint of the authors of the paper"
    )
    parser.add_argument(
        "--axes", choices=("LAS", "RAS"), help="orientation of the volumes that it was trained with (default LAS)"
    )
    parser.add_argument(
        "--background", choices=("keep", "drop"), help="encode its patches without brain (default), or delete them"
    )
    parser.add_argument("--adapter", action="store_true", help="of a fine-tuning by LoRA: its updates and head alone")
    parser.add_argument("--base", metavar="WEIGHTS", help="the weights that were fine-tuned, if RUN is such an export")
    parser.add_argument(
        "--predictor", action="store_true", help="also the predictor with the MAE head, for slim-brain reconstruct"
    )
    args = parser.parse_args(argv)
    if args.predictor and args.weights == "target":
        expected = "encoder, with which the predictor was trained"
        raise ConfigError("command line", "--weights", "target with --predictor", expected)
    for source in (None if args.format else args.run, args.base):
        if source is not None:
            require_weights(source)

    from slim.checkpoints.weights import Base
    from slim.inference import export
    from slim.inference.slim_brain import SlimBrain

    model = SlimBrain.from_pretrained(
        args.run,
        args.weights,
        args.extractor,
        args.parcels,
        format=args.format,
        axes=args.axes,
        background=args.background,
        base=args.base,
    )
    predictor = None
    if args.predictor:
        from slim.explain.reconstruct import Reconstructor

        predictor = Reconstructor.from_pretrained(args.run).model.predictor.state_dict()
    about = export.write(model, args.out, remote=args.data, adapter=args.adapter, predictor=predictor)
    files = sorted(path for path in args.out.rglob("*") if path.is_file())
    facts = {
        "export": str(args.out),
        "run": about["made"]["run"],
        "step": about["made"]["step"],
        "weights": about["made"]["weights"],
        "parameters": about["made"]["parameters"],
        **({"base": str(Base.model_validate(about["made"]["base"]))} if args.adapter else {}),
        "bytes": sum(path.stat().st_size for path in files),
        "files": [path.relative_to(args.out).as_posix() for path in files],
    }
    then = call_of("embed", args.out, "RUN.nii.gz", "--out", "z.npz")
    if args.adapter:
        then = call_of("export", args.out, "--base", "WEIGHTS", "--out", "FOLDER") + " puts both together"
    following = f"read {args.out / 'README.md'} and complete it, then {then}"
    summary(facts, following, args.json)
    return DONE
