"""SlimBrain: a trained encoder that turns scans into vectors, tokens or predictions.

    model = SlimBrain.from_pretrained("export/")
    z_WC = model.encode_windows("sub-01_bold.nii.gz")                  # one vector per window
    features = model.encode_tokens("sub-01_bold.nii.gz")               # (time slots, places, channels)
    features = model.encode_session(dataset, dataset.sessions[0])      # the same for a session of a dataset

Legend: S time slots of a session; L places (cells of the last stage that contain brain); C channels; G groups of k
windows; M cells of a batch; W windows; P features of a vector.
"""

from __future__ import annotations

import os
import warnings
from dataclasses import replace
from functools import cached_property
from numbers import Integral
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from threadpoolctl import threadpool_limits

from shards.cohorts.niimg import Niimg, Scan, Table, as_run
from shards.conversion.session import Converted, convert_run
from shards.core.deprecation import warn_renamed
from shards.core.errors import ArgumentError, ConfigError
from shards.format.reader import Dataset, Samples, ScanT
from shards.format.session_record import SessionRecord
from slim.checkpoints import authors_checkpoint, hub
from slim.checkpoints.authors_checkpoint import Axes, Background
from slim.checkpoints.hub import HubOptions
from slim.checkpoints.weights import find
from slim.config import AnswerSettings, FinetuneSettings
from slim.inference.arrays import images_of
from slim.inference.cores import cores, threads_inside
from slim.inference.encoding import SessionEncoder, assumed
from slim.inference.preprocessing import Recipe, read_recipe
from slim.inference.pretrained import Pretrained
from slim.inference.vectors import Features, check_fixed, vectors
from slim.model.head import Answerer, Head


class SlimBrain(Pretrained):
    """A trained encoder with the settings it needs to read scans. Use `from_pretrained` or `random` to make one.

    Attributes
    ----------
    encoder : Hiera in fp32 and evaluation mode, without gradients
    head : Head or None, the head of a fine-tuned model, for `predict`
    settings : PretrainSettings or FinetuneSettings of the run
    data : DataRecord of the training data
    made : dict, how the weights were made; see `slim.checkpoints.weights.Weights`
    step : int, optimizer steps of training; 0 for random weights and the authors' checkpoint
    background : "drop" or "keep", whether patches without brain are deleted; see `slim.checkpoints.authors_checkpoint`
    run_folder : Path of the run or the exported folder
    results : Path, where tools write results by default; see `slim.checkpoints.weights.Weights`
    """

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        weights: str | None = None,
        extractor: str | Path | None = None,
        parcels: str | Path | None = None,
        *,
        base: str | Path | None = None,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
        device: torch.device | str = "cpu",
        format: str | None = None,
        axes: Axes | None = None,
        background: Background | None = None,
    ) -> SlimBrain:
        """Load a pretrained model.

        Parameters
        ----------
        source : str or Path
            A run (its newest complete checkpoint is used), a folder `checkpoints/step-...` of a run, a folder written
            by `slim-brain export`, or its name on the Hugging Face hub, `OWNER/NAME` or `OWNER/NAME@REVISION`.
        weights : "encoder" or "target", optional
            The online encoder or its moving average. By default the online encoder of a run, and the weights that an
            export holds.
        extractor, parcels : path, optional
            The temporal extractor (a folder) and the label image of the parcels with which the training data were made.
            They are only needed to encode NIfTI scans. By default, they are read from an export, and the extractor of a
            run from the run or its dataset.
        base : str or Path, optional
            For low-rank updates (`slim-brain export --adapter`): the weights that were fine-tuned, named as `source`.
        revision, cache_dir, token, local_files_only
            For a name on the hub, as in `huggingface_hub.snapshot_download`: a tag, branch or commit; the folder of
            downloaded files; the token for private models; whether to use downloaded files only.
        device : torch.device or str
            Where the encoder is put.
        format : "slim-brain-2026", optional
            For the checkpoint of the authors of arXiv 2512.21881: `source` is their file, or its name on the hub.
        axes : "LAS" or "RAS", optional
            With `format`: the orientation of the volumes that the authors trained with. The default, LAS, is that of
            HCP and FSL; it is not verified.
        background : "keep" or "drop", optional
            With `format`: whether patches without brain are encoded, as in the authors' fine-tuning (default), or
            deleted.

        Raises
        ------
        CheckpointError
            If there are no weights, tensors do not match the settings, a file is damaged or missing, or `base` holds
            other weights than the updates were trained with.
        ConfigError
            If the configuration of the run cannot be read.
        """
        for name, path in (("source", source), ("extractor", extractor), ("parcels", parcels), ("base", base)):
            if not isinstance(path, str | os.PathLike) and not (path is None and name != "source"):
                expected = "a path, or OWNER/NAME on the hub" if name == "source" else "a path"
                raise ArgumentError("from_pretrained", name, f"a {type(path).__name__}", expected)
        options = HubOptions(revision=revision, cache_dir=cache_dir, token=token, local_files_only=local_files_only)
        if format is None and axes is None and background is None:
            about = find(source, weights, options)
        else:
            about = authors_checkpoint.find_as(format, source, weights, axes, background, options)
        about = replace(
            about,
            extractor=about.extractor if extractor is None else Path(extractor),
            parcels=about.parcels if parcels is None else Path(parcels),
        )
        with threads_inside(1):  # copying small tensors is faster with one thread
            model = cls(about, about.made["step"])
            if about.base is None and base is None:
                about.load_into(model.encoder)
            else:
                where, kind = model._base_of_updates(base)
                model._add_updates(
                    cls.from_pretrained(
                        where, kind, cache_dir=cache_dir, token=token, local_files_only=local_files_only
                    )
                )
        if isinstance(settings := model.settings, FinetuneSettings):
            outputs = max(1, len(settings.answer.classes))
            model.head = Head(settings.head, model.encoder.dim, outputs, model.geometry.cells).requires_grad_(False)
            about.load_head(model.head)
        return model.to(device)

    def save_pretrained(self, folder: str | Path) -> Path:
        """Export the model to a new or empty folder, which `from_pretrained` reads; as `slim-brain export`.

        Returns
        -------
        Path
            The folder.

        Raises
        ------
        ConfigError, Stopped
            See `slim.inference.export.write`.
        """
        from slim.inference import export

        export.write(self, Path(folder))
        return Path(folder)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool = True,
        token: str | bool | None = None,
        commit_message: str = "Upload a SLIM-Brain model",
    ) -> str:
        """Export the model and upload it to the Hugging Face hub.

        Parameters
        ----------
        repo_id : str
            OWNER/NAME; a model that does not exist is made.
        private : bool
            Whether a new model is visible to you alone. The default is True, because a data agreement may forbid to
            publish what was trained on the data.
        token, commit_message
            As in `huggingface_hub.HfApi.upload_folder`.

        Returns
        -------
        str
            The URL of the commit.

        Raises
        ------
        ExtraMissing
            If `huggingface_hub` is not installed.
        HubError
            If the hub does not take it.
        """
        with TemporaryDirectory() as folder:
            exported = self.save_pretrained(Path(folder) / repo_id.rpartition("/")[2])
            return hub.push(exported, repo_id, private=private, token=token, message=commit_message)

    @classmethod
    def random(cls, like: SlimBrain, seed: int) -> SlimBrain:
        """The same architecture with random weights. The caller's random generator is not changed.

        With the seed of the run, these are the initial weights of its training.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = cls(like._about, 0)
        return model.to(like.device)

    def __sklearn_clone__(self) -> SlimBrain:
        return self  # scikit-learn clones parameters of estimators; this one is never changed by a fit

    @cached_property
    def recipe(self) -> Recipe:
        """The preprocessing of the training data.

        Raises
        ------
        ConfigError
            If the temporal extractor or the label image of the parcels is missing.
        """
        return read_recipe(self.data, self.run_folder, self._about.extractor, self._about.parcels)

    def encode(
        self,
        image: Scan,
        per: str = "window",
        pooling: str = "mean",
        stage: int | None = None,
        *,
        mask: Niimg | None = None,
        confounds: Table | None = None,
        space: str | None = None,
        tr: float | None = None,
        dummy: int | str = "auto",
        orientation: str | None = None,
    ) -> np.ndarray:
        """Encode a NIfTI scan: `encode_windows` or `encode_scan`, chosen by `per`.

        The vectors are bit-identical for a path, for `nib.load(path)` and for the list of its 3-D images, and for every
        number of threads. For a list, `mask` and `confounds` must be given, because there are no files next to it.

        Parameters
        ----------
        image : path, Nifti1Image, or list of them
            Preprocessed 4-D BOLD. A list holds the 3-D images of one scan in time order and needs `tr`; to encode many
            scans, use `slim.evaluation.transformer.SlimBrainTransformer`. Mask, confounds and sidecar next to the file
            are used; for an image, those next to the file from which it was loaded.
        per : "window" or "scan"
        pooling : "mean", "mean+sd" or "location"
            See `slim.inference.vectors.vectors`. Poolings that are fitted on a set of scans are in
            `slim.evaluation.transformer.SlimBrainTransformer`.
        stage : int, optional
            Stage of the encoder, from 1; by default the last. In earlier stages, the tokens of each cell are averaged.
        mask, confounds, space, tr, dummy, orientation
            Facts about this scan, as in a cohort file; `tr` in seconds. See `shards.cohorts.niimg.as_run`.

        Returns
        -------
        ndarray, float32
            (W, P), for the windows that the ranker keeps (at most `windows.keep` of the training data), in time order;
            or (P,). `encode_tokens` also returns the start of each window and the TR that was used.

        Raises
        ------
        RunRefused
            If the scan cannot be converted (a ValueError).
        ConfigError
            If an argument has a wrong value (a ValueError) or type (a TypeError), or the temporal extractor or label
            image is missing.

        Warns
        -----
        UserWarning
            If something was assumed about the scan, such as its space or orientation; also if it has fewer windows than
            a sample in pretraining, k. It is encoded from these alone: no window is repeated or padded.
        """
        check_fixed(per, pooling)
        self._check_stage(stage)
        features = self.encode_converted(self._read(image, mask, confounds, space, tr, dummy, orientation), stage)
        return vectors(features, per, pooling, features.places)

    def encode_windows(
        self,
        image: Scan,
        pooling: str = "mean",
        stage: int | None = None,
        *,
        mask: Niimg | None = None,
        confounds: Table | None = None,
        space: str | None = None,
        tr: float | None = None,
        dummy: int | str = "auto",
        orientation: str | None = None,
    ) -> np.ndarray:
        """Encode a scan to one vector per window. Arguments and errors are as in `encode`.

        Returns
        -------
        ndarray, float32
            (W, P), in time order.
        """
        check_fixed("window", pooling)
        self._check_stage(stage)
        features = self.encode_converted(self._read(image, mask, confounds, space, tr, dummy, orientation), stage)
        return vectors(features, "window", pooling, features.places)

    def encode_scan(
        self,
        image: Scan,
        pooling: str = "mean",
        stage: int | None = None,
        *,
        mask: Niimg | None = None,
        confounds: Table | None = None,
        space: str | None = None,
        tr: float | None = None,
        dummy: int | str = "auto",
        orientation: str | None = None,
    ) -> np.ndarray:
        """Encode a scan to one vector. Arguments and errors are as in `encode`.

        Returns
        -------
        ndarray, float32
            (P,)
        """
        check_fixed("scan", pooling)
        self._check_stage(stage)
        features = self.encode_converted(self._read(image, mask, confounds, space, tr, dummy, orientation), stage)
        return vectors(features, "scan", pooling, features.places)

    def encode_tokens(
        self,
        image: Scan,
        stage: int | None = None,
        *,
        mask: Niimg | None = None,
        confounds: Table | None = None,
        space: str | None = None,
        tr: float | None = None,
        dummy: int | str = "auto",
        orientation: str | None = None,
    ) -> Features:
        """Encode a NIfTI scan to all its tokens, after harmonising and ranking it like the training data.

        The tokens equal those of `encode_session` for the converted scan. Arguments and errors are as in `encode`.
        """
        self._check_stage(stage)
        return self.encode_converted(self._read(image, mask, confounds, space, tr, dummy, orientation), stage)

    def encode_array(
        self,
        voxels: np.ndarray,
        mask: np.ndarray,
        affine: np.ndarray,
        tr: float,
        pooling: str = "mean",
        stage: int | None = None,
        *,
        confounds: Table | None = None,
        space: str | None = None,
        dummy: int | str = "auto",
        orientation: str | None = None,
    ) -> np.ndarray:
        """Encode a scan given as an array. The result is that of `encode_windows` for the same scan as NIfTI.

        Parameters
        ----------
        voxels : array, (frames, voxels of `mask`)
            Preprocessed BOLD, in C order of (x, y, z). If it was z-scored, multiply by the SDs and add the means first:
            the encoder needs both.
        mask : bool array, (x, y, z)
        affine : array, (4, 4)
            From voxel indices to mm.
        tr : float
            In s.
        pooling, stage, confounds, space, dummy, orientation
            As in `encode`, which also lists the errors and warnings.

        Returns
        -------
        ndarray, float32
            (W, P), in time order.
        """
        check_fixed("window", pooling)
        self._check_stage(stage)
        image, mask_image = images_of(voxels, mask, affine, tr)
        made = self._read(image, mask_image, confounds, space, tr, dummy, orientation)
        features = self.encode_converted(made, stage)
        return vectors(features, "window", pooling, features.places)

    def encode_run(self, image: Scan, stage: int | None = None, **stated: Any) -> Features:
        """Deprecated; use `encode_tokens`."""
        warn_renamed("SlimBrain.encode_run", "encode_tokens")
        self._check_stage(stage)
        return self.encode_converted(self._read(image, **stated), stage)

    def convert(
        self,
        image: Scan,
        *,
        mask: Niimg | None = None,
        confounds: Table | None = None,
        space: str | None = None,
        tr: float | None = None,
        dummy: int | str = "auto",
        orientation: str | None = None,
    ) -> Converted:
        """Convert a scan like the training data, for `encode_converted` and `outputs_converted`; see `encode`.

        It does not warn of assumptions; `shards.conversion.session.assumptions` describes those in its `meta`.
        """
        recipe = self.recipe
        scan = as_run(image, mask, confounds, space=space, tr=tr, dummy=dummy, orientation=orientation)
        # One thread, as in the worker processes of a conversion, so that sums are equal.
        with scan as run, threadpool_limits(1):
            return convert_run(run, recipe.settings, recipe.parcels, recipe.ranker)

    def _read(
        self,
        image: Scan,
        mask: Niimg | None = None,
        confounds: Table | None = None,
        space: str | None = None,
        tr: float | None = None,
        dummy: int | str = "auto",
        orientation: str | None = None,
    ) -> Converted:
        """Convert a scan, and warn of what was assumed about it."""
        made = self.convert(
            image, mask=mask, confounds=confounds, space=space, tr=tr, dummy=dummy, orientation=orientation
        )
        for words in assumed(made.meta, self.settings.windows.k):
            warnings.warn(f"{made.meta.source}: {words}", stacklevel=3)  # the line that called the public method
        return made

    def encode_converted(self, made: Converted, stage: int | None = None) -> Features:
        """Encode a converted scan to all its tokens, as `encode_tokens` does."""
        self._check_stage(stage)
        return self._encode(made, made.meta.model_copy(update={"key": made.meta.subject}), stage)

    def predict(
        self,
        image: Scan,
        *,
        mask: Niimg | None = None,
        confounds: Table | None = None,
        space: str | None = None,
        tr: float | None = None,
        dummy: int | str = "auto",
        orientation: str | None = None,
    ) -> str | float:
        """Predict the label of a NIfTI scan with a fine-tuned model.

        The prediction is the mean over groups of k windows, as for the test subjects of a fine-tuning. Arguments and
        errors are as in `encode`.

        Returns
        -------
        str or float
            The most probable class, or the value in the unit of the label.

        Raises
        ------
        ConfigError
            If the model is not fine-tuned.
        """
        classes = self._labels().classes
        outputs = self.outputs_converted(self._read(image, mask, confounds, space, tr, dummy, orientation))
        return classes[int(outputs.argmax())] if classes else float(outputs[0])

    def predict_proba(
        self,
        image: Scan,
        *,
        mask: Niimg | None = None,
        confounds: Table | None = None,
        space: str | None = None,
        tr: float | None = None,
        dummy: int | str = "auto",
        orientation: str | None = None,
    ) -> np.ndarray:
        """Predict the probability of each class for a scan. Arguments and errors are as in `predict`.

        Returns
        -------
        ndarray, float64
            (K,), in the order of `settings.answer.classes`.

        Raises
        ------
        ConfigError
            If the model is not fine-tuned, or predicts a value.
        """
        if not self._labels().classes:
            got = "a model that predicts a value"
            raise ConfigError(self.run_folder, "predict_proba", got, "a model that predicts classes", "Use predict")
        return self.outputs_converted(self._read(image, mask, confounds, space, tr, dummy, orientation))

    def answer(self, image: Scan, **stated: Any) -> np.ndarray:
        """Deprecated; use `predict_proba` (K,) for classes, or `predict` (1,) for values."""
        warn_renamed("SlimBrain.answer", "predict_proba for classes, or predict")
        return self.outputs_converted(self._read(image, **stated))

    def _labels(self) -> AnswerSettings:
        """The labels that a fine-tuned model predicts."""
        if self.head is None or not isinstance(self.settings, FinetuneSettings):
            got = "none: these weights were only pretrained, so they cannot predict a label"
            hint = "Use the folder of a fine-tuning, or an export of one"
            raise ConfigError(self.run_folder, "head", got, "a fine-tuned encoder", hint)
        return self.settings.answer

    def answer_converted(self, made: Converted) -> np.ndarray:
        """Deprecated; use `outputs_converted`."""
        warn_renamed("SlimBrain.answer_converted", "outputs_converted")
        return self.outputs_converted(made)

    @torch.no_grad()
    def outputs_converted(self, made: Converted) -> np.ndarray:
        """Outputs of a fine-tuned model for a converted scan.

        Returns
        -------
        ndarray, float64
            Probabilities of the classes, (K,), or the value in the unit of the label, (1,).
        """
        from slim.inference.predict import predict

        labels, settings = self._labels(), self.settings
        assert self.head is not None and isinstance(settings, FinetuneSettings)
        model, classes = Answerer(self.encoder, self.head, settings.precision == "bf16"), len(labels.classes)
        session = made.meta.model_copy(update={"key": made.meta.subject})
        with threads_inside(cores()):
            guess_K = predict(model, classes, made, [session], self.geometry, settings, self.device)[0]
        return guess_K if classes else guess_K * labels.sd + labels.mean

    def encode_session(
        self, dataset: Dataset, session: SessionRecord, batch: int = 4, stage: int | None = None
    ) -> Features:
        """Features of all kept windows of a session, for the whole brain.

        Windows are encoded in time order in groups of k, as in training. If k does not divide their number, the last
        group repeats windows of the group before; their slots are taken from the group before. Fewer than k windows are
        encoded together: the slots that they do not fill have no tokens. A slot belongs to the window that contains the
        middle of its frames.

        Parameters
        ----------
        dataset : Dataset
        session : SessionRecord
            One of `dataset.sessions`.
        batch : int
            Number of groups in memory at the same time. A GPU encodes them as one batch, a CPU on one core each. It
            does not change the features.
        stage : int, optional
            As in `encode`.

        Raises
        ------
        ConfigError, DatasetError
            See `check_data`; also if the bytes of the session are damaged.
        """
        if not isinstance(dataset, Dataset):
            expected = "a shards.format.reader.Dataset, such as Dataset('shards/')"
            raise ArgumentError("encode_session", "dataset", f"a {type(dataset).__name__}", expected)
        if not isinstance(session, SessionRecord):
            raise ArgumentError("encode_session", "session", repr(session), "one of dataset.sessions")
        if not _is_count(batch) or batch < 1:
            raise ConfigError("encode_session", "batch", repr(batch), "a whole number of 1 or more")
        self.check_data(dataset)
        self._check_stage(stage)
        return self._encode(dataset, session, stage, batch)

    def _check_stage(self, stage: int | None) -> None:
        stages = len(self.encoder.ends)
        expected = f"1 to {stages}, the stages of this encoder"
        if stage is not None and not _is_count(stage):
            raise ArgumentError("stage", "", repr(stage), expected)
        if stage is not None and not 1 <= stage <= stages:
            raise ConfigError("stage", "", stage, expected)

    def _encode(self, samples: Samples[ScanT], session: ScanT, stage: int | None, batch: int = 4) -> Features:
        keep = self.background == "keep"
        encoder = SessionEncoder(self.encoder, self.geometry, self.settings, self.frames, self.device, keep)
        return encoder.features(samples, session, stage, batch)


def _is_count(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)
