"""The checkpoint of the authors of SLIM-Brain (arXiv 2512.21881), in the form `slim-brain-2026`.

It is a file of `torch.save` with a dict `model_state_dict`. The code of its encoder was not published. The names and
shapes of its tensors are those of a Hiera encoder with the sizes of the preset `published`, one channel (the global
z-score of the scan) and separate position embeddings for space and time. Tensors of its decoder are left out.

Two facts are not known from the file, and are options:

- `axes`: the direction of the first axis of the volumes. HCP and FSL store LAS, which is the default; our grid is RAS.
  The two differ by a flip of x, which is applied to the weights: to the position embeddings in space and the kernel of
  the patches.
- `background`: "keep" encodes every patch of the grid, as the authors' fine-tuning does, with 0 outside the brain;
  "drop" deletes patches without brain, as this software does everywhere else.

Legend: C channels; L places of the grid of patches; T frames; X, Y, Z its axes; x, y, z those of a patch; V voxels of a
patch.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Literal, get_args

from torch import Tensor, nn

from shards.conversion.session import SessionSettings
from shards.core.errors import ConfigError
from shards.core.files import printable, sha256
from shards.core.settings import check
from shards.format import layout
from shards.format.manifest import DataRecord, GridRecord, WindowsRecord
from shards.preprocessing.harmonise import NORMALISATION
from slim.checkpoints import hub, torch_file
from slim.checkpoints.checkpoint import CheckpointError
from slim.checkpoints.hub import HubOptions
from slim.checkpoints.source import HUB_NAME, is_on_hub
from slim.checkpoints.weights import Weights, fit
from slim.config import PRESETS, ModelSettings, PretrainSettings
from slim.model.embedding import Seconds
from slim.ranking.rankers import make_ranker

FORMAT = "slim-brain-2026"
TENSORS = "model_state_dict"
FRAMES = 40
Axes = Literal["LAS", "RAS"]
Background = Literal["keep", "drop"]

_ACCEPTED = "a file of the authors, or OWNER/NAME[@REVISION] of it on the Hugging Face hub"
_LEFT_OUT = re.compile(r"mask_token|decoder.*|multi_scale.*")
_IN_BLOCK = r"blocks\.(\d+)\.(norm1|norm2|attn\.qkv|attn\.proj|mlp\.fc1|mlp\.fc2|proj)\.(weight|bias)"
_NAMED = 5  # number of tensors listed in an error


@dataclass(frozen=True)
class AuthorsWeights(Weights):
    """Weights that were converted from the authors' checkpoint.

    Attributes
    ----------
    tensors : dict of str to Tensor
        Tensors of the encoder, by the names of `slim.model.hiera.Hiera`.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict, repr=False)

    def load_into(self, encoder: nn.Module) -> None:
        fit(encoder, self.tensors, self.path, "")


def find(
    source: str | Path,
    axes: Axes = "LAS",
    background: Background = "keep",
    options: HubOptions | None = None,
    model: ModelSettings = PRESETS["published"],
    settings: SessionSettings | None = None,
) -> AuthorsWeights:
    """Read a checkpoint of the authors.

    Parameters
    ----------
    source : str or Path
        The file, or the name of a model on the hub that has one file `*.pth` or `*.pt`.
    axes, background
        See above.
    options : HubOptions, optional
        How the file is fetched from the hub.
    model : ModelSettings
        Sizes of the encoder; other sizes than the default are for tests.
    settings : SessionSettings, optional
        Preprocessing of scans: grid, TR, windows. By default that of `slim-brain make-shards`.

    Raises
    ------
    CheckpointError
        If the file cannot be read, holds anything but tensors, numbers and text, or its tensors do not fit.
    ConfigError
        If `axes` or `background` has another value.
    """
    for name, value, accepted in (("axes", axes, get_args(Axes)), ("background", background, get_args(Background))):
        if value not in accepted:
            raise ConfigError("from_pretrained", name, repr(value), " or ".join(accepted))
    path = _path(source, options or HubOptions())
    settings = settings or SessionSettings()
    tensors, left_out = _converted(_state(path), axes, settings.grid.grid().patch_shape, path)
    ranker = make_ranker("ridge")  # it needs no trained extractor, and theirs is not in the file
    tree = {"data": "unknown", "model": model, "model_name": "published", "view": "global", "run": {"out": path.stem}}
    k = FRAMES // settings.windows.frames
    return AuthorsWeights(
        settings=check(PretrainSettings, tree | {"windows": {"k": k, "best": k}}, path),
        data=_data(settings, ranker.identity()),
        made={
            "run": path.stem,
            "step": 0,
            "weights": "encoder",
            "commit": "unknown",
            "versions": {},
            "training": [],
            "format": FORMAT,
            "axes": axes,
            "background": background,
            "sha256": sha256(path),
            "left_out": left_out,
        },
        path=path,
        prefix="",
        head=None,
        folder=path.parent,
        results=Path(f"{path.stem}-results"),
        extractor=None,
        parcels=None,
        tensors=tensors,
    )


def find_as(
    format: str | None,
    source: str | Path,
    weights: str | None,
    axes: Axes | None,
    background: Background | None,
    options: HubOptions,
) -> AuthorsWeights:
    """`find`, after checking the arguments of `slim.inference.slim_brain.SlimBrain.from_pretrained`.

    Raises
    ------
    ConfigError
        If `format` is not FORMAT, or `weights` is not None or "encoder".
    """
    where = "from_pretrained"
    if format is None:
        name, value = ("background", background) if axes is None else ("axes", axes)
        raise ConfigError(where, name, value, f'none, without format="{FORMAT}"')
    if format != FORMAT:
        raise ConfigError(where, "format", format, f"{FORMAT}, or none for our own formats")
    if weights not in (None, "encoder"):
        raise ConfigError(where, "weights", weights, "encoder, the only weights of this format")
    return find(source, axes or "LAS", background or "keep", options)


def _path(source: str | Path, options: HubOptions) -> Path:
    """The file of a source; it is fetched from the hub if the user names a model there."""
    path = Path(source)
    if path.is_file():
        return path
    if is_on_hub(source) and (on_hub := HUB_NAME.fullmatch(str(source))):
        if on_hub[3] is not None:
            options = HubOptions(**{**vars(options), "revision": on_hub[3]})
        folder = hub.fetch(str(source), on_hub[1], options, ["*.pth", "*.pt"], _ACCEPTED)
        found = sorted(one for one in folder.rglob("*.pt*") if one.is_file())
        if len(found) != 1:
            got = ", ".join(one.name for one in found) or "none"
            raise CheckpointError(str(source), "files", got, "one file *.pth", "Download it, and give its path")
        return found[0]
    got = "a folder" if path.is_dir() else "no such file"
    raise CheckpointError(source, "", got, _ACCEPTED)


def _state(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, by the authors' names."""
    state = torch_file.read(path).get(TENSORS)
    if not isinstance(state, dict):
        got = "no such entry" if state is None else f"a {type(state).__name__}"
        raise CheckpointError(path, TENSORS, got, f"a dict of tensors, as in the format {FORMAT}")
    for name, tensor in state.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            got = f"{printable(str(name))[:80]}, which is no tensor of floating-point numbers"
            raise CheckpointError(path, TENSORS, got, "tensors by name")
    return state


def _converted(
    state: dict[str, Tensor], axes: Axes, places: tuple[int, ...], path: Path
) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors by our names, in float32; and the names of those that are left out."""
    left_out = sorted(name for name in state if _LEFT_OUT.fullmatch(name))
    found: dict[str, Tensor] = {}
    unknown = []
    for name, tensor in state.items():
        if name in left_out:
            continue
        if block := re.fullmatch(_IN_BLOCK, name):
            found[f"blocks.{block[1]}.{block[2].removeprefix('mlp.')}.{block[3]}"] = tensor.float()
        elif ending := re.fullmatch(r"encoder_norm\.(weight|bias)", name):
            found[f"norm.{ending[1]}"] = tensor.float()
        elif name == "pos_embed_spatial":
            found["space"] = _positions(name, tensor, axes, places, path)
        elif name == "pos_embed_temporal":
            _require(tensor.ndim == 3 and len(tensor) == 1, name, tensor, "(1, frames, channels)", path)
            found["time"] = tensor[0].float()
        elif name == "patch_embed.proj.weight":
            found["embed.whole.weight"] = _kernel(name, tensor, axes, path)
        elif name == "patch_embed.proj.bias":
            found["embed.bias"] = tensor.float()
        else:
            unknown.append(name)
    if unknown:
        more = f" and {len(unknown) - _NAMED} more" if len(unknown) > _NAMED else ""
        got = ", ".join(printable(name)[:60] for name in sorted(unknown)[:_NAMED]) + more
        raise CheckpointError(path, TENSORS, f"unknown tensors: {got}", f"those of the format {FORMAT}")
    if "embed.bias" in found:  # the authors' encoder has no positions in seconds
        found["seconds.linear.weight"] = Seconds(len(found["embed.bias"])).linear.weight.detach()
    return found, left_out


def _positions(name: str, tensor: Tensor, axes: Axes, places: tuple[int, ...], path: Path) -> Tensor:
    expected = f"(1, {prod(places)}, channels), a row for each patch of {' x '.join(map(str, places))}"
    _require(tensor.ndim == 3 and tensor.shape[:2] == (1, prod(places)), name, tensor, expected, path)
    space_XYZC = tensor[0].float().reshape(*places, -1)
    return (space_XYZC.flip(0) if axes == "LAS" else space_XYZC).flatten(0, 2).contiguous()


def _kernel(name: str, tensor: Tensor, axes: Axes, path: Path) -> Tensor:
    expected = "(channels, 1, 1, x, y, z), one channel and one frame"
    _require(tensor.ndim == 6 and tensor.shape[1:3] == (1, 1), name, tensor, expected, path)
    kernel_Cxyz = tensor[:, 0, 0].float()
    return (kernel_Cxyz.flip(1) if axes == "LAS" else kernel_Cxyz).flatten(1).contiguous()


def _require(fits: bool, name: str, tensor: Tensor, expected: str, path: Path) -> None:
    if not fits:
        raise CheckpointError(path, name, tuple(tensor.shape), expected)


def _data(settings: SessionSettings, ranker: dict[str, object]) -> DataRecord:
    """A description of the data that these weights read, in place of the manifest of their training data."""
    return DataRecord(
        format=layout.FORMAT,
        configuration={"settings": settings.model_dump(mode="json")},
        grid=GridRecord.of(settings.grid.grid()),
        tr=settings.grid.tr,
        tr_range=list(settings.grid.tr_range),
        normalisation=NORMALISATION,
        windows=WindowsRecord.model_validate(settings.windows.model_dump()),
        ranker=ranker,
        cohorts=[],
        sessions={},
    )
