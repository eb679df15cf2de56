"""Worker processes, and what they need from a machine."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import tempfile
import threading
from collections.abc import Iterable
from multiprocessing import process, util

# The path of a socket has at most 107 bytes. Python adds up to 31 bytes to the folder of temporary files.
_LONGEST_FOLDER = 70
_SHORT = ("/tmp", "/var/tmp", "/dev/shm")


def end_with_parent(*_: object) -> None:
    """End this worker process when its main process has ended, for any reason.

    It is the initializer of pools and of torch's loading processes. torch itself watches the ID of the parent process,
    which is the fork server, and the fork server lives as long as its children.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def shorten_sockets(places: Iterable[str] = _SHORT) -> None:
    """Put the sockets of `multiprocessing` in a private folder with a short path if TMPDIR has a long path.

    Everything else stays in TMPDIR. The folder is removed when this process exits; for `os._exit` see `remove_sockets`.
    """
    chosen = tempfile.gettempdir()
    if len(os.fsencode(chosen)) <= _LONGEST_FOLDER:
        return
    for place in places:
        if os.path.isdir(place) and os.access(place, os.W_OK | os.X_OK):
            tempfile.tempdir = place
            try:
                util.get_temp_dir()  # made once, and inherited by child processes
                return
            except OSError:
                continue
            finally:
                tempfile.tempdir = chosen


def remove_sockets() -> None:
    """Remove the folder of this process's sockets, before an exit without clean-up."""
    folder = process.current_process()._config.get("tempdir")  # type: ignore[attr-defined]
    if folder is not None and process.parent_process() is None:
        shutil.rmtree(folder, ignore_errors=True)


def why_no_workers() -> str | None:
    """Why this machine cannot start worker processes; None if it can.

    Their queues need semaphores in /dev/shm, which some containers do not have.
    """
    try:
        multiprocessing.get_context("spawn").Lock()
    except (OSError, ImportError) as error:
        return f"no semaphores ({getattr(error, 'strerror', None) or error})"
    return None
