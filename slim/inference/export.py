"""Export weights to a folder with everything that another machine needs to encode NIfTI scans.

    write(SlimBrain.from_pretrained("runs/name"), Path("export"))

`slim.checkpoints.weights` describes the files of the folder, and reads them. The folder is written under a temporary
name and renamed, so an incomplete export is never found under its name.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from safetensors.torch import save as save_tensors
from torch import Tensor

from shards.core.errors import ConfigError, DatasetError, Stopped, is_full
from shards.core.files import dump, sha256, sync_folder
from shards.core.room import has_room
from shards.format.manifest import DataRecord, Manifest
from slim import __version__
from slim.checkpoints.weights import (
    ADAPTER,
    ADAPTER_CONFIG,
    ADAPTER_PREFIX,
    CARD,
    CONFIG,
    EXTRACTOR,
    FORMAT,
    HEAD,
    MODEL,
    PARCELS,
    PREDICTOR,
    SUMS,
)
from slim.config import FinetuneSettings, PretrainSettings, TrainSettings
from slim.inference import model_card
from slim.model import lora

if TYPE_CHECKING:
    from slim.inference.slim_brain import SlimBrain


def write(
    model: SlimBrain,
    out: Path,
    remote: bool = False,
    adapter: bool = False,
    predictor: Mapping[str, Tensor] | None = None,
) -> dict[str, Any]:
    """Export a model to a folder.

    Parameters
    ----------
    model : SlimBrain
        A model from a run, a checkpoint or another export.
    out : Path
        A new or empty folder.
    remote : bool
        Whether to open the training datasets with a URL, for facts about them; see `history`.
    adapter : bool
        Whether to write the low-rank updates of a fine-tuning and the head, without the weights that were fine-tuned.
    predictor : mapping, optional
        Tensors of the predictor with the MAE head, by name, which `slim-brain reconstruct` needs.

    Returns
    -------
    dict
        The content of `config.json`.

    Raises
    ------
    ConfigError
        If `out` is not empty or cannot be written, the temporal extractor of the training data cannot be read, or
        there are no low-rank updates.
    Stopped
        If the file system is full.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(out, "--out", "a folder with files, or a file", "a new or empty folder", "Name another one")
    recipe, updates = model.recipe, model.updates() if adapter else None
    about = {
        "format": FORMAT,
        "made": {
            **history(model, remote),
            "parameters": sum(tensor.numel() for tensor in model.encoder.parameters()),
            "exported_by": __version__,
        },
        "settings": _anywhere(model.settings),
        "data": model.data.tree(),
    }
    if adapter:
        about["adapter"] = True  # for the model card
    if model.seen is not None:
        about["seen"] = model.seen.hashed(model.checksum[:16]).tree()
    temporary = out.parent / f".{out.name}.{os.getpid()}.tmp"
    try:
        temporary.mkdir(parents=True)
        if updates is None:
            _save(temporary / MODEL, model.encoder.state_dict())
        else:
            _save(temporary / ADAPTER, {f"{ADAPTER_PREFIX}{name}": tensor for name, tensor in updates.items()})
            (temporary / ADAPTER_CONFIG).write_text(dump(_peft_config(model)) + "\n", encoding="utf-8")
        if predictor is not None:
            _save(temporary / PREDICTOR, predictor)
        if model.head is not None:
            _save(temporary / HEAD, model.head.state_dict())
        (temporary / CONFIG).write_text(json.dumps(about, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        if recipe.ranker.extractor is not None:
            recipe.ranker.extractor.save(temporary / EXTRACTOR)
        if (image := recipe.settings.parcels.image) is not None:
            (temporary / PARCELS).mkdir()
            shutil.copyfile(image, temporary / PARCELS / image.name)
        names = sorted(path.relative_to(temporary).as_posix() for path in temporary.rglob("*") if path.is_file())
        (temporary / SUMS).write_text(
            "".join(f"{sha256(temporary / name)}  {name}\n" for name in names), encoding="utf-8"
        )
        (temporary / CARD).write_text(model_card.write(about), encoding="utf-8")
        for path in temporary.rglob("*"):
            if path.is_file():
                with open(path, "rb") as file:
                    os.fsync(file.fileno())
        temporary.rename(out)
        sync_folder(out.parent)
    except Exception as error:
        size = sum(path.stat().st_size for path in temporary.rglob("*") if path.is_file())
        full = is_full(error) or (isinstance(error, SafetensorError) and not has_room(out.parent, size))
        shutil.rmtree(temporary, ignore_errors=True)
        if full:
            raise Stopped(f"no space left for {out}; make room, then export again") from None
        if isinstance(error, OSError):
            raise ConfigError(out, "--out", error.strerror, "a writable folder") from None
        raise
    return about


def _save(path: Path, tensors: Mapping[str, Tensor]) -> None:
    contiguous = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    path.write_bytes(save_tensors(contiguous, {"format": "pt"}))  # other users could not read a file of `save_file`


def _peft_config(model: SlimBrain) -> dict[str, object]:
    """The settings of low-rank updates as `peft` reads them."""
    settings = model.settings
    assert isinstance(settings, FinetuneSettings) and settings.lora is not None
    names = [name for name, _ in lora.layers(model.encoder, settings.lora, settings.freeze)]
    return {
        "peft_type": "LORA",
        "r": settings.lora.rank,
        "lora_alpha": settings.lora.alpha,
        "target_modules": names,
        "bias": "none",
        "inference_mode": True,
    }


def history(model: SlimBrain, remote: bool = False) -> dict[str, object]:
    """How the weights were made: `made` of a model, with facts about the datasets of its pretraining.

    Somebody else may have written the configuration of a run, so its URLs are opened only with `remote`.
    """
    if "training" in model.made or not isinstance(model.settings, PretrainSettings):
        return {"training": [], **model.made}  # a model from scratch has no pretraining data
    return {**model.made, "training": _training(model.settings, model.data, remote)}


def _anywhere(settings: TrainSettings) -> dict[str, object]:
    """The settings of a run without local folders: only the last part of each path is kept."""
    tree = settings.model_dump(mode="json")
    for item in tree["data"]:
        item["path"] = _name(item["path"])
    tree["run"] |= {"out": _name(tree["run"]["out"]), "mirror": None}
    return tree


def _name(path: str) -> str:
    return path.rstrip("/").split("/")[-1]


def _training(settings: PretrainSettings, first: DataRecord, remote: bool) -> list[dict[str, object]]:
    """Facts about each training dataset of the run: its cohorts, and the size of its training split."""
    found = []
    for number, item in enumerate(settings.data):
        about: dict[str, object] = {"dataset": _name(item.path), "weight": item.weight}
        if number and "://" in item.path and not remote:
            found.append({**about, "unknown": "a URL, which was not opened when the weights were exported"})
            continue
        try:
            data: DataRecord = first if number == 0 else Manifest.read(item.path)
        except DatasetError:
            about["unknown"] = "not readable when the weights were exported"
        else:
            about |= {"cohorts": data.cohorts, "configuration_hash": data.configuration_hash}
            about |= {"subjects": data.subjects["train"], "sessions": data.sessions["train"]}
        found.append(about)
    return found
