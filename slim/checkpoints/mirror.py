"""The mirror of a run: a second folder to which checkpoints are copied during training, as a backup.

    MIRROR/   config.yaml, dataset.json, provenance.json, seen.json, metrics.jsonl, skipped.jsonl   as in RUN at the
              time of the copy
              configs/step-00000000.yaml ...   likewise
              checkpoints/step-00000100/ ...   checkpoints/latest

A mirror can be used in place of RUN. Every copy is read back and compared with the original, and an incomplete copy is
ignored. If the mirror cannot be written, the run logs a warning and continues.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterable
from pathlib import Path

from shards.core.errors import UserError
from shards.core.files import write_atomically
from slim.checkpoints import checkpoint
from slim.checkpoints.run_folder import ABOUT_RUN, ALSO_ABOUT_RUN, CHECKPOINTS, CONFIGS, METRICS, SKIPPED, WANDB_ID

_SMALL = (*ABOUT_RUN, *ALSO_ABOUT_RUN, METRICS, SKIPPED, WANDB_ID)


class Mirror:
    """Copies the newest checkpoint in a separate thread; rank 0 only.

    Parameters
    ----------
    run, folder : Path
        Folder of the run, and its mirror.
    keep : int
        Number of newest checkpoints to keep in the mirror.
    every : int, optional
        Checkpoints of every `every`-th step are kept, too.

    Attributes
    ----------
    trouble : str or None
        Why the last copy failed.
    """

    def __init__(self, run: Path, folder: Path, keep: int, every: int | None):
        self.run, self.folder, self.keep, self.every = run, folder, keep, every
        self.trouble: str | None = None
        self._waiting: Path | None = None
        self._busy: Path | None = None
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None

    def offer(self, saved: Path) -> None:
        """Copy this checkpoint after the current copy. It replaces a checkpoint that still waits to be copied."""
        with self._changed:
            self._waiting = saved
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="mirror", daemon=True)
                self._thread.start()

    @property
    def needed(self) -> set[Path]:
        """Checkpoints of the run that are not copied yet."""
        with self._changed:
            return {folder for folder in (self._waiting, self._busy) if folder is not None}

    def close(self) -> None:
        """Wait until the last offered checkpoint is copied, or its copy has failed."""
        with self._changed:
            thread = self._thread
        if thread is not None:
            thread.join()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._busy, self._waiting = self._waiting, None
                if self._busy is None:
                    self._thread = None
                    return
                saved = self._busy
            trouble = None
            try:
                target = self.folder / CHECKPOINTS
                _copy_small(self.run, self.folder, _small(self.run))
                checkpoint.copy(saved, target)
                checkpoint.prune(target, self.keep, self.every)
            except UserError as error:
                trouble = error.line()
            except OSError as error:
                trouble = f"{saved.name} was not copied to {self.folder}: {error.strerror or error}"
            with self._changed:
                self.trouble, self._busy = trouble, None


def _small(run: Path) -> list[str]:
    """Names of the files of a run besides its checkpoints; not all of them need to exist."""
    return [*_SMALL, *(f"{CONFIGS}/{path.name}" for path in (run / CONFIGS).glob("step-*.yaml"))]


def _copy_small(source: Path, target: Path, names: Iterable[str]) -> None:
    for name in names:
        with contextlib.suppress(FileNotFoundError):  # for example skipped.jsonl, if nothing was skipped
            content = (source / name).read_bytes()
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            write_atomically(target / name, content)


def recover(run: Path, mirror: Path | None) -> tuple[Path | None, list[str]]:
    """The newest intact checkpoint of a run, copied from the mirror if needed, and messages for the user.

    Returns
    -------
    tuple
        A folder in RUN/checkpoints, or None if the run has saved nothing yet; and messages that name the damaged
        checkpoints, and the mirror if the checkpoint was copied from there.

    Raises
    ------
    CheckpointError
        If there are checkpoints but none is intact. Starting from step 0 would overwrite them.
    """
    own = run / CHECKPOINTS
    found, refused = checkpoint.newest_intact(own)
    if mirror is not None:
        copy, others = checkpoint.newest_intact(mirror / CHECKPOINTS)
        refused += others
        if copy is not None and (found is None or checkpoint.step_of(copy) > checkpoint.step_of(found)):
            _copy_small(mirror, run, [name for name in _small(mirror) if not (run / name).exists()])
            found = checkpoint.copy(copy, own)
            return found, [*_refusals(refused, found), f"{found.name} was copied from the mirror {mirror}"]
    if found is None and refused:
        raise _none_left(refused)
    if found is not None:
        write_atomically(own / checkpoint.LATEST, found.name + "\n")
    return found, _refusals(refused, found)


def at_a_glance(run: Path, mirror: Path | None) -> Path | None:
    """The checkpoint that `recover` will probably use, where it is now; its files are neither read nor copied.

    Raises
    ------
    CheckpointError
        As raised by `recover`.
    """
    places = [run, *([] if mirror is None else [mirror])]
    looked = [checkpoint.newest_intact(place / CHECKPOINTS, ()) for place in places]
    found = [folder for folder, _ in looked if folder is not None]
    refused = [error for _, errors in looked for error in errors]
    if refused and not found:
        raise _none_left(refused)
    return max(found, key=checkpoint.step_of, default=None)


def _none_left(refused: list[checkpoint.CheckpointError]) -> checkpoint.CheckpointError:
    first = refused[0]
    hint = "No checkpoint of the run is intact: copy one from a backup, or start a new run in another run.out"
    return checkpoint.CheckpointError(first.where, first.field, first.got, first.expected, hint)


def _refusals(refused: list[checkpoint.CheckpointError], found: Path | None) -> list[str]:
    return [f"{error.line()}. The run resumes from {found.name}" for error in refused] if found else []
