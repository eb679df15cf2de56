"""What the page of a dataset shows beyond the dataset: its parcels, its ranker, and the events of its scans."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from shards.conversion.session import Parcels, ParcelSettings
from shards.core import files, presets
from shards.core.errors import ConfigError
from shards.format.layout import EXTRACTOR
from shards.format.manifest import Manifest
from shards.format.session_record import SessionRecord
from shards.reporting.windows_view import Energies, Given

if TYPE_CHECKING:
    import pandas as pd

    from slim.evaluation.events import EventSettings


def given_for(folder: Path, image: Path | None, states: str | None, events: Path | None) -> Given:
    """What is known of a dataset.

    Parameters
    ----------
    folder : Path
        The dataset.
    image : Path, optional
        The label image of its parcels, `--parcels`.
    states : str, optional
        A task of type state, `--states`: a file or the name of a preset.
    events : Path, optional
        Folder of the tables of events, `--events`.

    Raises
    ------
    ConfigError
        If the label image is not that of the dataset, or the task has no events.
    """
    manifest = Manifest.read(folder)
    parcels, energies = _parcels(manifest, folder, image), _energies(manifest, folder)
    if states is None:
        if events is not None:
            hint = "Name the task that describes the tables"
            raise ConfigError("command line", "--events", events, "a task of type state in --states", hint)
        return Given(parcels, energies=energies)

    from slim.evaluation.events import states as states_of
    from slim.evaluation.task import load_task

    path = presets.find("task", states, "--states")
    settings = load_task(path).events
    if settings is None:
        raise ConfigError(path, "type", "no events", "state, a task with events")
    root = events or path.parent / (settings.root or ".")
    if not root.is_dir():
        hint = "Give --events FOLDER"
        raise ConfigError("command line", "--events", f"no folder {root}", "the folder of the tables of events", hint)
    return Given(parcels, partial(_events, settings, root, path), partial(states_of, delay=settings.delay), energies)


def _events(settings: EventSettings, root: Path, where: Path, session: SessionRecord) -> pd.DataFrame | None:
    """The events of a session; None if it has no table, as a scan at rest in a dataset with tasks."""
    from slim.evaluation.events import has_events, read

    return read(settings, root, session, where) if has_events(settings, root, session) else None


def _energies(manifest: Manifest, folder: Path) -> Energies | None:
    """The predictable energy of parcels, from the ranker of the conversion; None if it cannot be made again."""
    from slim.inference.preprocessing import ranker_of

    try:
        return ranker_of(manifest, folder, folder / EXTRACTOR).energies
    except ConfigError:  # made by another version, or without its extractor: the page says that it has none
        return None


def _parcels(manifest: Manifest, folder: Path, image: Path | None) -> Parcels | None:
    """The parcels of the conversion; None if the dataset does not say, or the label image is not at hand."""
    from slim.ranking.parcels import make_parcels

    stated = manifest.configuration.get("settings", {}).get("parcels")
    if stated is None:
        if image is not None:
            raise ConfigError(
                folder, "--parcels", image, "none: this dataset does not say which parcels it was made with"
            )
        return None
    known = stated["image"]
    if image is None:
        return None if known else make_parcels(manifest.grid.grid(), ParcelSettings.model_validate(stated))
    if known is None:
        raise ConfigError(folder, "--parcels", image, "none: the parcels of this dataset are cubes of the brain mask")
    if not image.is_file():
        raise ConfigError("command line", "--parcels", f"no file {image}", f"the label image {known['name']}")
    if files.sha256(image) != known["sha256"]:
        expected = f"{known['name']} with the checksum {known['sha256'][:12]}"
        raise ConfigError("command line", "--parcels", f"{image}, another image", expected)
    settings = ParcelSettings.model_validate({**stated, "image": image})
    return make_parcels(manifest.grid.grid(), settings)
