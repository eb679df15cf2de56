"""A scikit-learn transformer from images to vectors: fitted on training images only, with a cache.

    from slim import SlimBrainTransformer

    vectors = SlimBrainTransformer("export/", pooling="cov", memory="cache/")
    cross_val_score(make_pipeline(vectors, StandardScaler(), LogisticRegression()), images, labels)

It learns from the training images: the places that contain brain in all of them, with the mean token of each; the
principal components, for `cov` and `patterns`; the queries, for `attentive`, which needs labels. The encoder is not
changed.

Legend: N images; S time slots; L places; C channels; A queries; P features of a vector.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from numbers import Integral
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import pandas as pd
import torch
from nibabel.spatialimages import SpatialImage
from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, TransformerMixin
from sklearn.utils import check_random_state
from sklearn.utils.multiclass import type_of_target
from sklearn.utils.validation import check_is_fitted, check_memory

from shards.cohorts.niimg import as_run, check_names, check_voxels, file_of, unchanged
from shards.conversion.session import fingerprint
from shards.core.deprecation import OldName, renamed_state
from shards.core.errors import ArgumentError, ConfigError, DatasetError, RunRefused, UserError
from shards.core.progress import progress
from slim import __version__
from slim.evaluation.attentive import Attentive
from slim.evaluation.splits import Fold
from slim.inference import vectors
from slim.inference.slim_brain import SlimBrain
from slim.inference.vectors import Features
from slim.model import pooling
from slim.model.pooling import FITTED, FIXED

POOLINGS = (*FIXED, *FITTED, "attentive")
_LEAST_PEOPLE = {"classification": 2, "regression": 4}  # of each class; of all: they are divided to choose steps
_LEAST_PLACES = 0.5  # of the training images' places, that an image must have
_HERE = "SlimBrainTransformer"
_ON_ERROR = ("raise", "skip")
_LISTED = 3  # images that a warning names


class SlimBrainTransformer(ClassNamePrefixFeaturesOutMixin, TransformerMixin, BaseEstimator):
    """Compute a vector for each image with a pretrained encoder.

    Parameters
    ----------
    model : str, Path or SlimBrain
        A model, or what `SlimBrain.from_pretrained` accepts.
    pooling : "mean", "mean+sd", "location", "cov", "patterns" or "attentive"
        See `slim.inference.vectors` and `slim.evaluation.attentive`.
    components : int, optional
        Number of principal components of `cov`, by default 3, or of `patterns`, by default 64.
    stage : int, optional
        Stage of the encoder, from 1; by default the last.
    target : "classification" or "regression"
        What `y` is, for `attentive`.
    random_state : int, RandomState or None
        Seed of the random draws of `attentive` (inner folds, batches), as in scikit-learn: with an int, each call of
        `fit` gives the same result.
    memory : str, Path or joblib.Memory, optional
        Cache for the tokens of images, so that no image is encoded twice: 11 MB for a scan at the published sizes.
    on_error : "raise" or "skip"
        What happens when an image cannot be encoded. "raise": raise an error that names the
        image. "skip": warn, leave the image out of the fit, and return a row of NaN for it, because scikit-learn needs
        a row for each image. Drop or impute such rows before you fit a model.
    verbose : bool
        Show the progress over images, unless `SLIM_PROGRESS=0` is in the environment.

    Attributes
    ----------
    model_ : SlimBrain
    places_ : int64 (L,), places that hold brain in all training images
    mean_tokens_ : float32 (L, C), the mean token of each over training images and slots
    components_ : ndarray, principal axes of `cov`, (C, Q), or patterns of `patterns`, (L, C, Q)
    queries_ : float32 (A, C), of `attentive`
    """

    # the names of version 0.1
    place_L_ = OldName("places_")
    mean_LC_ = OldName("mean_tokens_")
    axes_CQ_ = OldName("components_")
    query_AC_ = OldName("queries_")

    def __setstate__(self, state: dict[str, object]) -> None:
        super().__setstate__({"verbose": False, **renamed_state(SlimBrainTransformer, state)})

    def __init__(
        self,
        model: str | Path | SlimBrain,
        pooling: str = "cov",
        components: int | None = None,
        stage: int | None = None,
        target: str = "classification",
        random_state: int | np.random.RandomState | None = 0,
        memory: str | Path | joblib.Memory | None = None,
        on_error: str = "raise",
        verbose: bool = False,
    ):
        self.model = model
        self.pooling = pooling
        self.components = components
        self.stage = stage
        self.target = target
        self.random_state = random_state
        self.memory = memory
        self.on_error = on_error
        self.verbose = verbose

    def fit(self, X: Sequence[Any], y: Any = None, groups: Any = None) -> SlimBrainTransformer:
        """Learn what the pooling needs.

        Parameters
        ----------
        X : sequence
            Each an image (a path or Nifti1Image), or a mapping of the arguments of `SlimBrain.encode_tokens`, such as
            `{"image": "sub-01_bold.nii.gz", "mask": "sub-01_mask.nii.gz", "space": "native"}`.
        y : sequence, optional
            Classes or values, one for each image; `attentive` needs them.
        groups : sequence, optional
            Subject of each image, for the inner folds of `attentive`; by default each image has its own.

        Raises
        ------
        ConfigError, CheckpointError, RunRefused, DatasetError
            As `SlimBrain.from_pretrained` and `SlimBrain.encode`; errors of an image name its number and path.
            Wrong types are TypeErrors, other wrong arguments ValueErrors.
        """
        self._fit(self._begin(_images(X), y, groups), y, groups)
        return self

    def fit_transform(self, X: Sequence[Any], y: Any = None, groups: Any = None) -> np.ndarray:
        """`fit`, then `transform`, encoding each image once."""
        images = _images(X)
        features = self._begin(images, y, groups)
        self._fit(features, y, groups)
        return self._vectors(features, images)

    def transform(self, X: Sequence[Any]) -> np.ndarray:
        """Vectors of images, float32 (N, P).

        At a place without brain in an image, the mean token of the training images is used, with a warning.

        Raises
        ------
        RunRefused
            If an image cannot be encoded, unless `on_error` is "skip".
        DatasetError
            If an image has less than half of the places, unless `on_error` is "skip".
        """
        check_is_fitted(self)
        images = _images(X)
        return self._vectors(self._encoded(images), images)

    def _begin(self, images: list[Any], y: Any, groups: Any) -> list[Features | None]:
        """Check all other arguments before the first image is encoded."""
        self._check_parameters()
        if self.pooling == "attentive" and y is None:
            raise ConfigError(_HERE, "y", "none", "labels, which attentive pooling is trained for")
        for name, values in (("y", y), ("groups", groups)):
            if values is not None and (found := np.shape(values)[:1]) != (len(images),):
                got = f"{found[0]} values" if found else f"a {type(values).__name__}"
                raise ConfigError(_HERE, name, got, f"{len(images)}, one for each image")
        made = self.model
        self.model_ = made if isinstance(made, SlimBrain) else SlimBrain.from_pretrained(made)
        features = self._encoded(images)
        if all(item is None for item in features):
            raise DatasetError(_HERE, "X", "no image that can be encoded", "at least one")
        return features

    def _check_parameters(self) -> None:
        for name, known in (("pooling", POOLINGS), ("target", tuple(_LEAST_PEOPLE)), ("on_error", _ON_ERROR)):
            if (got := getattr(self, name)) not in known:
                raise ConfigError(_HERE, name, got, f"one of {', '.join(known)}")
        components = self.components
        whole = isinstance(components, Integral) and not isinstance(components, bool)
        if components is not None and (not whole or components < 1):
            kind = ConfigError if isinstance(components, Integral) else ArgumentError
            raise kind(_HERE, "components", repr(components), "a whole number of 1 or more")
        try:
            check_random_state(self.random_state)
        except ValueError:
            expected = "None, a whole number from 0 to 4294967295, or a numpy.random.RandomState"
            raise ConfigError(_HERE, "random_state", repr(self.random_state), expected) from None

    def _fit(self, everyone: list[Features | None], y: Any, groups: Any) -> None:
        kept = [number for number, item in enumerate(everyone) if item is not None]
        features = [item for item in everyone if item is not None]
        y, groups = (None if values is None else np.asarray(values)[kept] for values in (y, groups))
        self.places_ = vectors.common_places(features)
        tokens = [vectors.at_places(item, self.places_) for item in features]
        self.mean_tokens_ = np.mean([token_SLC.mean(axis=0) for token_SLC in tokens], axis=0)
        if self.pooling in FITTED:
            self.components_ = vectors.fit_components(features, self.places_, self.pooling, self.components)
        if self.pooling == "attentive":
            query_1AC, *_ = Attentive(features, self.model_.device).choose(self._fold(y, groups))
            self.queries_ = query_1AC[0].cpu().numpy()
        self._n_features_out = self._vector(features[0]).size

    def _fold(self, y: Any, groups: Any) -> Fold:
        """All images as the training side of a split."""
        answer_n, everyone = np.asarray(y), np.arange(len(y))
        subject_n = everyone if groups is None else np.unique(groups, return_inverse=True)[1]
        names: Any = ["all of them"]
        if self.target == "classification":
            if type_of_target(answer_n).startswith("continuous"):
                hint = "Set target='regression'"
                raise ConfigError(_HERE, "y", "numbers that are no classes", "classes", hint)
            names, answer_n = np.unique(answer_n, return_inverse=True)
        else:
            answer_n = answer_n.astype(np.float64)
            answer_n = (answer_n - answer_n.mean()) / max(answer_n.std(), 1e-12)
        least = _LEAST_PEOPLE[self.target]
        for number, name in enumerate(names):
            of_class = answer_n == number if self.target == "classification" else everyone >= 0
            people = len(np.unique(subject_n[of_class]))
            if people < least:
                raise ConfigError(_HERE, "y", f"{people} people of {name}", f"at least {least}")
        return Fold(self.target, len(names), everyone, everyone[:0], answer_n, subject_n, self._seed())

    def _seed(self) -> int:
        if isinstance(self.random_state, Integral):
            return int(self.random_state)
        return int(check_random_state(self.random_state).randint(np.iinfo(np.int32).max))

    def _vectors(self, features: list[Features | None], images: list[Any]) -> np.ndarray:
        found_NP = np.full((len(features), self._n_features_out), np.nan, np.float32)
        left_out = []
        for number, (image, item) in enumerate(zip(images, features, strict=True)):
            if item is None:
                continue  # it was named when it could not be encoded
            try:
                found_NP[number] = self._vector(self._completed(item))
            except DatasetError as error:
                left_out.append(self._failed(number, image, error))
        self._warn_of(left_out, len(features))
        return found_NP

    def _vector(self, item: Features) -> np.ndarray:
        if self.pooling in FITTED:
            return vectors.fitted(item, self.places_, self.pooling, self.components_)
        if self.pooling == "attentive":
            token_1TC = torch.from_numpy(vectors.at_places(item, self.places_)).flatten(0, 1)[None]
            valid_1T = torch.ones(token_1TC.shape[:2], dtype=torch.bool)
            return pooling.attentive(torch.from_numpy(self.queries_)[None], token_1TC, valid_1T).flatten().numpy()
        return vectors.fixed(item, self.places_, self.pooling)

    def _completed(self, item: Features) -> Features:
        """The tokens at the training images' places, with their mean where this image has no brain."""
        there_L = np.isin(self.places_, item.places)
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
        token_SLC = np.repeat(self.mean_tokens_[None], len(item.tokens), axis=0)
        token_SLC[:, there_L] = vectors.at_places(item, self.places_[there_L])
        return replace(item, tokens=token_SLC, places=self.places_)

    def _encoded(self, images: list[Any]) -> list[Features | None]:
        """Tokens of each image; None for one that is skipped."""
        memory = str(self.memory) if isinstance(self.memory, os.PathLike) else self.memory
        encode = check_memory(memory).cache(_encode, ignore=["model", "arguments"])
        found: list[Features | None] = []
        left_out = []
        with progress("encode", len(images), "images", shown=bool(self.verbose)) as advance:
            for number, image in enumerate(images):
                try:
                    arguments = _arguments(image)
                    found.append(encode(self.model_, self.model_.checksum, arguments, _known(arguments), self.stage))
                except UserError as error:
                    left_out.append(self._failed(number, image, error))
                    found.append(None)
                advance(1, _name(image))
        for number, item in enumerate(found):
            for words in () if item is None else item.assumed:  # told each time, also of an image that was kept
                warnings.warn(f"X[{number}] ({_name(images[number])}): {words}", stacklevel=4)
        self._warn_of(left_out, len(images))
        return found

    def _failed(self, number: int, image: Any, error: UserError) -> UserError:
        """Raise the error of an image, with its name, unless such images are skipped."""
        name = _name(image)
        where = f"X[{number}]: {error.where}" if name in error.where else f"X[{number}] ({name}): {error.where}"
        named = type(error)(where, error.field, error.got, error.expected, error.hint)
        # arguments that are wrong are no fault of an image: with the next image they would be wrong again
        if self.on_error == "skip" and isinstance(error, RunRefused | DatasetError):
            return named
        raise named from None

    def _warn_of(self, left_out: list[UserError], images: int) -> None:
        if left_out:
            named = "; ".join(error.line() for error in left_out[:_LISTED])
            more = f"; and {len(left_out) - _LISTED} more" if len(left_out) > _LISTED else ""
            warnings.warn(f"{len(left_out)} of {images} images are skipped: {named}{more}", stacklevel=4)

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.two_d_array = False
        tags.no_validation = True
        tags.transformer_tags.preserves_dtype = []  # vectors are float32
        tags.target_tags.required = self.pooling == "attentive"
        return tags


def _images(X: Any) -> list[Any]:
    """Images as a list.

    Raises
    ------
    ArgumentError
        If it is a single image, or not a list of images.
    ConfigError
        If it is empty.
    """
    expected = "a list of images: paths, nibabel images, or mappings of the arguments of SlimBrain.encode_tokens"
    if isinstance(X, str | os.PathLike | SpatialImage | Mapping):
        kind = "one path" if isinstance(X, str | os.PathLike) else f"one {type(X).__name__}"
        raise ArgumentError(_HERE, "X", f"{kind} ({_name(X)})", expected, "Put it into a list: [image]")
    if isinstance(X, np.ndarray) and (X.ndim != 1 or X.dtype.kind not in "OUT"):
        raise ArgumentError(_HERE, "X", f"an array of {X.dtype} and shape {X.shape}", expected)
    if isinstance(X, pd.DataFrame):
        raise ArgumentError(_HERE, "X", "a DataFrame", expected, "Give its column of paths: list(table['path'])")
    if not isinstance(X, Iterable):
        raise ArgumentError(_HERE, "X", f"a {type(X).__name__}" if X is not None else "None", expected)
    images = list(X)
    if not images:
        raise ConfigError(_HERE, "X", "an empty list", expected)
    return images


def _arguments(image: Any) -> dict[str, Any]:
    """The arguments of `SlimBrain.convert` for one item of X."""
    if not isinstance(image, Mapping):
        return {"image": image}
    if "image" not in image:
        got = f"a mapping of {', '.join(map(str, image)) or 'nothing'}"
        raise ConfigError("arguments", "image", got, "one with an image", 'Such as {"image": path, "mask": path}')
    arguments = {str(name): value for name, value in image.items()}
    check_names(arguments)
    return arguments


def _name(image: Any) -> str:
    """What an item of X is called."""
    image = image.get("image") if isinstance(image, Mapping) else image
    if isinstance(image, list | tuple):
        return f"{len(image)} images, the first {_name(image[0])}" if image else "an empty list"
    if isinstance(image, str | os.PathLike):
        return str(image)
    file = file_of(image)
    return str(file) if file is not None else "in memory" if hasattr(image, "dataobj") else type(image).__name__


def _encode(
    model: SlimBrain, checksum: str, arguments: dict[str, Any], known: dict[str, Any], stage: int | None
) -> Features:
    """Tokens of an image. The cache compares `checksum`, `known` and `stage`."""
    return model.encode_converted(model.convert(**arguments), stage)


def _known(arguments: dict[str, object]) -> dict[str, object]:
    """Everything besides the model that the tokens of an image depend on, for the cache."""
    known = {"version": __version__, **{name: _content(value) for name, value in arguments.items()}}
    if (file := file_of(arguments["image"])) is not None:  # what is found beside it counts as well
        with as_run(file) as run:
            known["beside"] = fingerprint(run)
    return known


def _content(value: Any) -> Any:
    """Identify an argument: a file by its name, size and time, an image or table in memory by its content."""
    if isinstance(value, str | os.PathLike) and Path(value).expanduser().is_file():
        stat = Path(value).expanduser().stat()
        return str(Path(value).expanduser().resolve()), stat.st_size, stat.st_mtime_ns
    if isinstance(value, SpatialImage):
        check_voxels(value, "image", _name(value))
        if (file := unchanged(value)) is not None:
            return _content(file)
        image: Any = value
        try:
            return joblib.hash([np.asanyarray(image.dataobj), image.affine, image.header.binaryblock])
        except Exception:  # voxels that cannot be read are told when they are encoded
            return _name(value)
    if isinstance(value, pd.DataFrame):
        return joblib.hash(value)
    if isinstance(value, list | tuple):
        return [_content(item) for item in value]
    return value if isinstance(value, str | int | float | None) else str(value)
