"""Processes that work for another one, and what they need of a machine."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import tempfile
import threading
from collections.abc import Iterable
from multiprocessing import process, util

# A path of a socket has at most 107 bytes. Python's are at most 31 longer than the folder of temporary files.
_LONGEST_FOLDER = 70
_SHORT = ("/tmp", "/var/tmp", "/dev/shm")


def end_with_parent(*_: object) -> None:
    """In a worker process: end as soon as the one it works for is gone, however it ended.

    Told to a pool, or to a loader of torch, as what each worker begins with. torch watches its parent by id, which is
    that of the fork server, and the server lives as long as its children do.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def shorten_sockets(places: Iterable[str] = _SHORT) -> None:
    """Have the sockets of `multiprocessing` in a private folder with a short path where TMPDIR is a long one.

    Everything else stays in TMPDIR. The folder goes when this process exits; see `remove_sockets` for `os._exit`.
    """
    chosen = tempfile.gettempdir()
    if len(os.fsencode(chosen)) <= _LONGEST_FOLDER:
        return
    for place in places:
        if os.path.isdir(place) and os.access(place, os.W_OK | os.X_OK):
            tempfile.tempdir = place
            try:
                util.get_temp_dir()  # made once, and kept by the processes that this one starts
                return
            except OSError:
                continue
            finally:
                tempfile.tempdir = chosen


def remove_sockets() -> None:
    """Remove the folder of this process's sockets, before it exits without the usual clean-up."""
    folder = process.current_process()._config.get("tempdir")  # type: ignore[attr-defined]
    if folder is not None and process.parent_process() is None:
        shutil.rmtree(folder, ignore_errors=True)


def why_no_workers() -> str | None:
    """Why this machine can start no worker processes; None where it can.

    Their queues need semaphores, which lie in /dev/shm. Some containers have none.
    """
    try:
        multiprocessing.get_context("spawn").Lock()
    except (OSError, ImportError) as error:
        return f"no semaphores ({getattr(error, 'strerror', None) or error}), which lie in it"
    return None
