"""The preprocessing of a model's training data, so that new scans can be preprocessed in the same way.

The settings come from the manifest of the training dataset. The manifest holds only checksums of two files that are
stored elsewhere: the temporal extractor that ranked the windows, and the label image of the parcels.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from shards.conversion.session import Parcels, SessionSettings
from shards.core.errors import ConfigError
from shards.core.files import sha256
from shards.core.settings import check
from shards.format.manifest import DataRecord
from slim.ranking.extractor import Extractor
from slim.ranking.parcels import make_parcels
from slim.ranking.rankers import Ranker, make_ranker


@dataclass(frozen=True)
class Recipe:
    """The arguments of `shards.conversion.session.convert_run`, except the scan.

    Attributes
    ----------
    settings : SessionSettings
    parcels : callable
    ranker : Ranker
    """

    settings: SessionSettings
    parcels: Parcels
    ranker: Ranker


def read_recipe(data: DataRecord, where: str | Path, extractor: Path | None, image: Path | None) -> Recipe:
    """Read the recipe of a dataset.

    Parameters
    ----------
    data : DataRecord
        Manifest of the dataset.
    where : str or Path
        The weights, named in errors.
    extractor : Path, optional
        Folder of the temporal extractor.
    image : Path, optional
        Label image of the parcels.

    Raises
    ------
    ConfigError
        If a file that the dataset was made with is missing, or differs from it.
    """
    tree = data.configuration["settings"]
    try:
        tree = {name: tree[name] for name in SessionSettings.model_fields}
        image_of = tree["parcels"]["image"]
        named = image_of is None or all(isinstance(image_of[name], str) for name in ("name", "sha256"))
    except (KeyError, TypeError) as error:
        raise _no_settings(where, error) from None
    if not named:
        raise ConfigError(where, "data", "names that are not text", "the settings of a conversion")
    if tree["parcels"]["image"] is not None:
        labels = _image(tree["parcels"]["image"], where, image)
        tree = tree | {"parcels": tree["parcels"] | {"image": str(labels)}}
    settings = check(SessionSettings, tree, where)
    # Training decides which scans are long enough to learn from; any scan with a window can be encoded.
    settings = settings.model_copy(update={"windows": settings.windows.model_copy(update={"minimum": 1})})
    ranker = ranker_of(data, where, extractor)
    return Recipe(settings, make_parcels(settings.grid.grid(), settings.parcels), ranker)


def ranker_of(data: DataRecord, where: str | Path, extractor: Path | None) -> Ranker:
    """The ranker of a dataset; parameters and errors are those of `recipe`."""
    identity = data.ranker
    try:
        name, checksum, seed = (identity[field] for field in ("name", "extractor", "seed"))
    except KeyError as error:
        raise _no_settings(where, error) from None
    if not all(isinstance(text, str | None) for text in (name, checksum)):
        raise ConfigError(where, "data", "names that are not text", "the settings of a conversion")
    found = None if checksum is None else _extractor(checksum, where, extractor)
    ranker = make_ranker(name, found, seed, identity.get("version", 1))
    if ranker.identity() != identity:
        got, hint = "other parameters in this version", "Use the version that converted the training data"
        raise ConfigError(where, f"ranker {name}", got, identity, hint)
    return ranker


def _no_settings(where: str | Path, error: Exception) -> ConfigError:
    got = f"invalid settings ({type(error).__name__}: {error})"
    return ConfigError(where, "data", got, "the settings of a conversion")


def scan_settings(data: DataRecord, where: str | Path) -> SessionSettings:
    """The settings of a dataset that its scans were harmonised with; without the parcels, which only rank windows.

    Raises
    ------
    ConfigError
        If they are not those of a conversion.
    """
    try:
        tree = {name: data.configuration["settings"][name] for name in SessionSettings.model_fields}
    except (KeyError, TypeError) as error:
        raise _no_settings(where, error) from None
    return check(SessionSettings, tree | {"parcels": {}}, where)


def _extractor(checksum: str, where: str | Path, folder: Path | None) -> Extractor:
    if folder is None or not folder.is_dir():
        raise ConfigError(
            where,
            "extractor",
            f"none ({folder or 'the training dataset is not on this machine'})",
            f"the temporal extractor of the training data, checksum {checksum[:12]}",
            "Copy the folder `extractor` of the training dataset, and give its path as `extractor`",
        )
    found = Extractor.load(folder)
    if found.checksum != checksum:
        hint = "Give the extractor of the training dataset"
        raise ConfigError(folder, "checksum", found.checksum[:12], f"{checksum[:12]}, as in {where}", hint)
    return found


def _image(known: dict[str, str], where: str | Path, path: Path | None) -> Path:
    name, expected = known["name"], known["sha256"]
    if path is None or not path.is_file():
        got, hint = f"none ({path or 'datasets do not contain it'})", "Give the path of that file as `parcels`"
        raise ConfigError(where, "parcels", got, f"the label image {name}, SHA-256 {expected[:12]}", hint)
    found = sha256(path)
    if found != expected:
        raise ConfigError(path, "SHA-256", found[:12], f"{expected[:12]}, the checksum of {name} in {where}")
    return path
