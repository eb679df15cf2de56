"""Weights and what is known of them, wherever they lie: in a run, in an exported folder, on a hub.

An exported folder (written by `slim.inference.export`)::

    model.safetensors   the encoder, fp32
    head.safetensors    of a fine-tuned encoder, the head
    config.json         settings of the run, manifest of its data, what was exported, who was seen (as hashes)
    extractor/          the temporal extractor, if windows were ranked by one
    parcels/            the label image of the parcels, if there was one
    SHA256SUMS          of all files above, compared whenever it is loaded (and by `sha256sum -c SHA256SUMS`)
    README.md           the model card, which people may edit
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, StrictStr
from torch import nn

from shards.core import files
from shards.core.errors import ConfigError
from shards.core.files import printable
from shards.core.settings import check
from shards.format import layout
from shards.format.manifest import DataRecord
from slim.checkpoints import checkpoint
from slim.checkpoints.checkpoint import CheckpointError
from slim.checkpoints.provenance import Provenance
from slim.checkpoints.run_folder import ABOUT_RUN, ALSO_ABOUT_RUN, CHECKPOINTS, SEEN
from slim.checkpoints.run_folder import CONFIG as RUN_CONFIG
from slim.checkpoints.run_folder import DATASET as RUN_DATA
from slim.checkpoints.seen import Seen
from slim.config import FinetuneSettings, TrainSettings, check_run, load_run

FORMAT = 1
MODEL, HEAD, CONFIG, SUMS, CARD = "model.safetensors", "head.safetensors", "config.json", "SHA256SUMS", "README.md"
EXTRACTOR, PARCELS = "extractor", "parcels"
KINDS = ("encoder", "target")
_WHAT = "a run, one of its checkpoints, an exported folder, or OWNER/NAME[@REVISION] on the Hugging Face hub"
_AGAIN = "Copy or download the folder again"
_MOST_BYTES = 1 << 28  # of config.json and dataset.json, which hold a hash for everybody seen


class _Facts(BaseModel):
    """What is read of a file that anybody may have written; it may hold more."""

    model_config = ConfigDict(extra="ignore", frozen=True)


class _Tuned(_Facts):
    task: StrictStr
    cohorts: tuple[StrictStr, ...]
    head: StrictStr
    from_scratch: StrictBool


class _Made(_Facts):
    run: StrictStr
    step: StrictInt = Field(ge=0)
    weights: Literal["encoder", "target"]
    commit: StrictStr
    versions: dict[StrictStr, StrictStr]
    training: tuple[dict[StrictStr, Any], ...] = ()
    finetuned: _Tuned | None = None


class _Configuration(_Facts):
    settings: dict[StrictStr, Any]


class _Ranker(_Facts):
    name: StrictStr
    extractor: StrictStr | None = None
    seed: StrictInt = 0


class _Data(_Facts):
    """Of the data, beyond what `shards.format.manifest` asks for."""

    configuration: _Configuration
    ranker: _Ranker
    cohorts: tuple[StrictStr, ...]


@dataclass(frozen=True)
class Weights:
    """Weights of an encoder.

    Attributes
    ----------
    settings : PretrainSettings or FinetuneSettings of the run
    data : DataRecord, of the first dataset it was trained on
    made : dict, how they came about: `run`, `step`, `weights` ("encoder" or "target"), `commit`, `versions`;
        `training`, what is known of each dataset of the pretraining, once they were exported; and of a fine-tuned
        encoder `finetuned`: `task`, `cohorts` whose labels it was shown, `head`, `from_scratch`
    path : Path, the safetensors file
    prefix : str, before the names of its tensors
    head : (Path, str) or None, the same of the head of a fine-tuning
    folder : Path, the run or the exported folder
    results : Path, where tools put what they find by default: the run; of an export, which is shared as it is,
        `NAME-results` in the working folder
    seen : Seen or None, who was seen in pretraining; None where that is not known
    extractor, parcels : Path or None, where the temporal extractor and the label image of its data are expected
    """

    settings: TrainSettings
    data: DataRecord
    made: dict[str, Any]
    path: Path
    prefix: str
    head: tuple[Path, str] | None
    folder: Path
    results: Path
    extractor: Path | None
    parcels: Path | None
    seen: Seen | None = None

    def load_into(self, encoder: nn.Module) -> None:
        """Copy the tensors of the encoder: every one must be there with its shape, and none besides.

        Raises
        ------
        CheckpointError
            With the name of the first that is not, and both shapes.
        """
        _load(encoder, self.path, self.prefix)

    def load_head(self, head: nn.Module) -> None:
        """The same of the head of a fine-tuning."""
        assert self.head is not None
        _load(head, *self.head)


def _load(module: nn.Module, path: Path, prefix: str) -> None:
    given, wanted = checkpoint.read_weights(path, prefix), module.state_dict()
    for name in sorted(wanted.keys() | given.keys()):
        got = tuple(given[name].shape) if name in given else "no such tensor"
        expected = tuple(wanted[name].shape) if name in wanted else "no such tensor"
        if got != expected:
            raise CheckpointError(path, f"{prefix}{name}", got, expected, "These weights are of another configuration")
        if not bool(torch.isfinite(given[name]).all()):
            hint = "Do not use these weights: train again with a lower optimizer.lr, or take an earlier checkpoint"
            raise CheckpointError(path, f"{prefix}{name}", "numbers that are not finite", "finite ones", hint)
    module.load_state_dict(given, strict=True)


def find(source: str | Path, kind: str | None = None) -> Weights:
    """Find weights; their tensors are read by `Weights.load_into`.

    Parameters
    ----------
    source : str or Path
        A run (its newest complete checkpoint is taken), a checkpoint of it, an exported folder, or OWNER/NAME on the
        hub, which may go on with @ and a tag, branch or commit.
    kind : "encoder" or "target", optional
        The online encoder, or its moving average; by default the former of a run, and of an export what it holds. A
        fine-tuning has the encoder of its best epoch, and no moving average.

    Raises
    ------
    CheckpointError
        If there are none, or they are incomplete or damaged.
    ConfigError
        If the run's configuration cannot be read, or `kind` is neither.
    """
    if kind is not None and kind not in KINDS:
        raise ConfigError("weights", "", kind, f"one of {', '.join(KINDS)}")
    folder = Path(source)
    on_hub = re.fullmatch(r"([\w.-]+/([\w.-]+))(?:@([\w./-]+))?", source) if isinstance(source, str) else None
    if on_hub and not folder.parent.exists():
        return _of_export(_fetch(str(source), on_hub[1], on_hub[3]), kind, on_hub[2])
    if (folder / SUMS).is_file() or (folder / CONFIG).is_file():
        return _of_export(folder, kind, folder.resolve().name)
    return _of_run(folder, kind or "encoder")


def _of_run(folder: Path, kind: str) -> Weights:
    if (folder / checkpoint.COMPLETE).is_file():
        found, run = folder, folder.parent.parent
    elif (folder / RUN_CONFIG).is_file():
        newest = checkpoint.newest(folder / CHECKPOINTS)
        if newest is None:
            hint = "Go on with the pretraining until it has saved"
            raise CheckpointError(folder, CHECKPOINTS, "no complete checkpoint", "at least one", hint)
        found, run = newest, folder
    else:
        got = "neither a run, nor a checkpoint, nor an export" if folder.is_dir() else "no such folder"
        raise CheckpointError(folder, "", got, _WHAT)
    fault = checkpoint.fault(found, [checkpoint.WEIGHTS, *ABOUT_RUN])
    if fault is not None:
        raise fault
    settings, facts = load_run(found / RUN_CONFIG), checkpoint.facts(found)
    fault = checkpoint.fault(found, [name for name in ALSO_ABOUT_RUN if name in facts["files"]])
    if fault is not None:
        raise fault
    seen = Seen.read(found if SEEN in facts["files"] else run)
    provenance = Provenance.read(found)
    made = {
        "run": _name(run.resolve(), settings),
        "step": facts["step"],
        "weights": kind,
        "commit": provenance.commit,
        "versions": provenance.named() | facts["versions"],
    }
    path, prefix, head = found / checkpoint.WEIGHTS, f"{kind}.", None
    data = _data(_tree(found / RUN_DATA), found / RUN_DATA)
    _check_size(settings, data, path)
    if isinstance(settings, FinetuneSettings):
        made |= _finetuned(path, kind, settings, data)
        prefix, head = f"{checkpoint.BEST}{prefix}", (path, f"{checkpoint.BEST}head.")
    dataset, extractor = settings.data[0].path, run / layout.EXTRACTOR
    if not extractor.is_dir() and "://" not in dataset:  # of a run that somebody sent, nothing opens a URL
        extractor = Path(dataset) / layout.EXTRACTOR
    return Weights(settings, data, made, path, prefix, head, run, run, extractor, None, seen)


def _name(run: Path, settings: TrainSettings) -> str:
    """A run's name; fine-tunings of a task are folders of one."""
    return f"{run.parent.name}-{run.name}" if isinstance(settings, FinetuneSettings) else run.name


def _finetuned(path: Path, kind: str, settings: FinetuneSettings, data: DataRecord) -> dict[str, Any]:
    """What is known of a fine-tuned encoder beside that of any run: its `step` is that of the best epoch."""
    if kind != "encoder":
        raise CheckpointError(path, "weights", "those of a fine-tuning", "encoder, as it keeps no moving average")
    tensors = checkpoint.read_weights(path, f"{checkpoint.BEST}of")
    if not tensors:
        raise CheckpointError(path, f"{checkpoint.BEST}of", "no such tensor", "the best epoch", _AGAIN)
    loss, step = tensors[""].tolist()
    if not math.isfinite(loss):
        hint = "Let it train for an epoch; if it has, lower optimizer.lr"
        raise CheckpointError(path, "val_loss", "no finite number yet", "one, by which the best epoch is told", hint)
    before = settings.before or {}
    seen = {*data.cohorts, *before.get("finetuned", {}).get("cohorts", [])}
    tuned = {
        "task": settings.answer.task,
        "cohorts": sorted(seen),
        "head": settings.head.pooling,
        "from_scratch": settings.start is None,
    }
    return {"step": int(step), "finetuned": tuned} | {name: before[name] for name in ("training",) if name in before}


def _of_export(folder: Path, kind: str | None, name: str) -> Weights:
    listed = _compared(folder)
    about = _tree(folder / CONFIG)
    for field in ("format", "made", "settings", "data"):
        if field not in about:
            raise CheckpointError(folder / CONFIG, field, "nothing", "an export's config", _AGAIN)
    if about["format"] != FORMAT:
        raise CheckpointError(folder / CONFIG, "format", about["format"], FORMAT, "Export the run with this version")
    made = about["made"]
    check(_Made, made, folder / CONFIG, CheckpointError)
    if not isinstance(about["settings"], dict):
        raise CheckpointError(folder / CONFIG, "settings", type(about["settings"]).__name__, "a mapping", _AGAIN)
    if kind not in (None, made["weights"]):
        raise CheckpointError(folder, "weights", made["weights"], kind, f"Export the run with --weights {kind}")
    settings = check_run(about["settings"], folder / CONFIG)
    image = next((folder / one for one in listed if one.startswith(f"{PARCELS}/")), None)
    head = (folder / HEAD, "") if isinstance(settings, FinetuneSettings) else None
    if head and HEAD not in listed:
        raise CheckpointError(folder / SUMS, "", f"no checksum of {HEAD}", "that of a fine-tuned export", _AGAIN)
    paths = (head, folder, Path(f"{name}-results"), folder / EXTRACTOR, image)
    seen = Seen.from_tree(about["seen"], folder / CONFIG) if "seen" in about else None
    data = _data(about["data"], folder / CONFIG)
    _check_size(settings, data, folder / MODEL)
    return Weights(settings, data, made, folder / MODEL, "", *paths, seen)


def _tree(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises
    ------
    CheckpointError
        If the file is too large, or holds something else.
    """
    try:
        if (size := path.stat().st_size) > _MOST_BYTES:
            raise CheckpointError(path, "", f"a file of {size} bytes", f"at most {_MOST_BYTES}", _AGAIN)
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(path, "", f"unreadable ({error!r})", "a JSON object", _AGAIN) from None
    if not isinstance(tree, dict):
        raise CheckpointError(path, "", f"unreadable (a {type(tree).__name__})", "a JSON object", _AGAIN)
    return tree


def _data(tree: Any, where: Path) -> DataRecord:
    """What is known of the training data, if it is that; else CheckpointError."""
    if not isinstance(tree, dict):
        raise CheckpointError(where, "data", type(tree).__name__, "a manifest without shards", _AGAIN)
    try:
        data = check(DataRecord, tree, where, CheckpointError)
    except CheckpointError as error:
        raise CheckpointError(error.where, error.field, error.got, error.expected, _AGAIN) from None
    check(_Data, tree, where, CheckpointError)
    return data


def _check_size(settings: TrainSettings, data: DataRecord, path: Path) -> None:
    """Refuse a model whose weights cannot be in the file: it is found before anything is allocated.

    Raises
    ------
    CheckpointError
        With bytes at least needed and bytes there.
    """
    try:
        size = path.stat().st_size
    except OSError as error:
        raise CheckpointError(path, "", error.strerror, "a safetensors file", _AGAIN) from None
    if (needed := 4 * fewest_parameters(settings, data)) > size:
        got = f"{size} bytes"
        raise CheckpointError(
            path, "", got, f"at least {needed} for the sizes in its settings (model, windows)", _AGAIN
        )


def fewest_parameters(settings: TrainSettings, data: DataRecord) -> int:
    """Numbers that the encoder of these settings has at the least: its matrices and positions."""
    model, grid = settings.model, data.grid.grid()
    places = math.prod(grid.patch_shape)
    count = (places + settings.windows.k * data.windows.frames + grid.voxels) * model.embed
    for stage, depth in enumerate(model.depths):
        dim = model.embed * 2**stage
        count += depth * (2 * dim**2 + 2 * dim * int(dim * model.mlp_ratio))
    return count


def _compared(folder: Path) -> list[str]:
    """Names of the files of an export, after the bytes of each were compared with its checksum."""
    if not (folder / SUMS).is_file():
        raise CheckpointError(folder / SUMS, "", "no such file", "the checksums of an export", _AGAIN)
    lines = (folder / SUMS).read_text(encoding="utf-8", errors="replace").splitlines()
    listed = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
    for name in (MODEL, CONFIG, *listed):
        path = folder / name
        if "\0" in name or PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise CheckpointError(folder / SUMS, "", printable(name)[:100], "names inside the folder", _AGAIN)
        if name not in listed:
            raise CheckpointError(folder / SUMS, "", f"no checksum of {name}", "one of every file", _AGAIN)
        if not path.is_file():
            raise CheckpointError(path, "", "no such file", f"the file that {SUMS} lists", _AGAIN)
        found = files.sha256(path)
        if found != listed[name]:
            raise CheckpointError(path, "SHA-256", found[:12], listed[name][:12], _AGAIN)
    return list(listed)


def _fetch(source: str, name: str, revision: str | None) -> Path:
    """The exported folder of this name on the hub, in the cache of `huggingface_hub`; `source` is for errors."""
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        hint = "If it is a name on the hub, pip install 'slim-brain[hub]'"
        raise CheckpointError(source, "", "no such folder", _WHAT, hint) from None
    try:
        wanted = [MODEL, HEAD, CONFIG, SUMS, CARD, f"{EXTRACTOR}/*", f"{PARCELS}/*"]
        return Path(snapshot_download(name, revision=revision, allow_patterns=wanted))
    except Exception as error:  # of many types: unknown, private, no network, no space
        got = f"no such folder, and nothing the hub gives ({type(error).__name__}: {error})"
        raise CheckpointError(source, "", got, _WHAT, "Check the name, the connection and your access") from None
