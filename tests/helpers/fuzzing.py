"""What the fuzz tests share: inputs that begin as valid ones, and what may come of them.

    make test         # a few hundred inputs, the same ones every time
    make test-slow    # 10 000, others every time
    SLIM_FUZZ=100000 .venv/bin/python -m pytest -m slow tests/shards/core/test_fuzz_tables.py

An input gives a result, or one line that the project wrote. Any other exception, seconds of work, or memory out of
proportion to the input is a fault.
"""

from __future__ import annotations

import copy
import faulthandler
import json
import os
import signal
import struct
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from shards.core.errors import UserError

ALLOWANCE = 64 << 20  # bytes, beside three times the input
SECONDS = 5  # of this process
HARD_SECONDS = 900  # of the clock, for a hundred inputs, on a machine that does other work
SLOW = int(os.environ.get("SLIM_FUZZ", "1000"))  # inputs of a target in `make test-slow`
# SLIM_FUZZ_RAW=1 shows the first input that fails as it is, where making it smaller takes long
PHASES = [Phase.generate] if os.environ.get("SLIM_FUZZ_RAW") else [Phase.generate, Phase.shrink]
# a few inputs of each target in `make test`, many in `make test-slow`
counts = pytest.mark.parametrize("inputs", [25, pytest.param(SLOW, marks=pytest.mark.slow)])

LINE_BREAKS = ("\n", "\r", "\r\n", "\x0b", "\x0c", "\x1c", "\x85", "\u2028", "\u2029")
TEXTS = (
    *LINE_BREAKS,
    *("", " ", "\t", ",", ";", '"', '""', "'", "\\", "/", "..", "%", "{", "}", "{subject}", "*", "**", "?", "[", "]"),
    *("\0", "\x1b[31m", "\x7f", "\ufeff", "\u202e", "\u200b", "\ud800", "é", "e\u0301", "İ", "ß", "𝔘", "٣", "²", "½"),
    *("0", "-0", "-1", "1e999", "1e-999", "nan", "-inf", "1_0", "0x10", "007", "1,5", "١٢", "9" * 400, "9" * 5000),
    *("None", "NA", "null", "n/a", "N/A", "true", "yes", "~", "2020-01-01", "12:00:00", "x" * 300, "x" * 70_000),
)
NUMBERS = (0, 1, -1, 2, 7, 255, 256, 32767, 32768, 65535, 2**31 - 1, 2**31, 2**32 - 1, 2**53, 2**62, 2**63, 10**12)
NESTED = ("[" * 5000, '{"a":' * 5000, "[[" + "[]," * 20_000)
VALUES: tuple[Any, ...] = (
    *(None, True, False, [], {}, [[]], [None], {"": {}}, {"a": 1}, [0, 1, 2], [1.5, "x"], 0.5, -0.0, 1e308, 5e-324),
    *(float("nan"), float("inf"), float("-inf"), 10**30, -(10**400), *NUMBERS),
)


class Hung(BaseException):
    """Raised by the alarm; no `except Exception` takes it for a damaged file."""


@contextmanager
def bounded(size: int) -> Iterator[None]:
    """A limit on the time and the memory of what is done with `size` bytes of input."""

    def stop(number: int, frame: Any) -> None:
        raise Hung(f"more than {SECONDS} s")

    before = signal.signal(signal.SIGPROF, stop)
    tracing = tracemalloc.is_tracing()  # `hold` starts it once: another thread may allocate while it starts or stops
    if not tracing:
        tracemalloc.start()
    tracemalloc.reset_peak()
    held, _ = tracemalloc.get_traced_memory()
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
        _, peak = tracemalloc.get_traced_memory()
        if not tracing:
            tracemalloc.stop()
    assert peak - held <= 3 * size + ALLOWANCE, f"{(peak - held) >> 20} MB for {size} bytes of input"


def answer(call: Callable[[], Any], size: int) -> Any:
    """The result of a call within bounds, or the error it told in one line."""
    with bounded(size):
        try:
            return call()
        except UserError as told:
            line = told.line()
            assert line and line.splitlines() == [line], repr(line)[:500]
            assert len(line) < 5000 and line.isprintable(), f"a line of {len(line)} characters"
            return told


def hold(
    inputs: int, strategy: st.SearchStrategy[Any], target: Callable[[Any], Any], found: Sequence[Any] = ()
) -> None:
    """Try a target with so many inputs, and with those `found` to fail before. Few inputs are always the same ones."""

    @settings(
        max_examples=inputs,
        derandomize=inputs < 100,
        database=None,
        deadline=None,
        print_blob=True,
        phases=PHASES,
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def run(value: Any) -> None:
        nonlocal tried
        if tried % 100 == 0:  # what hangs outside of Python hears no alarm: the process ends
            faulthandler.dump_traceback_later(HARD_SECONDS, exit=True)
        tried += 1
        target(value)

    tried = 0
    tracemalloc.start()
    try:
        for value in found:
            target(value)
        run()
    finally:
        tracemalloc.stop()
        faulthandler.cancel_dump_traceback_later()


@st.composite
def damaged(draw: st.DrawFn, seeds: Sequence[bytes], words: Sequence[bytes] = ()) -> bytes:
    """One of some valid contents with a few bytes flipped, cut, repeated, replaced."""
    data = bytearray(draw(st.sampled_from(seeds)))
    numbers = st.builds(
        lambda number, form: struct.pack(form[0] + form[1], number % 2 ** (8 * struct.calcsize(form[1]))),
        st.sampled_from(NUMBERS),
        st.tuples(st.sampled_from("<>"), st.sampled_from("BHIQ")),
    )
    piece = st.one_of(numbers, st.binary(min_size=1, max_size=12), *([st.sampled_from(words)] if words else []))
    for _ in range(draw(st.integers(1, 5))):
        at, count = draw(st.integers(0, len(data))), draw(st.integers(1, 64))
        kind = draw(st.sampled_from(("flip", "replace", "insert", "delete", "repeat", "cut")))
        if kind == "flip" and at < len(data):
            data[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == "replace":
            new = draw(piece)
            data[at : at + len(new)] = new
        elif kind == "insert":
            data[at:at] = draw(piece)
        elif kind == "delete":
            del data[at : at + count]
        elif kind == "repeat":
            data[at:at] = data[at : at + count] * draw(st.sampled_from((1, 2, 100)))
        elif kind == "cut":
            del data[at:]
    return bytes(data)


def texts(seeds: Sequence[str], more: Sequence[str] = ()) -> st.SearchStrategy[bytes]:
    """Valid texts, damaged, with words in them that readers stumble over."""
    words = [word.encode("utf-8", "surrogatepass") for word in (*TEXTS, *more)]
    return damaged([seed.encode() for seed in seeds], words)


@st.composite
def trees(draw: st.DrawFn, seeds: Sequence[Any]) -> Any:
    """Valid trees of mappings and lists, with a few of their values or keys changed, lost, or put elsewhere."""
    tree = json.loads(json.dumps(draw(st.sampled_from(seeds))))
    strange = st.one_of(st.sampled_from(VALUES), st.sampled_from(TEXTS), st.text(max_size=8), st.integers())
    for _ in range(draw(st.integers(1, 3))):
        places = list(_places(tree))
        if not places:
            return copy.deepcopy(draw(strange))
        holder, at = draw(st.sampled_from(places))
        kind = draw(st.sampled_from(("value", "value", "value", "delete", "key", "wrap", "move")))
        if kind == "value":
            holder[at] = copy.deepcopy(draw(strange))  # a list of VALUES must not change with the tree
        elif kind == "delete":
            del holder[at]
        elif kind == "wrap":
            holder[at] = draw(st.sampled_from(([holder[at]], {"a": holder[at]}, str(holder[at]))))
        elif kind == "move":
            other, there = draw(st.sampled_from(places))
            holder[at] = json.loads(json.dumps(other[there]))
        elif isinstance(holder, dict):
            holder[draw(st.sampled_from(TEXTS))] = copy.deepcopy(draw(strange))
    return tree


def _places(tree: Any) -> Iterator[tuple[Any, Any]]:
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for at, value in items:
        yield tree, at
        yield from _places(value)


def json_bytes(tree: Any) -> bytes:
    """JSON of a tree, with lone surrogates where it has some."""
    return json.dumps(tree, ensure_ascii=False).encode("utf-8", "surrogatepass")


SLURM = [
    {
        "partition": "gpu",
        "time": "12:00:00",
        "mem": "64G",
        "cpus_per_task": 8,
        "modules": ["cuda/12"],
        "setup": ["export A=1"],
        "srun": ["--export=ALL"],
        "sbatch": {"gres": "gpu:4"},
        "signal": 120,
    }
]


def written(seeds: list[Any]) -> st.SearchStrategy[bytes]:
    """YAML files: valid trees with strange values, and texts with strange parts."""

    def dumped(tree: Any) -> bytes:
        return yaml.safe_dump(tree, allow_unicode=True, sort_keys=False).encode("utf-8", "surrogatepass")

    return st.one_of(trees(seeds).map(dumped), texts([yaml.safe_dump(seed) for seed in seeds], MARKS))


BOMB = "a: &a [1,1,1,1,1,1,1,1,1]\n" + "".join(
    f"{name}: &{name} [{','.join([f'*{before}'] * 9)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)
MARKS = (
    *NESTED,
    BOMB,
    "&a [*a]",
    "*a",
    "<<: ",
    "? ",
    "- ",
    ": ",
    "!!python/object:os.system ",
    "!!int ",
    "|\n",
    "---\n",
)
