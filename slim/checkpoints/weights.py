"""Find weights in a run, in an exported folder or on the Hugging Face hub, and load them into a model.

An exported folder, written by `slim.inference.export`, has these files::

    model.safetensors   the encoder, fp32
    head.safetensors    the head, only for a fine-tuned encoder
    adapter_model.safetensors, adapter_config.json
                        in place of model.safetensors: the low-rank updates of a fine-tuning, as `peft` names them
    predictor.safetensors
                        the predictor with the MAE head, if it was asked for
    config.json         settings of the run, manifest of its data, what was exported, subjects seen (as hashes)
    extractor/          the temporal extractor, if one ranked the windows
    parcels/            the label image of the parcels, if there is one
    SHA256SUMS          checksums of the files above, checked whenever the folder is loaded
    README.md           the model card, which users may edit
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, StrictStr
from torch import Tensor, nn

from shards.core import files
from shards.core.errors import ConfigError
from shards.core.files import printable
from shards.core.settings import check
from shards.format import layout
from shards.format.manifest import DataRecord
from slim.checkpoints import checkpoint, hub
from slim.checkpoints.checkpoint import CheckpointError
from slim.checkpoints.hub import HubOptions
from slim.checkpoints.provenance import Ancestor, Provenance
from slim.checkpoints.run_folder import ABOUT_RUN, ALSO_ABOUT_RUN, CHECKPOINTS, SEEN
from slim.checkpoints.run_folder import CONFIG as RUN_CONFIG
from slim.checkpoints.run_folder import DATASET as RUN_DATA
from slim.checkpoints.seen import Seen
from slim.checkpoints.source import ACCEPTED, HUB_NAME, is_on_hub, names_checkpoint
from slim.config import FinetuneSettings, TrainSettings, check_run, load_run

FORMAT = 1
MODEL, ADAPTER = "model.safetensors", "adapter_model.safetensors"
ADAPTER_CONFIG, ADAPTER_PREFIX = "adapter_config.json", "base_model.model."  # as `peft` has them
PREDICTOR = "predictor.safetensors"
HEAD, CONFIG, SUMS, CARD = "head.safetensors", "config.json", "SHA256SUMS", "README.md"
EXTRACTOR, PARCELS = "extractor", "parcels"
KINDS = ("encoder", "target")
_AGAIN = "Copy or download the folder again"
_MOST_BYTES = 1 << 28  # largest size of config.json and dataset.json, which hold a hash for each subject seen


class _ReadFields(BaseModel):
    """The fields that are read from a file that may come from anybody. Other fields are ignored."""

    model_config = ConfigDict(extra="ignore", frozen=True)


class _Tuned(_ReadFields):
    task: StrictStr
    cohorts: tuple[StrictStr, ...]
    head: StrictStr
    from_scratch: StrictBool


class Base(_ReadFields):
    """The weights to which the low-rank updates of a fine-tuning are added.

    Attributes
    ----------
    run : str
        Name of the run that made them.
    step : int
    weights : "encoder" or "target"
    checksum : str
        `SlimBrain.checksum`, a SHA-256, which a run and its exports have in common.
    """

    run: StrictStr
    step: StrictInt = Field(ge=0)
    weights: Literal["encoder", "target"]
    checksum: StrictStr

    def __str__(self) -> str:
        return f"{self.run} ({self.weights} after {self.step} steps, SHA-256 {self.checksum[:12]})"


class _Made(_ReadFields):
    run: StrictStr
    step: StrictInt = Field(ge=0)
    weights: Literal["encoder", "target"]
    commit: StrictStr
    versions: dict[StrictStr, StrictStr]
    training: tuple[dict[StrictStr, Any], ...] = ()
    background: Literal["drop", "keep"] = "drop"
    finetuned: _Tuned | None = None
    init: Ancestor | None = None
    base: Base | None = None


class _Configuration(_ReadFields):
    settings: dict[StrictStr, Any]


class _RankerFields(_ReadFields):
    name: StrictStr
    extractor: StrictStr | None = None
    seed: StrictInt = 0
    version: StrictInt = 1


class _Data(_ReadFields):
    """The fields of a manifest that are needed in addition to those of `shards.format.manifest`."""

    configuration: _Configuration
    ranker: _RankerFields
    cohorts: tuple[StrictStr, ...]


@dataclass(frozen=True)
class Weights:
    """Weights of an encoder, and where they come from.

    Attributes
    ----------
    settings : PretrainSettings or FinetuneSettings
        Settings of the run.
    data : DataRecord
        Manifest (without shards) of the first training dataset.
    made : dict
        How the weights were made: `run`, `step`, `weights` ("encoder" or "target"), `commit`, `versions`; in an export
        also `training`, the datasets of the pretraining; `init`, the weights that the run began with, if they were not
        random; for a fine-tuned encoder also `finetuned`, with `task`, `cohorts` that gave the labels, `head` and
        `from_scratch`, and with low-rank updates `base`, see `Base`; for the authors' checkpoint also `format`, `axes`,
        `background`, `sha256` and `left_out`, see `slim.checkpoints.authors_checkpoint`.
    path : Path
        The safetensors file.
    prefix : str
        Prefix of the names of the encoder's tensors.
    head : (Path, str) or None
        File and prefix of the head of a fine-tuning.
    folder : Path
        The run or the exported folder.
    results : Path
        Where tools write results by default: the run; for an export, `NAME-results` in the working folder.
    seen : Seen or None
        The subjects seen in pretraining; None if this is not known.
    extractor, parcels : Path or None
        Paths at which the temporal extractor and the label image of the parcels are expected.
    adapter : (Path, str) or None
        File and prefix of the low-rank updates of a fine-tuning.
    predictor : Path or None
        The predictor in an export.
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
    adapter: tuple[Path, str] | None = None
    predictor: Path | None = None

    @property
    def base(self) -> Base | None:
        """The weights that are needed besides; None if all are here."""
        return Base.model_validate(self.made["base"]) if self.path.name == ADAPTER else None

    def load_into(self, encoder: nn.Module) -> None:
        """Load the tensors into an encoder. Names and shapes must match exactly.

        Raises
        ------
        CheckpointError
            If they do not. The error names the first tensor that differs, and both shapes.
        """
        fit(encoder, checkpoint.read_weights(self.path, self.prefix), self.path, self.prefix)

    def load_head(self, head: nn.Module) -> None:
        """Load the head of a fine-tuning, as `load_into` does for the encoder."""
        assert self.head is not None
        path, prefix = self.head
        fit(head, checkpoint.read_weights(path, prefix), path, prefix)

    def updates(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
        """The low-rank updates of a fine-tuning, which must have these names and shapes, as in `load_into`."""
        assert self.adapter is not None
        path, prefix = self.adapter
        given = checkpoint.read_weights(path, prefix)
        check_tensors(shapes, given, path, prefix)
        return given


def fit(module: nn.Module, given: dict[str, Tensor], path: Path, prefix: str) -> None:
    """Load tensors into a module. Names and shapes must match exactly, and all numbers must be finite.

    Raises
    ------
    CheckpointError
        If they do not. The error names the file, and the first tensor that differs with `prefix` before its name.
    """
    check_tensors({name: tuple(value.shape) for name, value in module.state_dict().items()}, given, path, prefix)
    module.load_state_dict(given, strict=True)


def check_tensors(wanted: Mapping[str, tuple[int, ...]], given: Mapping[str, Tensor], path: Path, prefix: str) -> None:
    """Check names, shapes and numbers of tensors, as `fit` does."""
    for name in sorted(wanted.keys() | given.keys()):
        got = tuple(given[name].shape) if name in given else "no such tensor"
        expected = wanted.get(name, "no such tensor")
        if got != expected:
            hint = "The weights belong to another configuration: use the config they were trained with"
            raise CheckpointError(path, f"{prefix}{name}", got, expected, hint)
        if not bool(torch.isfinite(given[name]).all()):
            hint = "Do not use these weights: train again with a lower optimizer.lr, or take an earlier checkpoint"
            raise CheckpointError(path, f"{prefix}{name}", "numbers that are not finite", "finite numbers", hint)


def find(source: str | Path, kind: str | None = None, options: HubOptions | None = None) -> Weights:
    """Find weights. `Weights.load_into` reads their tensors.

    Parameters
    ----------
    source : str or Path
        A run (its newest complete checkpoint is used), a checkpoint, an exported folder, or OWNER/NAME on the hub,
        optionally followed by @ and a tag, branch or commit.
    kind : "encoder" or "target", optional
        The online encoder or its moving average. By default the online encoder of a run, and the weights that an
        export holds. A fine-tuning has the encoder of its best epoch and no moving average.
    options : HubOptions, optional
        How they are fetched from the hub.

    Raises
    ------
    CheckpointError
        If there are no weights, or they are incomplete or damaged.
    ConfigError
        If the configuration of the run cannot be read, or `kind` is neither "encoder" nor "target".
    """
    if kind is not None and kind not in KINDS:
        raise ConfigError("weights", "", kind, f"one of {', '.join(KINDS)}")
    folder = Path(source)
    options = options or HubOptions()
    if is_on_hub(source) and (on_hub := HUB_NAME.fullmatch(str(source))):
        if None not in (on_hub[3], options.revision) and on_hub[3] != options.revision:
            raise ConfigError(str(source), "revision", options.revision, f"{on_hub[3]}, as in the name, or none")
        options = replace(options, revision=on_hub[3] or options.revision)
        wanted = [MODEL, ADAPTER, ADAPTER_CONFIG, HEAD, PREDICTOR, CONFIG, SUMS, CARD, f"{EXTRACTOR}/*", f"{PARCELS}/*"]
        return _of_export(hub.fetch(str(source), on_hub[1], options, wanted, ACCEPTED), kind, on_hub[2])
    if options.revision is not None:
        raise ConfigError(folder, "revision", options.revision, "none, as this is no name on the hub")
    if (folder / SUMS).is_file() or (folder / CONFIG).is_file():
        return _of_export(folder, kind, folder.resolve().name)
    return _of_run(folder, kind or "encoder")


def _of_run(folder: Path, kind: str) -> Weights:
    if names_checkpoint(folder):
        folder = folder.parent / folder.read_text(encoding="utf-8", errors="replace").strip()
    if (folder / checkpoint.COMPLETE).is_file():
        found, run = folder, folder.parent.parent
    elif (folder / RUN_CONFIG).is_file():
        newest = checkpoint.newest(folder / CHECKPOINTS)
        if newest is None:
            hint = "Train until the first checkpoint is saved"
            raise CheckpointError(folder, CHECKPOINTS, "no complete checkpoint", "at least one", hint)
        found, run = newest, folder
    else:
        got = "a folder that is no run, checkpoint or export" if folder.is_dir() else "no such folder"
        raise CheckpointError(folder, "", got, ACCEPTED)
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
        "step": checkpoint.fact(found, "step"),
        "weights": kind,
        "commit": provenance.commit,
        "versions": provenance.named() | facts.get("versions", {}),
    }
    if provenance.init is not None:
        made["init"] = provenance.init.model_dump(mode="json", exclude_none=True)
    path, prefix, head, adapter = found / checkpoint.WEIGHTS, f"{kind}.", None, None
    data = _data(_tree(found / RUN_DATA), found / RUN_DATA)
    _check_size(settings, data, path)
    if isinstance(settings, FinetuneSettings):
        made |= _finetuned(path, kind, settings, data)
        prefix, head = f"{checkpoint.BEST}{prefix}", (path, f"{checkpoint.BEST}head.")
        adapter = (path, f"{checkpoint.BEST}lora.") if settings.lora is not None else None
    dataset, extractor = settings.data[0].path, run / layout.EXTRACTOR
    if not extractor.is_dir() and "://" not in dataset:  # a run may come from anybody, so URLs in it are not opened
        extractor = Path(dataset) / layout.EXTRACTOR
    return Weights(settings, data, made, path, prefix, head, run, run, extractor, None, seen, adapter)


def _name(run: Path, settings: TrainSettings) -> str:
    """Name of a run. The name of a fine-tuning starts with the name of the folder above, its task."""
    return f"{run.parent.name}-{run.name}" if isinstance(settings, FinetuneSettings) else run.name


def _finetuned(path: Path, kind: str, settings: FinetuneSettings, data: DataRecord) -> dict[str, Any]:
    """Further facts about a fine-tuned encoder. Its `step` is that of the best epoch."""
    if kind != "encoder":
        expected = "a pretraining run, because fine-tuning keeps no moving average"
        raise CheckpointError(path, "weights", "a fine-tuning run", expected, 'Use the weights "encoder"')
    tensors = checkpoint.read_weights(path, f"{checkpoint.BEST}of")
    if not tensors:
        raise CheckpointError(path, f"{checkpoint.BEST}of", "no such tensor", "the number of the best epoch", _AGAIN)
    loss, step = tensors[""].tolist()
    if not math.isfinite(loss):
        hint = "Train for at least one epoch; if the run has, lower optimizer.lr"
        expected = "a finite loss, which selects the best epoch"
        raise CheckpointError(path, "val_loss", "no finite validation loss yet", expected, hint)
    before = settings.before or {}
    seen = {*data.cohorts, *before.get("finetuned", {}).get("cohorts", [])}
    tuned = {
        "task": settings.answer.task,
        "cohorts": sorted(seen),
        "head": settings.head.pooling,
        "from_scratch": settings.start is None,
    }
    found = {"step": int(step), "finetuned": tuned} | {name: before[name] for name in ("training",) if name in before}
    if settings.lora is not None:
        found["base"] = {name: before.get(name) for name in Base.model_fields}
    return found


def _of_export(folder: Path, kind: str | None, name: str) -> Weights:
    listed = _compared(folder)
    about = _tree(folder / CONFIG)
    for field in ("format", "made", "settings", "data"):
        if field not in about:
            raise CheckpointError(folder / CONFIG, field, "no such field", "the config of an export", _AGAIN)
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
        expected = "one, because the encoder is fine-tuned"
        raise CheckpointError(folder / SUMS, "", f"no checksum of {HEAD}", expected, _AGAIN)
    paths = (head, folder, Path(f"{name}-results"), folder / EXTRACTOR, image)
    seen = Seen.from_tree(about["seen"], folder / CONFIG) if "seen" in about else None
    data = _data(about["data"], folder / CONFIG)
    if ADAPTER in listed:
        return Weights(settings, data, made, folder / ADAPTER, "", *paths, seen, _adapter(folder, settings, made))
    _check_size(settings, data, folder / MODEL)
    predictor = folder / PREDICTOR if PREDICTOR in listed else None
    return Weights(settings, data, made, folder / MODEL, "", *paths, seen, predictor=predictor)


def _adapter(folder: Path, settings: TrainSettings, made: Mapping[str, object]) -> tuple[Path, str]:
    """File and prefix of the low-rank updates in an export of them."""
    if not isinstance(settings, FinetuneSettings) or settings.lora is None:
        raise CheckpointError(folder / CONFIG, "settings.lora", "none", f"those of {ADAPTER}", _AGAIN)
    if "base" not in made:
        raise CheckpointError(folder / CONFIG, "made.base", "no such field", f"the weights below {ADAPTER}", _AGAIN)
    return folder / ADAPTER, ADAPTER_PREFIX


def _tree(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file.

    Raises
    ------
    CheckpointError
        If the file is too large or does not hold a JSON object.
    """
    try:
        if (size := path.stat().st_size) > _MOST_BYTES:
            raise CheckpointError(path, "", f"a file of {size} bytes", f"at most {_MOST_BYTES} bytes", _AGAIN)
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(path, "", f"unreadable ({error!r})", "a JSON object", _AGAIN) from None
    if not isinstance(tree, dict):
        raise CheckpointError(path, "", f"unreadable (a {type(tree).__name__})", "a JSON object", _AGAIN)
    return tree


def _data(tree: Any, where: Path) -> DataRecord:
    """Check the manifest (without shards) of the training data; raises CheckpointError."""
    if not isinstance(tree, dict):
        raise CheckpointError(where, "data", type(tree).__name__, "a manifest without shards", _AGAIN)
    try:
        data = check(DataRecord, tree, where, CheckpointError)
    except CheckpointError as error:
        raise CheckpointError(error.where, error.field, error.got, error.expected, _AGAIN) from None
    check(_Data, tree, where, CheckpointError)
    return data


def _check_size(settings: TrainSettings, data: DataRecord, path: Path) -> None:
    """Check that a file is large enough for the weights of these settings, before memory is allocated for them.

    Raises
    ------
    CheckpointError
        If it is not, with the size needed and the size found.
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
    """A lower bound of the number of the encoder's parameters: its matrices and position embeddings."""
    model, grid = settings.model, data.grid.grid()
    places = math.prod(grid.patch_shape)
    count = (places + settings.windows.k * data.windows.frames + grid.voxels) * model.embed
    for stage, depth in enumerate(model.depths):
        dim = model.embed * 2**stage
        count += depth * (2 * dim**2 + 2 * dim * int(dim * model.mlp_ratio))
    return count


def _compared(folder: Path) -> list[str]:
    """Check the files of an export against their checksums, and return their names."""
    if not (folder / SUMS).is_file():
        raise CheckpointError(folder / SUMS, "", "no such file", "the checksums of an export", _AGAIN)
    lines = (folder / SUMS).read_text(encoding="utf-8", errors="replace").splitlines()
    listed = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
    for name in (ADAPTER if ADAPTER in listed else MODEL, CONFIG, *listed):
        path = folder / name
        if "\0" in name or PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise CheckpointError(folder / SUMS, "", printable(name)[:100], "names inside the folder", _AGAIN)
        if name not in listed:
            raise CheckpointError(folder / SUMS, "", f"no checksum of {name}", "a checksum for every file", _AGAIN)
        if not path.is_file():
            raise CheckpointError(path, "", "no such file", f"a file, as listed in {SUMS}", _AGAIN)
        found = files.sha256(path)
        if found != listed[name]:
            raise CheckpointError(path, "SHA-256", found[:12], listed[name][:12], _AGAIN)
    return list(listed)
