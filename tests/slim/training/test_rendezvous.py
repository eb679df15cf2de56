"""Processes of a run on one machine meet where nobody else is: a private file, and the loopback interface."""

from __future__ import annotations

import os
import signal
import stat
from ipaddress import ip_address
from pathlib import Path

import psutil
import pytest

from helpers.training import ranks_of, start, wait_for_lines
from launchers.job import STORE


@pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="sockets are looked up in /proc")
def test_nothing_listens_beyond_loopback_while_two_processes_train(dataset: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    child = start(dataset, out, steps=400)
    try:
        wait_for_lines(out, 1, child)
        ranks = [psutil.Process(number) for number in ranks_of(out)]
        assert len(ranks) == 2
        family = [psutil.Process(child.pid), *(p for rank in ranks for p in (rank, *rank.children(recursive=True)))]
        addresses = {
            connection.laddr.ip
            for process in family
            for connection in process.net_connections("inet")
            if connection.status == psutil.CONN_LISTEN
        }
        assert all(ip_address(address).is_loopback for address in addresses), addresses
        store = Path(ranks[0].environ()[STORE])
        assert store.is_file() and stat.S_IMODE(store.parent.stat().st_mode) == 0o700
        assert store.parent.stat().st_uid == os.getuid()
    finally:
        child.send_signal(signal.SIGTERM)
        said = child.communicate(timeout=120)
    assert child.returncode == 3, said
    assert not store.exists()
