"""A trained encoder, and what it makes of a whole session.

    model = SlimBrain.from_pretrained("runs/name")
    features = model.encode_session(dataset, dataset.sessions[0])      # (time slots, places, channels)

Legend: S time slots of a session; L places (cells of the last stage that hold brain); C channels; G groups of k
windows; M cells of a batch.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from shards.errors import ConfigError, DatasetError
from shards.layout import read_manifest
from shards.reader import Dataset
from shards.settings import check, read_yaml
from slim import checkpoint
from slim.batch import collate, read_windows
from slim.checkpoint import CheckpointError
from slim.config import PretrainSettings
from slim.hiera import Hiera

CONFIG, DATA = checkpoint.ABOUT_RUN
WEIGHTS = ("encoder", "target")


@dataclass
class Features:
    """What the encoder made of one session.

    Attributes
    ----------
    key : the session's key
    token_SLC : float32; slots in time order, places in ascending order
    place_L : flat place of each cell in the grid of cells, int64
    second_S : middle of each slot, s from the start of the run
    window_S : start of the window that holds each slot, s from the start of the run; float64
    """

    key: str
    token_SLC: np.ndarray
    place_L: np.ndarray
    second_S: np.ndarray
    window_S: np.ndarray


class SlimBrain:
    """An encoder and what it needs to know to read data. Made by `from_pretrained` or `random`.

    Attributes
    ----------
    encoder : Hiera, in fp32 and evaluation mode, without gradients
    settings : PretrainSettings of the run
    data : dict, the manifest (without shards) of the data it was made for
    step : optimizer steps behind the weights; 0 for random ones
    run_folder : Path
    """

    def __init__(self, settings: PretrainSettings, data: dict[str, Any], step: int, run_folder: Path):
        self.settings, self.data, self.step, self.run_folder = settings, data, step, run_folder
        grid, self.frames = data["grid"], int(data["windows"]["frames"])
        patches = (size // grid["patch"] for size in grid["shape"])
        self.geometry = settings.model.geometry((settings.windows.k * self.frames, *patches))
        encoder = Hiera(settings.model, self.geometry, grid["patch"] ** 3, settings.view)
        self.encoder = encoder.eval().requires_grad_(False)
        self.device = torch.device("cpu")

    @classmethod
    def from_pretrained(cls, folder: str | Path, weights: str = "encoder") -> SlimBrain:
        """The encoder of a pretraining run.

        Parameters
        ----------
        folder : str or Path
            A run (its newest complete checkpoint is taken), or one `checkpoints/step-...` folder of it.
        weights : "encoder" or "target"
            The online encoder, or its moving average.

        Raises
        ------
        CheckpointError
            If there is no complete checkpoint, or it lacks a tensor, or has one too many or of another shape.
        ConfigError
            If the run's configuration cannot be read.
        """
        if weights not in WEIGHTS:
            raise ConfigError("weights", "", weights, f"one of {', '.join(WEIGHTS)}")
        folder = Path(folder)
        if (folder / checkpoint.COMPLETE).is_file():
            found, run_folder = folder, folder.parent.parent
        elif (folder / CONFIG).is_file():
            newest = checkpoint.newest(folder / "checkpoints")
            if newest is None:
                raise CheckpointError(
                    folder,
                    "checkpoints",
                    "no complete checkpoint",
                    "at least one",
                    "Go on with the pretraining until it has saved",
                )
            found, run_folder = newest, folder
        else:
            got = "neither config.yaml nor a complete checkpoint" if folder.is_dir() else "no such folder"
            raise CheckpointError(folder, "", got, "a run folder, or a checkpoint inside one")
        fault = checkpoint.fault(found, [checkpoint.WEIGHTS, *checkpoint.ABOUT_RUN])
        if fault is not None:
            raise fault
        settings = check(PretrainSettings, read_yaml(found / CONFIG), found / CONFIG)
        data = json.loads((found / DATA).read_text())
        model = cls(settings, data, checkpoint.facts(found)["step"], run_folder)
        model._load(found / checkpoint.WEIGHTS, weights)
        return model

    def _load(self, path: Path, weights: str) -> None:
        """Every tensor must be there with its shape, and none besides."""
        given = checkpoint.read_weights(path, f"{weights}.")
        wanted = self.encoder.state_dict()
        for name in sorted(wanted.keys() | given.keys()):
            got = tuple(given[name].shape) if name in given else "no such tensor"
            expected = tuple(wanted[name].shape) if name in wanted else "no such tensor"
            if got != expected:
                raise CheckpointError(
                    path, f"{weights}.{name}", got, expected, "These weights are of another configuration"
                )
        self.encoder.load_state_dict(given, strict=True)

    @classmethod
    def random(cls, like: SlimBrain, seed: int) -> SlimBrain:
        """The same architecture with fresh random weights; the generator of the caller is left as it was.

        With the run's own seed these are the weights its training began with.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = cls(like.settings, like.data, 0, like.run_folder)
        return model.to(like.device)

    def to(self, device: torch.device | str) -> SlimBrain:
        """Move the encoder; returns self."""
        self.device = torch.device(device)
        self.encoder.to(self.device)
        return self

    def check_data(self, dataset: Dataset) -> None:
        """Refuse a dataset that the encoder would misread.

        Raises
        ------
        ConfigError
            If grid, patch, window length, TR or normalisation is another one than in training.
        """
        for name, part in (("grid", None), ("windows", "frames"), ("tr", None), ("normalisation", None)):
            got, expected = dataset.manifest[name], self.data[name]
            if part is not None:
                got, expected = got[part], expected[part]
            if got != expected:
                raise ConfigError(
                    dataset.folder,
                    name if part is None else f"{name}.{part}",
                    got,
                    f"{expected}, as in pretraining",
                    "Convert the data as that dataset was",
                )

    def was_trained_on(self, dataset: Dataset) -> bool:
        """Whether this is the dataset of the pretraining, which then saw its training subjects unlabelled."""
        manifest = read_manifest(dataset.folder)
        return {name: value for name, value in manifest.items() if name != "shards"} == self.data

    @torch.inference_mode()
    def encode_session(self, dataset: Dataset, session: dict[str, Any], batch: int = 4) -> Features:
        """Features of all kept windows of a session, whole brain.

        Windows are read in time order in groups of k, as in training. The last group reaches back over
        windows that were already read where k does not divide their number; their slots are then used once,
        from the group before. A slot belongs to the window that holds its middle.

        Parameters
        ----------
        dataset : Dataset
        session : dict
            A line of `dataset.sessions`.
        batch : int
            Groups that pass through the encoder together; it does not change the features.

        Raises
        ------
        ConfigError, DatasetError
            See `check_data`; or if the session has fewer than k windows, or its bytes are damaged.
        """
        self.check_data(dataset)
        k, count = self.settings.windows.k, session["n_kept"]
        if count < k:
            where = f"{dataset.folder} ({session['key']})"
            raise DatasetError(where, "windows", count, f"{k} or more, as windows.k")
        start_K = dataset.read(session, ("start",))["start"]
        in_time = np.argsort(start_K, kind="stable")
        firsts = [*range(0, count - k, k), count - k]
        samples = [read_windows(dataset, session, in_time[first : first + k].tolist()) for first in firsts]
        tokens, seconds, starts = [], [], []
        slots, places = self.geometry.cells[0], math.prod(self.geometry.cells[1:])
        middle_S = (np.arange(slots) + 0.5) * self.geometry.cell[0]
        window_S = (middle_S // self.frames).astype(int)
        read = 0
        for at in range(0, len(samples), batch):
            here = samples[at : at + batch]
            together = collate(here, self.geometry, self.settings.stream).to(self.device)
            x_MC = self.encoder(together.voxels, together.whole).float().cpu().numpy()
            cell_M, sample_M = together.whole.cell_M.cpu().numpy(), together.whole.sample_M.cpu().numpy()
            # Every frame of a session has the same brain patches, so every slot has the same places.
            by = np.lexsort((cell_M, sample_M))
            x_GSLC = x_MC[by].reshape(len(here), slots, -1, x_MC.shape[1])
            place_L = cell_M[by][: x_GSLC.shape[2]] % places
            for sample, x_SLC, first in zip(here, x_GSLC, firsts[at : at + batch], strict=True):
                fresh_S = first + window_S >= read
                read = first + k
                tokens.append(x_SLC[fresh_S])
                seconds.append(sample.second.reshape(slots, -1).mean(axis=1)[fresh_S])
                starts.append(start_K[in_time[first + window_S]][fresh_S] * float(session["tr"]))
        return Features(
            session["key"], np.concatenate(tokens), place_L, np.concatenate(seconds), np.concatenate(starts)
        )
