"""Predict a scan from itself with the MAE head, and map the explained variance.

    slim-brain reconstruct WEIGHTS scan.nii.gz --out FOLDER [--passes N] [--seed N]

Every place of the brain is hidden once, in all frames, and predicted from the other places. WEIGHTS are a pretraining
run with the MAE term, one of its checkpoints, or an export with the predictor (`slim-brain export --predictor`): a
folder, or its name on the hub. FOLDER gets

    predicted.nii.gz            the predicted scan, on the grid and at the TR of the scan and in its units
    explained_variance.nii.gz   1 - squared error / squares around the mean, of each voxel
    reconstruction.json         median, share of voxels above 0, which volumes were predicted, what was assumed
    reconstruction.png          slices, distribution, and three voxels over time
    explained_variance.html     an interactive view of the map; in MNI space also explained_variance_surface.html

Voxels outside the brain are 0. Volumes that were not predicted hold the mean of each voxel over the scan.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path

from shards.core.cli import DONE, Parser, summary
from shards.core.errors import ConfigError
from shards.core.room import require_room
from slim.checkpoints.source import require_weights

PREDICTED, EXPLAINED = "predicted.nii.gz", "explained_variance.nii.gz"
FACTS, FIGURE, VIEW = "reconstruction.json", "reconstruction.png", "explained_variance.html"


def _parser() -> Parser:
    parser = Parser("reconstruct", __doc__.splitlines()[0], "runs/lean sub-01_bold.nii.gz --out reconstructed/sub-01")
    add = parser.add_argument
    add("weights", metavar="WEIGHTS", help="a pretraining run with the MAE term, or an export with the predictor")
    add("scan", metavar="scan.nii.gz", help="preprocessed 4-D BOLD")
    add("--out", required=True, type=Path, metavar="FOLDER", help="folder of the results")
    add("--passes", type=int, default=4, metavar="N", help="groups of places; each is hidden once (default: 4)")
    add("--seed", type=int, default=0, metavar="N", help="seed of the groups (default: 0)")
    add("--mask", metavar="FILE", help="brain mask")
    add("--confounds", metavar="FILE", help="confounds table")
    add("--space", choices=("MNI", "native"), help="native: the brain mask is moved to the middle of the grid")
    add("--tr", type=float, metavar="S", help="TR in s, if the header is wrong")
    add("--dummy", metavar="N", default="auto", help="volumes dropped at the start (default: found)")
    add("--orientation", metavar="LAS", help="orientation of files that state none in the header")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    if args.passes < 2:
        raise ConfigError("command line", "--passes", args.passes, "2 or more")
    dummy = int(args.dummy) if args.dummy.isdigit() else args.dummy
    require_room(args.out, "--out")
    require_weights(args.weights)

    import torch

    from launchers.job import prepare
    from shards.cohorts.niimg import as_run
    from shards.core.files import dump, write_atomically
    from slim.explain import reconstruct
    from slim.reporting import reconstruction_figure

    on_gpu = torch.cuda.is_available()
    if find_spec("deepspeed") is not None:  # it reads the predictor of a run
        prepare(on_gpu)
    ours = reconstruct.Reconstructor.from_pretrained(args.weights, "cuda" if on_gpu else "cpu")
    stated = {"space": args.space, "tr": args.tr, "dummy": dummy, "orientation": args.orientation}
    with as_run(args.scan, args.mask, args.confounds, **stated) as run:
        found = reconstruct.reconstruct(ours, run, args.passes, args.seed)
        args.out.mkdir(parents=True, exist_ok=True)
        space, mean_N = found.space, found.scan.moments[0]
        predicted = space.volumes(found.predicted_TN, mean_N)
        space.save(args.out / PREDICTED, predicted, "SLIM-Brain: predicted from hidden places")
        explained = [space.map(found.explained_N)]
        space.save(args.out / EXPLAINED, explained, "SLIM-Brain: explained variance", in_time=False)
    about = reconstruct.summarise(found, ours)
    facts = {"scan": Path(args.scan).name, "stated": stated, **asdict(about)}
    write_atomically(args.out / FACTS, dump(facts) + "\n")
    reconstruction_figure.draw(found, args.out / FIGURE)
    reconstruction_figure.write_view(found, args.out / VIEW)
    for line in about.assumed:
        print(f"assumed: {args.scan}: {line}")
    rest = "; the others hold the mean of each voxel" if about.volumes_not_predicted else ""
    shown = {
        "explained variance, median": f"{about.median:.3f}",
        "voxels above 0": f"{about.share_above_0:.1%}",
        "predicted": f"{about.volumes_predicted} of {about.volumes} volumes{rest}",
        "interpolation in space": about.interpolation_in_space,
        "interpolation in time": about.interpolation_in_time,
        "out": str(args.out),
    }
    summary(
        {**shown, "facts": facts},
        f"look at {args.out / FIGURE}, and open {args.out / VIEW} to explore the map",
        args.json,
    )
    return DONE
