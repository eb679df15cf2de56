"""Processes that work for another one."""

from __future__ import annotations

import multiprocessing
import os
import threading


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
