"""What a command imports before it shows its help or refuses a wrong call: nothing that takes long.

The calls of each kind run one after another in one process, which reports what it has imported. Times would say how
busy the machine is.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from helpers.commands import ROOT, run_command
from launchers.benches.starts import HELPS, WRONG_CALLS, cpu_seconds, filled
from launchers.commands.__main__ import COMMANDS
from shards.core.errors import UserError

# What a parser may import: texts of settings, their checks, and numpy. Everything else waits until it is needed.
LIGHT = {
    *("pydantic", "pydantic_core", "annotated_types", "typing_extensions", "typing_inspection"),
    *("yaml", "numpy", "rich", "pygments", "markdown_it", "mdurl"),
}
# What only the work needs, never the refusal of a wrong call.
HEAVY = {
    *("torch", "deepspeed", "nilearn", "sklearn", "pandas", "matplotlib", "submitit", "webdataset", "wandb", "jinja2"),
    *("safetensors", "joblib", "huggingface_hub", "aiohttp", "s3fs"),
}
# Prints a JSON line for each call: its words, its exit status, what it printed on stderr, and packages imported so far.
SCRIPT = """
import contextlib, io, json, sys
before = {name.partition('.')[0] for name in sys.modules}
from launchers.commands.__main__ import main
from shards.core.cli import status_of
for words in json.loads(sys.stdin.read()):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = status_of(lambda: main(words))
        except SystemExit as ended:
            status = ended.code
    found = {name.partition('.')[0] for name in sys.modules} - before - set(sys.stdlib_module_names)
    found = {name for name in found if not name.startswith(('_', 'cython_'))}
    print(json.dumps([words, status, err.getvalue(), sorted(found - {'shards', 'slim', 'launchers'})]))
"""


def called(calls: Sequence[Sequence[str]], folder: Path) -> list[tuple[str, int, str, set[str]]]:
    """Words, exit status, stderr, and the packages that are imported after each call."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        input=json.dumps([filled(words, folder) for words in calls]),
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(lines) == len(calls)
    return [(" ".join(words), status, err, set(found)) for words, status, err, found in lines]


def test_a_help_text_needs_no_library_that_loads_long(tmp_path: Path) -> None:
    assert {name for name, *_ in HELPS} == {name for name, *_ in WRONG_CALLS} & set(COMMANDS) == set(COMMANDS)
    for words, status, err, imported in called(HELPS, tmp_path):
        assert (status, err) == (0, ""), words
        assert imported <= LIGHT, f"{words} imported {sorted(imported - LIGHT)}"


def test_a_wrong_call_is_refused_before_the_imports_of_the_work(tmp_path: Path) -> None:
    for words, status, err, imported in called(WRONG_CALLS, tmp_path):
        assert status == 2 and err.count("\n") == 1, f"{words}: {status}, {err}"
        assert not imported & HEAVY, f"{words} imported {sorted(imported & HEAVY)}"
    assert not list(tmp_path.iterdir())


def test_the_bench_measures_calls_and_refuses_another_exit_status(tmp_path: Path) -> None:
    done = run_command("tools/bench.py", "starts", "--small", "--repeat", 1, "--json")
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout.splitlines()[-1])
    names = {" ".join(words) for words in (*HELPS[:2], *WRONG_CALLS[:2])}
    assert {ratio["name"] for ratio in facts["ratios"]} == names
    assert all(facts["figures"][name]["median"] > 0 for name in names)
    with pytest.raises(UserError, match="exit status: got 2, expected 0"):
        cpu_seconds(["pretrain"], 0)
