"""The benches: how they time, and the whole of one on a coarse grid. What they find is never asserted, only how."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from itertools import product

import numpy as np
import pytest
import torch

from launchers.benches import gpu, launches, memory
from launchers.benches.common import Figure, Ratio, Result, interleave, show
from launchers.benches.dense import unroll
from launchers.benches.gather import Contest, Way, compare, peak
from launchers.benches.simulate import EVENT_SHARE, SNR, simulate
from launchers.commands import bench
from slim.model.geometry import Geometry


def test_callables_take_turns():
    called, told = [], []
    work = {name: (lambda name=name: called.append(name)) for name in "ABC"}
    figures = interleave(work, 2, told.append, {"B": 3, "C": 2})
    assert "".join(called) == "ABCBCB" * 2
    assert told[:4] == ["A, round 1 of 2", "B, round 1 of 2", "C, round 1 of 2", "A, round 2 of 2"]
    counts = {f"{name}, {clock}": n for name, n in (("A", 2), ("B", 6), ("C", 4)) for clock in ("wall", "CPU")}
    assert {name: len(figure.values) for name, figure in figures.items()} == counts


def test_cpu_time_is_that_of_started_processes_too_and_no_waiting():
    burn = "import time\nwhile time.process_time() < 0.3: pass"
    work = {"child": lambda: subprocess.run([sys.executable, "-c", burn], check=True), "wait": lambda: time.sleep(0.3)}
    figures = interleave(work, 1, lambda what: None, unit="ms")
    assert figures["child, CPU"].median >= 299  # the child itself waited for its clock to show 300
    assert figures["wait, wall"].median >= 299 > figures["wait, CPU"].median


@pytest.mark.parametrize(
    ("limits", "required", "met"),
    [
        ({"at_least": 4}, "at least 4", True),
        ({"at_least": 4.1}, "at least 4.1", False),
        ({"at_most": 4}, "at most 4", True),
        ({"at_most": 3.9}, "at most 3.9", False),
        ({}, None, None),
    ],
)
def test_a_ratio_is_that_of_medians(limits, required, met, capsys):
    figures = {"a": Figure("s", (1.0, 8.0, 100.0)), "b": Figure("s", (2.0, 1.0, 3.0, 2.0))}
    facts = Result(figures, [Ratio("a over b", "a", "b", **limits)]).facts()
    assert facts["figures"]["a"] == {"unit": "s", "median": 8, "low": 1, "high": 100, "n": 3}
    (ratio,) = facts["ratios"]
    assert (ratio["value"], ratio["required"], ratio["met"]) == (4, required, met)
    show(facts)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["a", "8", "1", "100", "s", "3"] in lines and ["b", "2", "1", "3", "s", "4"] in lines
    verdict = [] if met is None else [*required.split(), "yes" if met else "NO"]
    assert ["a", "over", "b", "4", *verdict] in lines


def test_the_bench_of_shards_on_a_coarse_grid(command, tmp_path):
    out = tmp_path / "bench.json"
    done = command("tools/bench.py", "shards", "--small", "--repeat", 2, "--json", "--out", out)
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout.splitlines()[-1])
    assert facts == json.loads(out.read_text()) and facts["bench"] == "shards"
    figures = facts["figures"]
    for name, figure in figures.items():
        assert figure["low"] <= figure["median"] <= figure["high"] and figure["median"] > 0, name
        assert any(name in line and line.split()[-1] == str(figure["n"]) for line in done.stdout.splitlines()), name
    assert {figures[f"convert 1 run, make_shards.py, {clock}"]["n"] for clock in ("wall", "CPU")} == {2}

    ratios = {ratio["name"]: ratio for ratio in facts["ratios"]}
    for ratio in ratios.values():
        expected = figures[ratio["of"]]["median"] / figures[ratio["over"]]["median"]
        assert ratio["value"] == pytest.approx(expected, rel=1e-12)
        if ratio["required"]:
            bound, limit = ratio["required"].rsplit(" ", 1)
            assert ratio["met"] == (expected >= float(limit) if bound == "at least" else expected <= float(limit))
    required = {name: ratio["required"] for name, ratio in ratios.items() if ratio["required"]}
    assert required == {
        f"{name}, {clock}": limit
        for clock in ("wall", "CPU")
        for name, limit in (
            ("conversion over nilearn", "at most 1.5"),
            ("reading .npz over ours", "at least 40"),
            ("share of the limit", "at least 0.5"),
        )
    }
    # both layouts hold the same run: resampled by other code, equal but for half precision
    assert facts["notes"]["rms_difference_over_fluctuation"] < 1e-3
    # all that a read decompresses, from the shapes: 8 windows, baseline, spread, brain, patch, start
    patches, rest = divmod(facts["notes"]["bytes_decompressed"] - 4 * 12, 8 * 5 * 64 * 2 + 2 * 64 * 4 + 64 + 3 * 2)
    assert rest == 0 and 0 < patches <= 4**3
    assert "round 2 of 2" in done.stderr and not any(tmp_path.glob("bench-*"))


def test_the_bench_of_saliency_on_few_runs(command):
    done = command("tools/bench.py", "saliency", "--small", "--repeat", 1, "--json", timeout=600)
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout.splitlines()[-1])
    rankers = ("mutual", "mutual 1", "ridge", "median-variance", "variance", "leave-one-out", "uniform", "random")
    measures = ("precision at 8", "artefacts at 8", "precision at 32", "Spearman", "CPU ms")
    conditions = facts["notes"]["conditions"]
    assert len({tuple(one[key] for key in ("kind", "slow", "snr", "ranker")) for one in conditions}) == len(conditions)
    assert len(conditions) == 3 * 2 * 3 * len(rankers) and facts["notes"]["parcels"] == 195
    for ranker in rankers:
        own = [one for one in conditions if one["ranker"] == ranker]
        for measure in measures:
            mean = facts["figures"][f"{measure}, {ranker}"]["median"]
            assert mean == pytest.approx(np.mean([one[measure] for one in own]), abs=1e-4)
        assert all(
            0 <= one["precision at 8"] + one["artefacts at 8"] <= 1 and -1 <= one["Spearman"] <= 1 for one in own
        )
        # a row of each table: the three ratios of the first measure
        first = " / ".join(f"{one['precision at 8']:.2f}" for one in own[:3])
        assert any(line.strip().startswith(f"{ranker}  ") and first in line for line in done.stdout.splitlines())
    figures, ratios = facts["figures"], {ratio["name"]: ratio for ratio in facts["ratios"]}
    mutual, plain = (
        [one["precision at 8"] for one in conditions if one["ranker"] == ranker and one["slow"] == "slow bursts"]
        for ranker in ("mutual", "variance")
    )
    gain = ratios["precision at 8, mutual less variance, slow bursts"]
    assert gain["value"] == pytest.approx(min(np.subtract(mutual, plain)), abs=1e-3)
    assert [ratio["required"] for ratio in facts["ratios"]] == [
        "at least 0.6", "at most 0.1", "at least 0.2", "at least 1", *["at most 3"] * 4, "at most 1", "at most 2.5"
    ]  # fmt: skip
    (best,) = [ratio["over"] for name, ratio in ratios.items() if name.endswith(", the next best")]
    others = [figures[f"precision at 8, {ranker}"]["median"] for ranker in rankers[2:]]
    assert figures[best]["median"] == max(others)
    places = facts["notes"]["places"]
    assert {(one["ranker"], one["frames"]) for one in places} == set(product({*rankers} - {"uniform"}, (120, 260)))
    for one in places:
        counts, chance = np.array(one["counts"]), 8 * 5 / one["frames"]  # of 2 runs
        assert counts.sum() == 2 * 8 and len(counts) == one["frames"] // 5 and counts.max() <= 2
        farthest = np.abs(counts - 2 * chance).max() / np.sqrt(2 * chance * (1 - chance))
        figure = figures[f"distance of places in {one['frames']} frames, {one['ranker']}"]
        assert figure["median"] == pytest.approx(farthest, rel=1e-4)
    assert all(figures[f"score {frames} frames, CPU"]["median"] > 0 for frames in (300, 600, 1200, 2400))


def test_the_bench_of_gathers_on_a_coarse_grid(command):
    done = command("tools/bench.py", "gather", "--small", "--repeat", 2, "--json")
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout.splitlines()[-1])
    figures, notes = facts["figures"], facts["notes"]
    ours = {
        "patch embedding": ["gathered"],
        "pooling": ["gathered"],
        "attention": ["gathered"],
        "local stages": ["every patch", "brain", "streamed brain", "context"],
    }
    measures = [f"{what}, {clock}" for what in ("forward", "forward and backward") for clock in ("wall", "CPU")]
    n = {}
    for name, ways in ours.items():
        rounds = 20 if name in ("patch embedding", "pooling") else 2
        for way in ("dense", *ways):
            n |= {f"{name}, {way}, {measure}": rounds for measure in measures} | {f"{name}, {way}, peak": 1}
    assert {name: figure["n"] for name, figure in figures.items()} == n

    ratios = {ratio["name"]: ratio for ratio in facts["ratios"]}
    assert len(ratios) == len(facts["ratios"]) == 3 * 7
    for name, ways in ours.items():
        for way in ways:
            for measure in (measures[1], measures[3], "peak"):
                ratio = ratios[f"{name}, dense over {way}, {measure}"]
                dense, own = (figures[f"{name}, {one}, {measure}"]["median"] for one in ("dense", way))
                assert ratio["value"] == pytest.approx(dense / own, rel=1e-12)
                asked = name != "pooling" and way != "every patch" and measure != "peak"
                assert (ratio["met"] is not None) == asked

    # what was computed is the same, and the pooled values are equal
    assert set(notes["differences"]) == set(ours) and notes["differences"]["pooling"] == {"outputs": 0, "gradients": 0}
    assert all(found["outputs"] <= 1e-4 and found["gradients"] <= 1e-2 for found in notes["differences"].values())
    tokens = notes["tokens"]
    assert tokens["dense"] == 5 * 12**3 > 2 * tokens["brain"] > 2 * tokens["context"] > 0
    assert tokens["brain"] % 5 == 0 and notes["chunks_streamed"] >= tokens["brain"] / 1000
    held = [figures[f"local stages, {way}, peak"]["median"] for way in ("dense", "brain", "streamed brain", "context")]
    assert held[0] > held[1] > max(held[2:])


def test_a_dense_grid_unrolls_into_units_whose_pooled_tokens_are_axes():
    geometry = Geometry((8, 4, 8, 4), (4, 4, 4, 4), ((2, 2, 1, 2), (2, 1, 2, 1)))
    token_UE = unroll(torch.arange(geometry.in_order.size)[:, None], geometry)[..., 0].numpy()
    assert sorted(token_UE.ravel()) == list(range(geometry.in_order.size))
    for part_US in (token_UE, *token_UE.reshape(4, 8, 32).transpose(2, 0, 1)):
        assert (geometry.unit_of[part_US] == np.arange(4)[:, None]).all()
    first_USE = geometry.ancestors[0][token_UE.reshape(4, 8, 32)]
    assert (first_USE == first_USE[:, :1]).all() and len(np.unique(first_USE)) == 4 * 32
    second_USE = geometry.ancestors[1][token_UE.reshape(4, 8, 4, 8)[:, 0]]
    assert (second_USE == second_USE[:, :1]).all()
    # the cells come out in the order of a plan of all tokens
    in_order = geometry.cell_of[geometry.in_order].reshape(-1, 32)[:, 0]
    np.testing.assert_array_equal(second_USE[:, 0].ravel(), in_order)


@pytest.mark.parametrize(("factor", "what"), [(1.001, "outputs"), (float("nan"), "outputs"), (1.0, "gradients")])
def test_what_does_not_compute_the_same_is_not_timed(factor, what):
    x = torch.randn(5, generator=torch.Generator().manual_seed(0), requires_grad=True)

    def other(x):
        return factor * (x if what == "outputs" else 0.5 * x + 0.5 * x.detach())

    contest = Contest("scaling", Way(other, [x]), {"ours": Way(lambda x: x * 1.0, [x])})
    with pytest.raises(ArithmeticError, match=f"scaling: {what} differ by"):
        compare(contest)
    same = Contest("scaling", Way(lambda x: x.clone(), [x]), contest.ours, exact=True)
    assert compare(same) == {"outputs": 0, "gradients": 0}


def test_the_peak_is_that_of_what_is_made():
    x = torch.randn(1000, requires_grad=True)  # 4000 bytes, in blocks of 512
    assert peak(lambda: x * 2 + 1) == 2 * 4096
    assert peak(lambda: (x.exp() * 2).exp()) == 3 * 4096  # exp keeps its result for the backward


def test_the_bench_of_memory_on_a_coarse_grid(command):
    done = command("tools/bench.py", "memory", "--small", "--json", timeout=600)
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout.splitlines()[-1])
    figures, cases = facts["figures"], facts["notes"]["cases"]
    assert list(cases) == [case.name for case in memory.REQUIRED] and set(memory.REQUIRED) < set(memory.CASES)
    lines = [line.split() for line in done.stdout.splitlines()]
    for name, case in cases.items():
        assert case["GiB"] == figures[f"{name}, peak"]["median"] == sum(case["memory_parts"].values()) / 2**30
        assert case["TFLOP"] == figures[f"{name}, step"]["median"] == sum(case["flops_parts"].values()) / 1e12
        for last in (case["GiB"] * 1024, case["TFLOP"] * 1000):  # a row of each table of parts
            assert [*name.split(), f"{last:.1f}"] in [[*line[: len(name.split())], *line[-1:]] for line in lines], name
    four = figures["published jepa x4, each further sample"]["median"]
    assert four == pytest.approx((cases["published jepa x4"]["GiB"] - cases["published jepa"]["GiB"]) / 3)
    assert max(map(len, done.stdout.splitlines()[:-1])) <= 120
    required = {ratio["name"]: ratio["required"] for ratio in facts["ratios"]}
    assert required == {
        "GiB, published jepa, peak": "at most 0.58",
        "TFLOP, published jepa, step": "at most 0.7",
        "TFLOP, lean jepa, step": "at most 0.35",
        "GiB, published jepa x2, each further sample": "at most 0.15",
        "GiB, published jepa x4, each further sample": "at most 0.15",
        "GiB, published default, peak": "at most 0.638",
        "TFLOP, published default, step": "at most 0.77",
        "published default, peak over published jepa, peak": None,
        "published default, step over published jepa, step": None,
    }


def test_the_bench_of_launches_on_a_coarse_grid(command):
    done = command("tools/bench.py", "launches", "--small", "--json")
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout.splitlines()[-1])
    (case,) = facts["notes"]["cases"].values()
    counts = case["counts"]
    assert sum(case["parts"].values()) == sum(counts[part] for part in launches.PARTS) == counts["step"]
    assert counts["a sample"] == counts["step"] / launches.TINY.batch
    assert counts["waits"] == sum(case["waits"].values()) and set(case["waits"]) <= set(case["parts"])
    name = launches.TINY.name
    assert {ratio["name"]: ratio["required"] for ratio in facts["ratios"]} == {
        f"{name}, {part}": f"at most {limit}" for part, limit in launches.LIMITS[launches.TINY].items()
    }
    row = [*name.split(), *(f"{counts[part]:.0f}" for part in launches.PARTS)]
    assert row in [line.replace("1 ", "1").split()[: len(row)] for line in done.stdout.splitlines()]


def test_the_bench_of_a_gpu_runs_on_a_cpu(command):
    words = ("batches=[1]", "dense_batches=[]", "seconds=600")
    done = command("tools/bench.py", "gpu", "--small", *words, "--json")
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout.splitlines()[-1])
    (name, loaded), (row, trained) = zip(*facts["notes"]["cases"].items(), strict=True)
    assert (name, row["outcome"]) == ("tiny x1, unchunked", "done")
    assert loaded == "tiny x2, loading and DeepSpeed" and trained["outcome"].startswith("waits for data ")
    assert trained["samples_per_s"] > 0 and trained["peak_gib"] > 0
    assert row["samples_per_s"] == pytest.approx(1000 / row["step_ms"]) and row["forecast_gib"] > 0
    assert row["idle"] is row["peak_gib"] is row["mfu"] is None
    assert facts["figures"][f"{name}, rate"]["median"] == row["samples_per_s"]


def test_a_case_of_a_gpu_that_fails_or_has_no_time_is_a_row():
    case = gpu.GpuCase(model="nothing", batch=1, chunk_tokens=None)
    assert "KeyError: 'nothing'" in gpu.in_process(case, 100)["outcome"]
    assert gpu.in_process(case, 0.01)["outcome"] == "stopped: no time was left"
    assert gpu.in_process(case, 0)["outcome"] == "left out: no time was left"


def test_the_smallest_cases_of_a_gpu_come_first():
    cases = gpu.cases_of(gpu.Bench())
    assert [case.batch for case in cases] == sorted(case.batch for case in cases)
    assert len({case.name for case in cases}) == len(cases) == 2 * 4 * 3 + 2


def test_a_limit_that_is_exceeded_is_named(monkeypatch, capsys):
    counted = launches.Calls({"forward": 7.0, "backward": 8.0}, {}, {})
    limits = {launches.TINY: {"forward": 7, "backward": 7}}
    monkeypatch.setattr(launches, "LIMITS", limits)
    monkeypatch.setattr(launches, "run", lambda *_: launches.judge({launches.TINY: counted}))
    assert bench.main(["launches", "--small"]) == 1
    named = capsys.readouterr().err.splitlines()[-1]
    assert named == f"error: requirements not met: {launches.TINY.name}, backward"
    limits[launches.TINY]["backward"] = 8
    assert bench.main(["launches", "--small"]) == 0


@pytest.mark.parametrize("kind", SNR)
@pytest.mark.parametrize("slow", [False, True])
def test_simulated_runs_hold_what_they_say(kind, slow):
    centre_R3 = np.random.default_rng(0).uniform(-70, 70, (60, 3))
    calls = [(kind, snr, slow, seed, centre_R3, 70) for snr in (0.5, 1.0) for seed in (0, 0, 1)]
    one, same, other, louder, *_ = runs = [simulate(*call) for call in calls]
    np.testing.assert_array_equal(one.roi_RT, same.roi_RT)
    assert (one.roi_RT != other.roi_RT).any() and (one.roi_RT != louder.roi_RT).any()
    for run in runs:
        assert run.roi_RT.shape == (60, 350) and run.roi_RT.dtype == np.float32 and np.isfinite(run.roi_RT).all()
        assert run.event_W.sum() == round(EVENT_SHARE[kind] * 70)
        assert run.energy_W[run.event_W].min() >= run.energy_W[~run.event_W].max()
        assert not (run.event_W & run.artefact_W).any() and run.artefact_W.mean() < 0.4
    # the rest has about unit energy in all kinds, whatever the ratio
    rest = [run.energy_W[run.event_W].mean() / call[1] for run, call in zip(runs, calls, strict=True)]
    assert min(rest) > 0.8 and max(rest) < 2.5 and max(rest) < 1.5 * min(rest)


def test_a_window_without_planted_energy_holds_no_event():
    centre_R3 = np.random.default_rng(0).uniform(-70, 70, (60, 3))
    runs = [simulate("bursts", 0.2, False, seed, centre_R3, 13) for seed in range(20)]
    assert {run.event_W.sum() for run in runs} == {2, 3}  # one burst does not always reach three windows
    assert all(run.energy_W[run.event_W].min() > 0 for run in runs)


def test_slow_bursts_are_artefacts_that_add_to_the_spikes():
    centre_R3 = np.random.default_rng(0).uniform(-70, 70, (60, 3))
    for kind, levels in SNR.items():
        share = [
            np.mean([simulate(kind, levels[1], slow, seed, centre_R3, 70).artefact_W.mean() for seed in range(12)])
            for slow in (False, True)
        ]
        assert share[1] > share[0] + 0.02


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("shards", "--repeat", 0), "error: command line: --repeat: got 0, expected 1 or more"),
        (("shards", "frames=20"), "error: command line: frames: got 20"),
        (("shards", "--small", "windows=13"), "13 windows of 5 frames in 60 frames"),
        (("shards", "sise=3"), "error: command line: sise: got an unknown key"),
        (("shards", "--out", "no/such/folder/x.json"), "error: command line: --out: got no/such/folder/x.json"),
        (("saliency", "windows=20"), "error: command line: windows: got 20"),
        (("saliency", "rounds=3"), "error: command line: rounds: got an unknown key"),
        (("gather", "frames=9"), "expected frames in multiples of 8, the size of a unit of published, not 9"),
        (("gather", "shape=[96,80,96]"), "expected shape in multiples of 32, the size of a unit of published, not 80"),
        (("gather", "--small", "model=huge"), "expected model to be one of published, lean, large, tiny, not huge"),
        (("memory", "grid=48"), "error: command line: grid: got 48, expected a multiple of 32"),
        (("nothing",), "error: argument NAME: invalid choice: 'nothing'"),
        (("shards", "--small", "shape=[16,16,18]"), "grid.shape: got [16, 16, 18], expected multiples of patch, 4"),
    ],
)
def test_a_wrong_call_is_told_in_one_line(command, words, message):
    done = command("tools/bench.py", *words)
    errors = [line for line in done.stderr.splitlines() if not line.startswith("bench shards: ")]
    assert done.returncode == 2 and len(errors) == 1 and message in errors[0], done.stderr


def test_help_has_an_example_and_says_what_can_be_measured(command):
    done = command("tools/bench.py", "--help")
    assert done.returncode == 0 and "example:\n  python tools/bench.py shards" in done.stdout
    assert "shards: conversion" in " ".join(done.stdout.split())
