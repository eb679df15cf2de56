"""The JSON file that passes a conversion from its submission to its jobs: the scans and the settings.

    {"format": 1, "cohorts": [...], "settings": {...}, "image": null, "ranking": {...}, "hash": "...", "workers": 1,
     "retry": false, "found": [{"settings": {...}, "passed_over": [...], "notes": [...]}], "runs": [{...}, ...],
     "splits": [["people", "subject", "train"], ...]}

Other users may be able to write to the dataset folder. A pickle there could run their code in this user's jobs, so the
file is JSON, and every field is checked.
"""

from __future__ import annotations

import json
import types
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Union, get_args, get_origin, get_type_hints

from shards.cohorts.cohort_file import Cohort, CohortSettings
from shards.cohorts.scan import RunSource
from shards.conversion.convert import Conversion
from shards.conversion.settings import ConvertSettings
from shards.core.errors import DatasetError, RunRefused
from shards.core.settings import check

if TYPE_CHECKING:
    from collections.abc import Callable

    from shards.conversion.session import Parcels

FORMAT = 1
_HINT = "Submit the conversion again"
_REFUSED = ("where", "field", "got", "expected", "hint")  # arguments of a RunRefused
_TYPES = get_type_hints(RunSource)


def dump(conversion: Conversion) -> str:
    """The JSON of a conversion that has started."""
    image = conversion.settings.parcels.image
    return json.dumps(
        {
            "format": FORMAT,
            "cohorts": [str(path) for path in conversion.cohorts],
            "settings": conversion.settings.model_dump(mode="json"),
            "image": None if image is None else str(image.resolve()),
            "ranking": conversion.configuration["ranking"],
            "hash": conversion.hash,
            "workers": conversion.workers,
            "retry": conversion.retry,
            "found": [
                {
                    "settings": cohort.settings.model_dump(mode="json"),
                    "passed_over": [str(path) for path in cohort.passed_over],
                    "notes": cohort.notes,
                }
                for cohort in conversion.found
            ],
            "runs": [_tree_of(run) for run in conversion.runs],
            "splits": [[*person, split] for person, split in conversion.splits.items()],
        }
    )


def load(path: Path, folder: Path, parcels_of: Callable[[ConvertSettings], Parcels]) -> Conversion:
    """Read a conversion written by `dump`. Its lock is not held yet; call `hold` and then `resume`.

    Parameters
    ----------
    path : Path
    folder : Path
        Folder of the dataset.
    parcels_of : callable
        Returns the `parcels` of `shards.conversion.convert.Conversion` for given settings.

    Raises
    ------
    DatasetError
        If the file does not exist, a field is wrong, or the label image of the parcels has changed.
    """
    try:
        tree = json.loads(path.read_bytes())
        if tree["format"] != FORMAT:
            raise DatasetError(path, "format", tree["format"], FORMAT, _HINT)
        parcels = {**tree["settings"]["parcels"], "image": tree["image"]}
        settings = check(ConvertSettings, {**tree["settings"], "parcels": parcels}, path, DatasetError)
        cohorts, ranking = [_read(name, Path) for name in tree["cohorts"]], _read(tree["ranking"], dict)
        workers, retry = _read(tree["workers"], int), bool(tree["retry"])
        made = Conversion(cohorts, folder, settings, ranking, parcels_of(settings), workers, retry)
        made.runs = [_run_of(run) for run in tree["runs"]]
        made.splits = {(_read(people, str), _read(who, str)): _read(part, str) for people, who, part in tree["splits"]}
        for about in tree["found"]:
            cohort = check(CohortSettings, about["settings"], path, DatasetError)
            own = [run for run in made.runs if run.cohort == cohort.name]
            passed_over = [_read(name, Path) for name in about["passed_over"]]
            made.found.append(Cohort(cohort, own, passed_over, [_read(note, str) for note in about["notes"]]))
    except FileNotFoundError:
        raise DatasetError(path, "", "no such file", "the conversion written at submission", _HINT) from None
    except OSError as error:
        raise DatasetError(path, "", error.strerror, "a readable file", _HINT) from None
    except DatasetError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        got = f"a missing or wrong field ({type(error).__name__}: {error})"
        raise DatasetError(path, "", got, "the conversion written at submission", _HINT) from None
    if made.hash != tree["hash"]:
        hint = "The label image has changed, or the version of this software. Submit again"
        raise DatasetError(path, "hash", made.hash[:12], f"{str(tree['hash'])[:12]}, as submitted", hint)
    return made


def _tree_of(run: RunSource) -> dict[str, object]:
    tree: dict[str, object] = {}
    for field in fields(run):
        value = getattr(run, field.name)
        if isinstance(value, Path):
            value = str(value)
        if isinstance(value, RunRefused):
            value = {name: str(getattr(value, name)) for name in _REFUSED}
        tree[field.name] = value
    return tree


def _run_of(tree: Mapping[str, Any]) -> RunSource:
    if set(tree) != set(_TYPES):
        raise TypeError(f"a scan with the fields {', '.join(sorted(map(str, tree)))[:200]}")
    return RunSource(**{name: _read(tree[name], kind) for name, kind in _TYPES.items()})


def _read(value: Any, kind: Any) -> Any:
    """Convert a JSON value to a type such as `str`, `Path | None` or `Literal["auto"] | int`; raises TypeError."""
    origin = get_origin(kind)
    if origin in (Union, types.UnionType):
        for one in get_args(kind):
            try:
                return _read(value, one)
            except TypeError:
                continue
    elif origin is Literal:
        if value in get_args(kind):
            return value
    elif kind is Path and isinstance(value, str) and "\0" not in value:
        return Path(value)
    elif kind is RunRefused and isinstance(value, dict) and set(value) == set(_REFUSED):
        return RunRefused(*(_read(value[name], str) for name in _REFUSED))
    elif (kind is float and type(value) in (int, float)) or (
        (origin or kind) in (str, int, dict, type(None)) and type(value) is (origin or kind)
    ):
        return value
    raise TypeError(f"{str(value)[:60]!r} instead of {getattr(kind, '__name__', kind)}")
