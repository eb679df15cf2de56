"""How the data of a model were made of NIfTI runs, so that another run can be made into the same.

The settings are those in the manifest of the dataset the model was trained on. Two things lie elsewhere, named
there by their checksums alone: the temporal extractor that ranked the windows, and the label image of the parcels.
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
    """Everything `shards.conversion.session.convert_run` asks for beside the run.

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
    """The recipe of a dataset.

    Parameters
    ----------
    data : DataRecord
        Its manifest.
    where : str or Path
        The weights it is for, named in errors.
    extractor : Path, optional
        Folder where the temporal extractor is expected.
    image : Path, optional
        Where the label image of the parcels is expected.

    Raises
    ------
    ConfigError
        If one that the dataset was made with is not there, or is another one.
    """
    tree = data.configuration["settings"]
    try:
        tree = {name: tree[name] for name in SessionSettings.model_fields}
        image_of = tree["parcels"]["image"]
        stated = {name: data.ranker[name] for name in ("name", "extractor", "seed")}
        named = image_of is None or all(isinstance(image_of[name], str) for name in ("name", "sha256"))
    except (KeyError, TypeError) as error:
        got = f"no recipe ({type(error).__name__}: {error})"
        raise ConfigError(where, "data", got, "the settings of a conversion") from None
    if not named or not all(isinstance(stated[name], str | None) for name in ("name", "extractor")):
        raise ConfigError(where, "data", "names that are no text", "the settings of a conversion")
    if tree["parcels"]["image"] is not None:
        labels = _image(tree["parcels"]["image"], where, image)
        tree = tree | {"parcels": tree["parcels"] | {"image": str(labels)}}
    settings = check(SessionSettings, tree, where)
    identity = data.ranker
    found = None if identity["extractor"] is None else _extractor(identity["extractor"], where, extractor)
    ranker = make_ranker(identity["name"], found, identity["seed"])
    if ranker.identity() != identity:
        got, hint = "other parameters in this version", "Use the version that made the weights' data"
        raise ConfigError(where, f"ranker {identity['name']}", got, identity, hint)
    return Recipe(settings, make_parcels(settings.grid.grid(), settings.parcels), ranker)


def _extractor(checksum: str, where: str | Path, folder: Path | None) -> Extractor:
    if folder is None or not folder.is_dir():
        raise ConfigError(
            where,
            "extractor",
            f"none ({folder or 'its dataset lies elsewhere'})",
            f"the temporal extractor of the training data, checksum {checksum[:12]}",
            "Fetch the folder `extractor` of the dataset it was trained on, and name it as `extractor`",
        )
    found = Extractor.load(folder)
    if found.checksum != checksum:
        hint = "Name that of the dataset it was trained on"
        raise ConfigError(folder, "checksum", found.checksum[:12], f"{checksum[:12]}, as in {where}", hint)
    return found


def _image(known: dict[str, str], where: str | Path, path: Path | None) -> Path:
    name, expected = known["name"], known["sha256"]
    if path is None or not path.is_file():
        got, hint = f"none ({path or 'a dataset does not hold it'})", "Name that file as `parcels`"
        raise ConfigError(where, "parcels", got, f"the label image {name}, SHA-256 {expected[:12]}", hint)
    found = sha256(path)
    if found != expected:
        raise ConfigError(path, "SHA-256", found[:12], f"{expected[:12]}, that of {name} as in {where}")
    return path
