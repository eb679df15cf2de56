"""What is read from the words of SLURM and of the caller, without a cluster."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from helpers.commands import ROOT
from launchers.cluster import scheduler
from launchers.cluster.attempt import attempts
from launchers.cluster.scheduler import SlurmSettings, check_cluster, gpus_of, is_local, nodes_of, seconds
from shards.core.errors import ConfigError
from shards.core.settings import check, load

pytestmark = pytest.mark.fast

numbers = st.integers(0, 59)


@given(st.integers(0, 99), st.integers(0, 23), numbers, numbers)
def test_times_are_read_as_slurm_reads_them(days: int, hours: int, minutes: int, rest: int) -> None:
    total = ((days * 24 + hours) * 60 + minutes) * 60 + rest
    assert seconds(f"{days}-{hours}:{minutes:02d}:{rest:02d}") == total
    assert seconds(f"{24 * days + hours}:{minutes:02d}:{rest:02d}") == total
    assert seconds(f"{days}-{hours}") == (days * 24 + hours) * 3600
    assert seconds(f"{days}-{hours}:{minutes}") == (days * 24 + hours) * 3600 + minutes * 60
    assert seconds(f"{minutes}:{rest}") == minutes * 60 + rest
    assert seconds(f"{minutes}") == minutes * 60


@pytest.mark.parametrize("text", ["", "soon", "infinite", "1:99", "1:2:3:4", "12h", "-1", "1-", "١٢"])
def test_what_is_no_time_is_none(text: str) -> None:
    assert seconds(text) == 0


@pytest.mark.parametrize(
    ("gres", "number"),
    [
        ("(null)", 0),
        ("gpu:2", 2),
        ("gpu", 1),
        ("gpu:a100:4(S:0-1)", 4),
        ("shard:8,gpu:a100:4(S:0,1),nic:2", 4),
        ("gpu:v100:2,gpu:a100:6", 8),
        ("gpu:nvidia_h200:8(IDX:0-7)", 8),
        ("gpu:a100", 1),
    ],
)
def test_gpus_of_a_node(gres: str, number: int) -> None:
    assert gpus_of(gres) == number


def test_nodes_are_a_number_or_a_range() -> None:
    assert nodes_of("4") == (4, 4) and nodes_of("2-4") == (2, 4)
    for text in ("0", "4-2", "a", "", "1-", "-3", "1.5", "٣", "9" * 5000):
        with pytest.raises(ConfigError, match="--nodes: got"):
            nodes_of(text)


def test_empty_values_are_the_defaults_and_empty_list_items_are_refused() -> None:
    names = ("partition", "account", "qos", "time", "mem", "constraint", "python")
    assert check(SlurmSettings, dict.fromkeys(names, " "), "test") == SlurmSettings()
    for name in ("modules", "srun"):
        with pytest.raises(ConfigError, match=rf"test: {name}: got .*, expected a list without empty texts"):
            check(SlurmSettings, {name: ["a", ""]}, "test")


def test_a_folder_of_this_machine_alone_is_refused_before_a_submission(monkeypatch, tmp_path: Path) -> None:
    assert is_local(Path("/tmp/run")) and is_local(Path("/dev/shm/a/run")) and not is_local(Path("/shared/runs/lean"))
    address = "192.0.2.7"

    def ask(*words: str) -> str:
        return "work*" if "%P" in words else f"n7|gpu:4|{address}|1-00:00:00"

    monkeypatch.setattr(scheduler, "ask", ask)
    settings = SlurmSettings(time="12:00:00")
    check_cluster(settings, 1, 4, Path("/shared/runs/lean"))
    with pytest.raises(ConfigError, match=r"/tmp/run: run.out: got .*, expected a folder that n7 has, too"):
        check_cluster(settings, 1, 4, Path("/tmp/run"))
    address = "127.0.0.1"
    check_cluster(settings, 1, 4, Path("/tmp/run"))
    with pytest.raises(ConfigError, match="at most 1440 minutes"):
        check_cluster(SlurmSettings(time="2-00:00:00"), 1, 4, Path("/shared/runs/lean"))


def test_the_example_says_all_there_is_to_say() -> None:
    path = ROOT / "configs" / "slurm" / "example.yaml"
    load(SlurmSettings, path)
    assert set(yaml.safe_load(path.read_text())) == set(SlurmSettings.model_fields)


def test_times_in_yaml_need_quotes(tmp_path: Path) -> None:
    path = tmp_path / "site.yaml"
    path.write_text("time: 12:00:00\n")
    with pytest.raises(ConfigError, match="time: got 43200, expected text in quotes"):
        load(SlurmSettings, path)


def test_a_run_without_a_job_has_had_no_attempts(tmp_path: Path) -> None:
    assert attempts(tmp_path) == []
