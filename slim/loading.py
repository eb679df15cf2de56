"""The processes that load batches for one that trains: how they are started."""

from __future__ import annotations

import multiprocessing
import signal
from multiprocessing import forkserver, resource_tracker
from multiprocessing.context import BaseContext

from shards.console import STOPPING


def context() -> BaseContext:
    """How loading processes are started: forked from a small server of one thread.

    Forked from the training process itself, which runs threads of gloo and others, a child can inherit a lock that
    nobody will ever release, and wait for it for ever.
    """
    chosen = multiprocessing.get_context("forkserver")
    chosen.set_forkserver_preload(["slim.batch"])
    # A scheduler signals all processes of a job. Those that load go on, for the step that is yet to end; what is
    # blocked here stays so in the server and in all it forks.
    signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
    try:
        resource_tracker.ensure_running()
        signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)  # again: that unblocks SIGTERM and SIGINT
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)
    return chosen
