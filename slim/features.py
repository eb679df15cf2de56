"""Runs in, vectors out, as scikit-learn has it: fitted on training images alone, cached, at home in a pipeline.

    from slim.features import SlimBrainTransformer

    vectors = SlimBrainTransformer("export/", pooling="cov", memory="cache/")
    cross_val_score(make_pipeline(vectors, StandardScaler(), LogisticRegression()), images, labels)

What is learned from the training images: the places that hold brain in all of them, with the mean token of each; of
`cov` the principal axes; of `attentive` the queries, for which it needs the labels. The encoder stays as it is.

Legend: N images; S time slots; L places; C channels; A queries; P features of a vector.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import torch
from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, TransformerMixin
from sklearn.utils.multiclass import type_of_target
from sklearn.utils.validation import check_is_fitted, check_memory

from shards.bids import files_beside, sidecars
from shards.errors import ConfigError, DatasetError
from slim import __version__, pooling
from slim.attentive import Attentive, attend
from slim.brain import SlimBrain
from slim.pooling import Features
from slim.splits import Fold

POOLINGS = (*pooling.FIXED, "cov", "attentive")
_LEAST_PEOPLE = {"classification": 2, "regression": 4}  # of each class; of all: they are divided to choose steps
_LEAST_PLACES = 0.5  # of the training images' places, that an image must have


class SlimBrainTransformer(ClassNamePrefixFeaturesOutMixin, TransformerMixin, BaseEstimator):
    """A vector for each image, by a pretrained encoder.

    Parameters
    ----------
    model : str, Path or SlimBrain
        As `SlimBrain.from_pretrained` takes it, or one that it made.
    pooling : "mean", "mean+sd", "location", "cov" or "attentive"
        See `slim.pooling` and `slim.attentive`.
    components : int
        Principal axes of `cov`.
    stage : int, optional
        Of the encoder, from 1; by default the last.
    target : "classification" or "regression"
        What `y` is, for `attentive`.
    random_state : int
        Of what `attentive` draws: inner folds, batches.
    memory : str or joblib.Memory, optional
        Where tokens of images are kept, so that no image is encoded twice: 11 MB for a run at the published sizes.

    Attributes
    ----------
    model_ : SlimBrain
    place_L_ : int64 (L,), places that hold brain in all training images
    mean_LC_ : float32 (L, C), the mean token of each over training images and slots
    axes_CQ_ : float64 (C, Q), of `cov`
    query_AC_ : float32 (A, C), of `attentive`
    """

    def __init__(
        self,
        model: str | Path | SlimBrain,
        pooling: str = "cov",
        components: int = 3,
        stage: int | None = None,
        target: str = "classification",
        random_state: int = 0,
        memory: str | joblib.Memory | None = None,
    ):
        self.model = model
        self.pooling = pooling
        self.components = components
        self.stage = stage
        self.target = target
        self.random_state = random_state
        self.memory = memory

    def fit(self, X: Sequence[Any], y: Any = None, groups: Any = None) -> SlimBrainTransformer:
        """Learn what the pooling needs.

        Parameters
        ----------
        X : sequence
            Each an image (a path or Nifti1Image), or a mapping of the arguments of `SlimBrain.encode_run`, such as
            `{"image": "sub-01_bold.nii.gz", "mask": "sub-01_mask.nii.gz", "space": "native"}`.
        y : sequence, optional
            Classes or values; `attentive` needs them.
        groups : sequence, optional
            Whose image each is, for the inner folds of `attentive`; by default everybody has one.

        Raises
        ------
        ConfigError, CheckpointError, RunRefused, DatasetError
            As `SlimBrain.from_pretrained` and `SlimBrain.encode`.
        """
        self._fit(self._begin(X, y), y, groups)
        return self

    def fit_transform(self, X: Sequence[Any], y: Any = None, groups: Any = None) -> np.ndarray:
        """`fit`, then `transform`, encoding each image once."""
        features = self._begin(X, y)
        self._fit(features, y, groups)
        return self._vectors(features)

    def transform(self, X: Sequence[Any]) -> np.ndarray:
        """Vectors of images, float32 (N, P).

        At a place where an image has no brain it is given the mean token of the training images, with a warning.

        Raises
        ------
        RunRefused
            If an image cannot be encoded.
        DatasetError
            If an image has less than half of the places.
        """
        check_is_fitted(self)
        return self._vectors(self._encoded(X))

    def _begin(self, X: Sequence[Any], y: Any) -> list[Features]:
        for name, known in (("pooling", POOLINGS), ("target", _LEAST_PEOPLE)):
            if (got := getattr(self, name)) not in known:
                raise ConfigError("SlimBrainTransformer", name, got, f"one of {', '.join(known)}")
        if self.pooling == "attentive" and y is None:
            raise ConfigError("SlimBrainTransformer", "y", "none", "labels, which attentive pooling is trained for")
        made = self.model
        self.model_ = made if isinstance(made, SlimBrain) else SlimBrain.from_pretrained(made)
        return self._encoded(X)

    def _fit(self, features: list[Features], y: Any, groups: Any) -> None:
        self.place_L_ = pooling.common_places(features)
        tokens = [pooling.at_places(item, self.place_L_) for item in features]
        self.mean_LC_ = np.mean([token_SLC.mean(axis=0) for token_SLC in tokens], axis=0)
        if self.pooling == "cov":
            self.axes_CQ_ = pooling.principal_axes(features, self.place_L_, self.components)
        if self.pooling == "attentive":
            query_1AC, *_ = Attentive(features, self.model_.device).choose(self._fold(y, groups))
            self.query_AC_ = query_1AC[0].cpu().numpy()
        self._n_features_out = self._vector(features[0]).size

    def _fold(self, y: Any, groups: Any) -> Fold:
        """All images as the training side of a split."""
        answer_n, everyone = np.asarray(y), np.arange(len(y))
        subject_n = everyone if groups is None else np.unique(groups, return_inverse=True)[1]
        names: Any = ["all of them"]
        if self.target == "classification":
            if type_of_target(answer_n).startswith("continuous"):
                hint = "Set target='regression'"
                raise ConfigError("SlimBrainTransformer", "y", "numbers that are no classes", "classes", hint)
            names, answer_n = np.unique(answer_n, return_inverse=True)
        else:
            answer_n = answer_n.astype(np.float64)
            answer_n = (answer_n - answer_n.mean()) / max(answer_n.std(), 1e-12)
        least = _LEAST_PEOPLE[self.target]
        for number, name in enumerate(names):
            of_class = answer_n == number if self.target == "classification" else everyone >= 0
            people = len(np.unique(subject_n[of_class]))
            if people < least:
                raise ConfigError("SlimBrainTransformer", "y", f"{people} people of {name}", f"at least {least}")
        return Fold(self.target, len(names), everyone, everyone[:0], answer_n, subject_n, self.random_state)

    def _vectors(self, features: list[Features]) -> np.ndarray:
        return np.stack([self._vector(self._completed(item)) for item in features]).astype(np.float32)

    def _vector(self, item: Features) -> np.ndarray:
        if self.pooling == "cov":
            return pooling.cov(item, self.place_L_, self.axes_CQ_)
        if self.pooling == "attentive":
            token_1TC = torch.from_numpy(pooling.at_places(item, self.place_L_)).flatten(0, 1)[None]
            valid_1T = torch.ones(token_1TC.shape[:2], dtype=torch.bool)
            return attend(torch.from_numpy(self.query_AC_)[None], token_1TC, valid_1T).flatten().numpy()
        return pooling.FIXED[self.pooling](item, self.place_L_)

    def _completed(self, item: Features) -> Features:
        """The tokens at the training images' places, with their mean where this image has no brain."""
        there_L = np.isin(self.place_L_, item.place_L)
        if there_L.mean() < _LEAST_PLACES:
            got = f"brain in {there_L.sum()} of the {len(there_L)} places"
            raise DatasetError(item.key, "places", got, "most of those of the training images", "Check its mask")
        if there_L.all():
            return item
        missing = int((~there_L).sum())
        warnings.warn(
            f"{item.key}: no brain in {missing} of {len(there_L)} places, which get the training images' mean",
            stacklevel=4,
        )
        token_SLC = np.repeat(self.mean_LC_[None], len(item.token_SLC), axis=0)
        token_SLC[:, there_L] = pooling.at_places(item, self.place_L_[there_L])
        return replace(item, token_SLC=token_SLC, place_L=self.place_L_)

    def _encoded(self, X: Sequence[Any]) -> list[Features]:
        encode = check_memory(self.memory).cache(_encode, ignore=["model", "arguments"])
        found = []
        for item in X:
            arguments = dict(item) if isinstance(item, Mapping) else {"image": item}
            if "image" not in arguments:
                got = ", ".join(arguments) or "nothing"
                raise ConfigError("SlimBrainTransformer", "X", f"a mapping of {got}", "one with an image")
            known = {"version": __version__, **{name: _content(value) for name, value in arguments.items()}}
            if isinstance(arguments["image"], str | Path):  # what is found beside it counts as well
                bold = Path(arguments["image"])
                known["beside"] = [_content(path) for path in (*files_beside(bold), *sidecars(bold)) if path]
            found.append(encode(self.model_, self.model_.checksum, arguments, known, self.stage))
        return found

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.two_d_array = False
        tags.no_validation = True
        tags.target_tags.required = self.pooling == "attentive"
        return tags


def _encode(
    model: SlimBrain, checksum: str, arguments: dict[str, Any], known: dict[str, Any], stage: int | None
) -> Features:
    """Tokens of an image; what tells the cache one from another is `checksum`, `known` and `stage`."""
    return model.encode_run(stage=stage, **arguments)


def _content(value: Any) -> Any:
    """What an argument is, for the cache: a file by its name, size and time, an image by its values and header."""
    if isinstance(value, str | Path) and Path(value).is_file():
        stat = Path(value).stat()
        return str(Path(value).resolve()), stat.st_size, stat.st_mtime_ns
    if hasattr(value, "dataobj"):
        return joblib.hash([np.asanyarray(value.dataobj), value.affine, value.header.binaryblock])
    return value if isinstance(value, str | int | float | None) else str(value)
