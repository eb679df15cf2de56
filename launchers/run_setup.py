"""Make the folder of a run before its processes start: configuration, provenance, manifest of the data."""

from __future__ import annotations

import json
import os
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import TypeVar

import yaml

from launchers import job
from shards.core.errors import ConfigError
from shards.core.files import dump, write_atomically
from shards.core.presets import find
from shards.format.layout import EXTRACTOR
from shards.format.reader import Dataset
from slim import __version__
from slim.checkpoints import checkpoint, lock
from slim.checkpoints.mirror import at_a_glance
from slim.checkpoints.provenance import Provenance
from slim.checkpoints.run_folder import CONFIG, DATASET
from slim.checkpoints.seen import Seen
from slim.config import AUTO, TrainSettings
from slim.ranking.extractor import CONFIG_FILE, WEIGHTS_FILE
from slim.training import compatibility
from slim.training.task import Beginning

S = TypeVar("S", bound=TrainSettings)
_LIBRARIES = ("torch", "deepspeed", "numpy", "zarr")


def prepare_run(settings: TrainSettings) -> Path:
    """Make the run folder and write the merged configuration, the provenance, the manifest and the subjects seen.

    The temporal extractor of the dataset is copied into the run, so that scans can be ranked in the same way without
    the dataset. `slim.training.compatibility` decides whether a run may be resumed with these settings; all
    configurations of the run are kept in RUN/configs.

    Returns
    -------
    Path
        RUN/config.yaml

    Raises
    ------
    UserError
        If the folder holds a run that cannot be resumed with these settings, or any run if `run.resume` is `never`, or
        if another process trains in it. The folder is then not changed.
    """
    folder = Path(settings.run.out)
    for place, name in ((settings.run.out, "run.out"), (settings.run.mirror, "run.mirror")):
        if settings.run.resume == "never" and place is not None and (Path(place) / CONFIG).exists():
            raise ConfigError(
                place,
                "run.resume",
                "never, but the folder holds a run",
                "an empty folder",
                f"Set run.resume=auto to resume the run, or use another {name}",
            )
    with lock.holding(folder):
        return _prepare(folder, settings)


def _prepare(folder: Path, settings: TrainSettings) -> Path:
    begun = at_a_glance(folder, None if settings.run.mirror is None else Path(settings.run.mirror))
    asked = settings
    settings = compatibility.begin(settings) if begun is None else _adopt(begun, settings)
    changes = [] if begun is None else [str(change) for change in compatibility.changes(begun, settings)]
    settings = _with_probe(settings)
    task = job.open_task(settings)
    if begun is not None:
        origin = task.origin(settings.run.processes)
        origin.check(begun)
        compatibility.extended(begun, settings, task.stream.per_epoch, settings.run.processes)
        for line in origin.unknown(begun):
            print(f"warning: {line}", flush=True)
        for change in changes:
            print(f"changed: {change}", flush=True)
    if begun is None:
        beginning = task.begin(folder)
    else:
        seen, init = Seen.read(begun) or task.seen(), Provenance.read(begun).init
        beginning = Beginning(settings=settings, init=init, seen=seen)
    settings = beginning.settings
    for line in beginning.lines:
        print(line, flush=True)
    write_atomically(folder / DATASET, dump(task.datasets[0].manifest.data.tree()))
    if beginning.seen is not None:
        beginning.seen.write(folder)
    if asked.zero.stage == AUTO:
        print(f"zero.stage auto: {settings.zero_stage}", flush=True)
    for line in task.too_short():
        print(f"warning: {line}", flush=True)
    _keep_extractor(task.datasets[0], folder)
    text = yaml.safe_dump(json.loads(settings.model_dump_json()), sort_keys=False)
    provenance = Provenance(
        commit=git_commit(),
        software=__version__,
        versions={name: version(name) for name in _LIBRARIES},
        chosen={change.key: change.new for change in compatibility.differences(asked, settings)},
        init=beginning.init,
    )
    provenance.write(folder)
    text = provenance.comments() + text
    compatibility.keep(folder, text, begun, changes)
    write_atomically(folder / CONFIG, text)
    return folder / CONFIG


def _with_probe(settings: S) -> S:
    """Check `run.probe`, and name its task by an absolute path. Its scores say how well a checkpoint does."""
    probe = settings.run.probe
    if probe is None:
        return settings
    from slim.evaluation.validation import Validation

    path = find("task", probe.task, "run.probe.task").resolve()
    Validation.open(path, settings.data[0].path, probe.subjects)
    probe = probe.model_copy(update={"task": str(path)})
    return settings.model_copy(update={"run": settings.run.model_copy(update={"probe": probe})})


def _keep_extractor(dataset: Dataset, folder: Path) -> None:
    """Copy the extractor of a dataset, if it has one, into a run. Its config.json marks it complete and comes last."""
    for name in (WEIGHTS_FILE, CONFIG_FILE):
        source = dataset.folder / EXTRACTOR / name
        if not (folder / EXTRACTOR / CONFIG_FILE).exists() and source.is_file():
            write_atomically(folder / EXTRACTOR / name, source.read_bytes())


def _adopt(begun: Path, settings: S) -> S:
    """Call `compatibility.adopt`, and print a line if the number of micro-batches per step changes."""
    adopted = compatibility.adopt(begun, settings)
    if adopted.run.accumulate != settings.run.accumulate:
        total = checkpoint.fact(begun, "global_batch")
        print(
            f"run.accumulate={adopted.run.accumulate} instead of {settings.run.accumulate}: "
            f"the run keeps its {total} samples per step",
            flush=True,
        )
    return adopted


def git_commit(source: Path = Path(__file__)) -> str:
    """The commit of this software, with `+` if its files have changes; `unknown` if git does not track them.

    If the package is installed inside the repository of a study, for example in its virtual environment, the commit of
    that repository is not used.

    Parameters
    ----------
    source : Path
        A file of the software, one folder below its root.
    """
    source = source.resolve()
    # These variables, set while a git hook runs, would direct git to another repository.
    without_git = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}

    def git(*words: str) -> str:
        command = ["git", "-C", str(source.parent), *words]
        return subprocess.run(
            command, capture_output=True, text=True, timeout=20, check=True, env=without_git
        ).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", "--", source.name)
        changes = git("status", "--porcelain", "--untracked-files=no", "--", str(source.parents[1]))
        return git("rev-parse", "HEAD") + ("+" if changes else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"
