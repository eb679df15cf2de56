"""Weights that travel: a folder with everything another machine needs to go from a NIfTI run to vectors.

    write(SlimBrain.from_pretrained("runs/name"), Path("export"))

What lies in the folder is told in `slim.checkpoints.weights`, which reads it. It is written beside its place and
renamed, so it is there whole or not at all.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from safetensors.torch import save as save_tensors

from shards.core.errors import ConfigError, DatasetError, Stopped, is_full
from shards.core.files import sha256, sync_folder
from shards.core.room import has_room
from shards.format.layout import read_manifest
from shards.preprocessing.confounds import CleanSettings
from slim import __version__
from slim.checkpoints.weights import CARD, CONFIG, EXTRACTOR, FORMAT, HEAD, MODEL, PARCELS, SUMS
from slim.config import FinetuneSettings, PretrainSettings, TrainSettings, check_run

if TYPE_CHECKING:
    from slim.inference.slim_brain import SlimBrain


def write(model: SlimBrain, out: Path) -> dict[str, Any]:
    """Write a model's exported folder.

    Parameters
    ----------
    model : SlimBrain
        Of a run, a checkpoint, or another export.
    out : Path
        A folder that is not there yet, or an empty one.

    Returns
    -------
    dict
        What went into `config.json`.

    Raises
    ------
    ConfigError
        If `out` is taken, or cannot be written, or the temporal extractor of the training data is out of reach.
    Stopped
        If the file system is full.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(out, "--out", "a folder with files, or a file", "a new or empty folder", "Name another one")
    recipe = model.recipe
    about = {
        "format": FORMAT,
        "made": {
            **history(model),
            "parameters": sum(tensor.numel() for tensor in model.encoder.parameters()),
            "exported_by": __version__,
        },
        "settings": _anywhere(model.settings),
        "data": model.data,
    }
    if model.seen is not None:
        about["seen"] = model.seen.hashed(model.checksum[:16]).tree()
    temporary = out.parent / f".{out.name}.{os.getpid()}.tmp"
    try:
        temporary.mkdir(parents=True)
        tensors = {name: tensor.cpu().contiguous() for name, tensor in model.encoder.state_dict().items()}
        # not by `save_file`, which makes a file that nobody else may read
        (temporary / MODEL).write_bytes(save_tensors(tensors, {"format": "pt"}))
        if model.head is not None:
            tensors = {name: tensor.cpu().contiguous() for name, tensor in model.head.state_dict().items()}
            (temporary / HEAD).write_bytes(save_tensors(tensors, {"format": "pt"}))
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
        (temporary / CARD).write_text(card(about), encoding="utf-8")
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
            raise Stopped(f"no space left for {out}; make room, then call it again") from None
        if isinstance(error, OSError):
            raise ConfigError(out, "--out", error.strerror, "a folder that can be written") from None
        raise
    return about


def history(model: SlimBrain) -> dict[str, Any]:
    """How weights came about: `made` of a model, with what is known of the datasets it was pretrained on."""
    if "training" in model.made or not isinstance(model.settings, PretrainSettings):
        return {"training": [], **model.made}  # from scratch it was trained on its task alone
    return {**model.made, "training": _training(model.settings, model.data)}


def _anywhere(settings: TrainSettings) -> dict[str, Any]:
    """The settings of a run without the folders of the machine it ran on: of each path its last part."""
    tree = settings.model_dump(mode="json")
    for item in tree["data"]:
        item["path"] = _name(item["path"])
    tree["run"] |= {"out": _name(tree["run"]["out"]), "mirror": None}
    return tree


def _name(path: str) -> str:
    return path.rstrip("/").split("/")[-1]


def _training(settings: PretrainSettings, first: dict[str, Any]) -> list[dict[str, Any]]:
    """What is known of each dataset the run was trained on: cohorts, and how much its training split holds."""
    found = []
    for number, item in enumerate(settings.data):
        about: dict[str, Any] = {"dataset": _name(item.path), "weight": item.weight}
        try:
            manifest = first if number == 0 else read_manifest(item.path)
        except DatasetError:
            about["unknown"] = "out of reach when the weights were exported"
        else:
            about |= {"cohorts": manifest["cohorts"], "configuration_hash": manifest["configuration_hash"]}
            about |= {name: manifest[name]["train"] for name in ("subjects", "sessions")}
        found.append(about)
    return found


def card(about: dict[str, Any]) -> str:
    """The model card, Markdown, from what `config.json` says."""
    made, settings, data = about["made"], check_run(about["settings"], CONFIG), about["data"]
    grid, chosen = data["grid"], data["configuration"]["settings"]
    cleaning = CleanSettings.model_validate(chosen["clean"]).words or "none"
    windows, parcels = data["windows"], chosen["parcels"]
    cubes = f"cubes of {parcels['cube_mm']:g} mm of the brain mask"
    shape = " x ".join(map(str, grid["shape"]))
    versions = ", ".join(f"{name} {number}" for name, number in sorted(made["versions"].items()))
    low, high = data["tr_range"]
    return f"""---
library_name: slim-brain
tags: [fmri, neuroimaging, self-supervised, feature-extraction]
---

# {made["run"]}, step {made["step"]}

The encoder of SLIM-Brain (arXiv 2512.21881, in the implementation `slim-brain`), a voxel-level, atlas-free model of
fMRI: {made["parameters"] / 1e6:.1f} M parameters, preset `{settings.model_name}`, {_learned(made)}.
It turns a preprocessed BOLD run into a vector for each of its most salient windows of {windows["frames"]} frames.

    pip install slim-brain

```python
from slim import SlimBrain

model = SlimBrain.from_pretrained("THIS FOLDER")     # or its name on the hub, OWNER/NAME
z = model.encode("sub-01_bold.nii.gz")               # (windows, channels), float32
```

or `python tools/embed.py THIS_FOLDER run.nii.gz --out vectors.npz`. Every file but this one is compared with
`{SUMS}` when it is loaded.

## What it was trained on

{_trained(made)}

{_seen(about)}

## How

{_how(settings, made)}
- View of the values: `{settings.view}`; {settings.windows.k} windows pass through the encoder together.
- Source: commit {made["commit"]}; {versions}.

## What a run goes through

- Space: RAS+, {shape} voxels of {grid["mm"]:g} mm around the MNI brain, cubic B-spline. Nothing is registered.
- Time: TR {data["tr"]:g} s; runs with a TR outside {low:g} to {high:g} s are resampled.
- Cleaning: {cleaning}.
- Normalisation: {data["normalisation"]}.
- Windows: of {windows["frames"]} frames, the {windows["keep"]} most salient by `{data["ranker"]["name"]}`.
- Parcels that it sees: {cubes if parcels["image"] is None else parcels["image"]["name"]}.

`{CONFIG}` has every setting.

## Limits

- Not a medical device: nothing here was tested for decisions about people.
- It saw the cohorts above. On other scanners, ages, tasks or preprocessing it may do worse, and nothing warns of that;
  compare with random weights under the same pooling (`tools/probe.py`) and with functional connectivity.
- Vectors of a person carry anatomy and connectivity, by which people can be recognised: treat them as personal data.

## Licence and data agreements

The software is Apache-2.0. What may be done with these weights also depends on the agreements under which the data
above were obtained (HCP, ABCD, ADNI and others restrict what is derived from them). Who shares this folder states its
licence here.
"""


def _learned(made: dict[str, Any]) -> str:
    if "finetuned" not in made:
        return "pretrained without labels"
    before = "trained from random weights" if made["finetuned"]["from_scratch"] else "pretrained, then fine-tuned"
    return f"{before} on the labels of `{made['finetuned']['task']}`"


def _trained(made: dict[str, Any]) -> str:
    """The datasets, and what of them was used."""
    parts = []
    if made["training"]:
        head = ["| dataset | cohorts | people | sessions | weight |", "|---|---|---|---|---|"]
        rows = "\n".join([*head, *map(_row, made["training"])])
        parts.append(f"{rows}\n\nThese are the training splits of the pretraining. It used no labels.")
    if "finetuned" in made:
        tuned = made["finetuned"]
        parts.append(
            f"Labels of `{tuned['task']}` were learned from people of {', '.join(tuned['cohorts'])}. Do not judge it "
            "by people of these cohorts: their vectors tell what was learned."
        )
    return "\n\n".join(parts)


def _seen(about: dict[str, Any]) -> str:
    """Whether the people of the pretraining are known, and how they are written down."""
    if "seen" not in about:
        return "Version 0.1 did not write down who was seen in pretraining: compare cohorts before you test on people."
    count = len(about["seen"]["people"])
    return (
        f"`{CONFIG}` holds a salted hash of each of the {count} people seen in pretraining, and no names. "
        "`tools/probe.py` counts them among the people it tests. Whoever has a list of names, or guesses one, can "
        "test it against the hashes."
    )


_KIND = {"encoder": "one that was trained", "target": "moving average"}


def _how(settings: PretrainSettings | FinetuneSettings, made: dict[str, Any]) -> str:
    """How the encoder was trained."""
    if isinstance(settings, FinetuneSettings):
        answer, about = settings.answer, f"`{settings.answer.label}`"
        if answer.classes:
            about += f", one of {', '.join(answer.classes)}"
        return (
            f"- Fine-tuned with a head ({settings.head.pooling} pooling) for {about}; both are those after "
            f"{made['step']} optimizer steps, the best for the validation subjects.\n"
            "- `model.predict(image)` predicts the label of a scan, `model.predict_proba(image)` gives the "
            "probability of each class."
        )
    jepa, sig, mae = settings.loss_weights
    return (
        f"- Objective `{settings.objective}`: JEPA {jepa:g}, SIG {sig:g}, MAE {mae:g}; {made['step']} optimizer "
        "steps.\n"
        f"- Of the two encoders of a run, this is the {_KIND[made['weights']]}."
    )


def _row(line: dict[str, Any]) -> str:
    if "unknown" in line:
        return f"| {line['dataset']} | {line['unknown']} | | | {line['weight']:g} |"
    cohorts = ", ".join(line["cohorts"])
    return f"| {line['dataset']} | {cohorts} | {line['subjects']} | {line['sessions']} | {line['weight']:g} |"
