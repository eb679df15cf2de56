"""A trained encoder, and what is known about its weights and their training data."""

from __future__ import annotations

import hashlib
from functools import cached_property
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from shards.core.display import as_html, as_text
from shards.core.errors import ConfigError
from shards.core.settings import digest
from shards.format.manifest import Manifest
from shards.format.reader import Dataset
from slim.checkpoints.authors_checkpoint import Background
from slim.checkpoints.checkpoint import CheckpointError
from slim.checkpoints.seen import Person, Seen
from slim.checkpoints.weights import Weights
from slim.config import FinetuneSettings
from slim.data.samples import unlike
from slim.model import lora
from slim.model.geometry import geometry_of
from slim.model.head import Head
from slim.model.hiera import Hiera


class Pretrained:
    """The encoder of `slim.inference.slim_brain.SlimBrain`, which lists the attributes."""

    def __init__(self, about: Weights, step: int):
        self._about, self.step = about, step
        self.settings, self.data, self.made = about.settings, about.data, about.made
        self.run_folder, self.results = about.folder, about.results
        self.background: Background = about.made.get("background", "drop")
        grid, self.frames = self.data.grid.grid(), self.data.windows.frames
        patches = grid.patch_shape
        self.geometry = geometry_of(self.settings.model, (self.settings.windows.k * self.frames, *patches))
        encoder = Hiera(self.settings.model, self.geometry, grid.voxels, self.settings.view)
        self.encoder = encoder.eval().requires_grad_(False)
        self.head: Head | None = None
        self.device = torch.device("cpu")

    def updates(self) -> dict[str, Tensor]:
        """The low-rank updates of a fine-tuning, by name: LAYER.lora_A.weight and LAYER.lora_B.weight.

        Raises
        ------
        ConfigError
            If the model was not fine-tuned by LoRA, or its updates are not here, as in an ordinary export.
        """
        settings, about = self.settings, self._about
        if not isinstance(settings, FinetuneSettings) or settings.lora is None or about.adapter is None:
            got = "none of its own" if self.made.get("base") else "none"
            hint = "Name the run of a fine-tuning with lora.rank, or export the whole encoder"
            raise ConfigError(self.run_folder, "low-rank updates", got, "those of a fine-tuning by LoRA", hint)
        return about.updates(lora.shapes(self.encoder, settings.lora, settings.freeze))

    def _base_of_updates(self, base: str | Path | None) -> tuple[str | Path, str]:
        """The weights that the updates of this export are added to, and their kind, if `base` names any."""
        needed = self._about.base
        if needed is None:
            raise ConfigError(self.run_folder, "base", base, "none, as the whole encoder is here", "Leave out base")
        if base is None:
            call = f"slim-brain export {self.run_folder} --base WEIGHTS --out FOLDER"
            hint = f"Name them by {call}, or by from_pretrained(..., base=WEIGHTS)"
            raise ConfigError(self.run_folder, "base", "none", f"the weights that were fine-tuned, {needed}", hint)
        return base, needed.weights

    def _add_updates(self, base: Pretrained) -> None:
        """Take the encoder of `base`, and add the updates of this export to its weights."""
        needed, settings = self._about.base, self.settings
        assert needed is not None and isinstance(settings, FinetuneSettings) and settings.lora is not None
        if base.checksum != needed.checksum:
            got, expected = (f"weights with SHA-256 {found[:12]}" for found in (base.checksum, needed.checksum))
            hint = f"{self.run_folder} was trained with {needed}"
            raise CheckpointError(base.run_folder, "base", got, expected, hint)
        self.encoder.load_state_dict(lora.added(base.encoder.state_dict(), self.updates(), settings.lora))

    def to(self, device: torch.device | str) -> Self:
        """Move the encoder; returns self."""
        self.device = torch.device(device)
        self.encoder.to(self.device)
        if self.head is not None:
            self.head.to(self.device)
        return self

    def check_data(self, dataset: Dataset) -> None:
        """Check that a dataset was converted with the same settings as the training data.

        Raises
        ------
        ConfigError
            If grid, patch, window length, TR, range of TRs or normalisation differ.
        """
        if (found := unlike(dataset.manifest, self.data)) is not None:
            field, got, expected = found
            hint = "Convert the data with the settings of the pretraining dataset"
            raise ConfigError(dataset.folder, field, got, f"{expected}, as in pretraining", hint)

    def check_unseen(self, dataset: Dataset) -> None:
        """Check that the encoder was not fine-tuned on labels of a dataset. Scores on such data would be too good.

        Raises
        ------
        ConfigError
            If the encoder was fine-tuned on one of the dataset's cohorts.
        """
        tuned = self.made.get("finetuned")
        if tuned and (seen := sorted(set(tuned["cohorts"]) & set(dataset.manifest.cohorts))):
            raise ConfigError(
                dataset.folder,
                "cohorts",
                f"{', '.join(seen)}, on which these weights were fine-tuned ({tuned['task']})",
                "cohorts that were not used for fine-tuning",
                "For this task see the test scores of the fine-tuning; for another task use the pretrained weights",
            )

    def require_dropped(self, what: str) -> None:
        """Check that patches without brain are deleted.

        Raises
        ------
        ConfigError
            If they are encoded; `what` names the step that cannot do so.
        """
        if self.background == "keep":
            hint = "Export the checkpoint again with --background drop"
            raise ConfigError(self.run_folder, "background", "keep", f"drop, because {what} reads brain only", hint)

    @property
    def seen(self) -> Seen | None:
        """The subjects seen in pretraining; None if this was not recorded (version 0.1)."""
        return self._about.seen

    def seen_people(self, dataset: Dataset) -> set[Person] | None:
        """Subjects of a dataset that were seen in pretraining, without labels, in this or another dataset.

        Returns
        -------
        set of (people, subject), or None
            None if unknown, for runs of version 0.1 on other data.
        """
        if self.seen is not None:
            return {who for who in (session.person for session in dataset.sessions) if self.seen.has(who)}
        if isinstance(self.settings, FinetuneSettings):
            return set() if self.settings.start is None else None
        if len(self.settings.data) == 1 and self.was_trained_on(dataset):
            return {session.person for session in dataset.of_split("train")}
        return None

    def was_trained_on(self, dataset: Dataset) -> bool:
        """Whether this is the unchanged dataset of the pretraining; if there were several, the first."""
        return Manifest.read(dataset.folder).data.tree() == self.data.tree()

    @cached_property
    def checksum(self) -> str:
        """SHA-256 (hex) of the weights and of everything that determines the result for a scan; exports keep it."""
        sizes = self.settings.model_dump(mode="json", include={"model", "view", "windows"})
        kept = [self.background] if self.background == "keep" else []  # as in versions without this choice
        found = hashlib.sha256(digest([sizes, self.data.tree(), *kept]).encode())
        for name, value in self.encoder.state_dict().items():
            found.update(name.encode() + value.cpu().contiguous().numpy().tobytes())
        return found.hexdigest()

    def __repr__(self) -> str:
        return as_text(*self._shown())

    def _repr_html_(self) -> str:
        return as_html(*self._shown())

    def _weights(self) -> str:
        """Where the weights come from."""
        if "format" in self.made:
            return f"the authors' checkpoint ({self.made['format']}), volumes read as {self.made['axes']}"
        return f"{self.made.get('weights', 'encoder')} after {self.step} steps" if self.step else "random"

    def _shown(self) -> tuple[str, dict[str, object]]:
        grid, tr = self.data.grid.grid(), self.data.tr
        count = sum(tensor.numel() for tensor in self.encoder.parameters())
        labels = self.settings.answer if isinstance(self.settings, FinetuneSettings) else None
        task = None if labels is None else f"{labels.task}: {', '.join(labels.classes) or labels.label}"
        timing = "" if tr is None else f", TR {tr:g} s"
        return f"SlimBrain {self.made.get('run', self.run_folder.name)}", {
            "model": f"{self.settings.model_name}, {count / 1e6:.2f} M parameters",
            "weights": self._weights(),
            "background": "kept: patches without brain are encoded, too" if self.background == "keep" else None,
            "predicts": task,
            "trained on": ", ".join(self.data.cohorts) or None,
            "scans": f"{' x '.join(map(str, grid.shape))} voxels of {grid.mm:g} mm{timing}",
            "windows": f"{self.settings.windows.k} of {self.frames} frames are encoded together",
            "device": self.device,
        }
