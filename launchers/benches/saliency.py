"""Which windows each ranker chooses in simulated runs with planted events and artefacts, and what ranking costs.

The runs are those of `simulate.py`: three kinds, each with and without slow incoherent bursts, at three signal-to-noise
ratios, on the parcels of the MNI152 brain mask. Every ranker scores the same runs, which are made from other seeds
in each round. `mutual` has an extractor for each kind, trained here on other runs of that kind, all ratios mixed, slow
bursts in half of them.

A window *holds an event* if it is among the fifth (``short``: the fourth) of its run's windows with the most planted
energy (mean square over parcels and frames). Of the `k` windows with the highest scores, and as means over the runs of
a round,

- *precision at k* is the share that hold an event; chance is 0.2 (``short``: 0.25), and at 32 of the usual 70 windows
  14/32 (18/32) is the most;
- *artefacts at 8* is the share of the best 8 that an artefact affects and that hold no event: a frame of a spike, or
  the middle half of a slow burst;
- *Spearman* is the rank correlation of the scores with the planted energy, over all windows.

In stationary noise no place in time differs from another. Every ranker but `uniform`, which chooses by place, takes the
best 8 windows of 120 such runs of 120 and of 260 frames; a figure is the largest distance of a place from its fair
share, in standard deviations. `mutual` has an extractor trained on other runs of this noise.

The cost is that of `mutual` with a trained extractor, in CPU seconds, on runs of 300 to 2400 frames.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
from nilearn.datasets import load_mni152_brain_mask
from nilearn.image import resample_to_img
from pydantic import Field
from rich import box
from rich.console import Console
from rich.table import Table
from scipy.stats import spearmanr

from launchers.benches.common import Figure, Ratio, Result, interleave
from launchers.benches.simulate import EVENT_SHARE, SNR, Run, simulate, stationary
from shards.core.settings import Settings
from shards.format.grid import Grid
from shards.format.patches import parcel_means
from slim.ranking.extractor import Extractor
from slim.ranking.extractor_training import train_extractor
from slim.ranking.parcels import parcels_from_mask
from slim.ranking.rankers import Ranker, make_ranker

FRAMES = 5  # of a window
LENGTHS = (300, 600, 1200, 2400)  # frames of the runs that are timed
FORMER = "mutual 1"  # the first version of `mutual`
RANKERS = ("mutual", FORMER, "ridge", "median-variance", "variance", "leave-one-out", "uniform", "random")
SLOW = "slow bursts"
ONE = "one, to compare a figure with a number"
LEVELS = ("low", "middle", "high")
PLACES = (120, 260)  # frames of the runs of stationary noise
TRAINING_SEED = 1_000_000  # beyond those of the evaluation
MEASURES = {
    "precision at 8": ".2f",
    "artefacts at 8": ".0%",
    "precision at 32": ".2f",
    "Spearman": ".2f",
    "CPU ms": ".0f",
}
# (kind, slow bursts or not, level, ranker) to the means of the rounds, (rounds, measures)
Found = dict[tuple[str, str, str, str], np.ndarray]


class Bench(Settings):
    """Sizes of the bench; the runs are simulated."""

    runs: int = Field(24, ge=1, description="runs of each condition in a round")
    windows: int = Field(70, ge=40, description="windows of a run")
    training_runs: int = Field(24, ge=1, description="runs an extractor is trained on")
    steps: int = Field(1200, ge=1, description="steps of its training")
    noise_runs: int = Field(120, ge=1, description="runs of stationary noise of each length")
    first_seed: int = Field(0, ge=0, lt=TRAINING_SEED // 2, description="seed of the first run")


SMALL = {"runs": 1, "windows": 40, "training_runs": 2, "steps": 5, "noise_runs": 2}


def run(bench: Bench, repeat: int, folder: Path, begun: Callable[[str], None]) -> Result:
    """Measure all of it; see the head of this file."""
    centre_R3 = mni_parcels()
    result = Result(notes={"settings": bench.model_dump(mode="json"), "parcels": len(centre_R3), "chance": EVENT_SHARE})
    found: Found = {}
    mutual: dict[str, Ranker] = {}
    for kind, levels in SNR.items():
        begun(f"{kind}: train an extractor on {bench.training_runs} runs, {bench.steps} steps")
        mixed = itertools.cycle(itertools.product(levels, (False, True)))
        training = [
            simulate(kind, *next(mixed), TRAINING_SEED + number, centre_R3, bench.windows)
            for number in range(bench.training_runs)
        ]
        extractor = train_extractor([(one.roi_RT, one.centre_R3) for one in training], FRAMES, bench.steps)
        rankers = rankers_with(extractor)
        mutual[kind] = rankers["mutual"]
        for slow, (level, snr) in itertools.product((False, True), zip(LEVELS, levels, strict=True)):
            words = (kind, SLOW if slow else "no slow bursts", level)
            begun(f"{', '.join(words)} SNR: {repeat} x {bench.runs} runs")
            seeds = range(bench.first_seed, bench.first_seed + repeat * bench.runs)
            runs = (simulate(kind, snr, slow, seed, centre_R3, bench.windows) for seed in seeds)
            measured = np.array([[measure(ranker, one) for ranker in rankers.values()] for one in runs])
            by_round = measured.reshape(repeat, bench.runs, len(RANKERS), -1).mean(axis=1)
            found |= {(*words, name): by_round[:, place] for place, name in enumerate(RANKERS)}
    tables(found)
    judge(found, result)
    places(bench, begun, result)
    cost(mutual["fmri"], repeat, centre_R3, begun, result)
    return result


def rankers_with(extractor: Extractor) -> dict[str, Ranker]:
    """Every ranker by its name here."""
    rankers = {name: make_ranker(name) for name in RANKERS if name not in ("mutual", FORMER)}
    learned = {"mutual": make_ranker("mutual", extractor), FORMER: make_ranker("mutual", extractor, version=1)}
    return {name: (learned | rankers)[name] for name in RANKERS}


def mni_parcels() -> np.ndarray:
    """Centres in mm of the default parcels of the MNI152 brain mask on the default grid; float32 (R, 3)."""
    grid = Grid()
    space = nib.Nifti1Image(np.zeros(grid.shape, np.uint8), grid.affine)
    mask = resample_to_img(load_mni152_brain_mask(), space, "nearest", force_resample=True, copy_header=True)
    brain_XYZ = np.asarray(mask.dataobj).astype(bool)
    labels_XYZ = parcels_from_mask(brain_XYZ, grid.mm)
    _, centre_R3, _ = parcel_means(np.zeros((1, brain_XYZ.sum())), labels_XYZ, brain_XYZ, grid.affine)
    return centre_R3


def measure(ranker: Ranker, run: Run) -> tuple[float, ...]:
    """What `MEASURES` names, of one ranker on one run."""
    begun = time.process_time()
    scores_W = ranker.scores(run.roi_RT, run.centre_R3, FRAMES)
    spent = 1000 * (time.process_time() - begun)
    best = np.argsort(-scores_W, kind="stable")
    events, artefacts = run.event_W[best], run.artefact_W[best]
    along = spearmanr(scores_W, run.energy_W).statistic
    return events[:8].mean(), artefacts[:8].mean(), events[:32].mean(), along, spent


def tables(found: Found) -> None:
    """Print the medians over the rounds: a table for each kind with and without slow bursts."""
    console = Console(width=130, highlight=False)
    for kind, slow in dict.fromkeys(words[:2] for words in found):
        table = Table("ranker", title=f"{kind}, {slow}; SNR {' / '.join(LEVELS)}", box=box.SIMPLE_HEAD)
        for heading in MEASURES:
            table.add_column(heading, justify="right", no_wrap=True)
        for name in RANKERS:
            medians = np.median([found[kind, slow, level, name] for level in LEVELS], axis=1)
            cells = [
                " / ".join(format(value, style) for value in values)
                for values, style in zip(medians.T, MEASURES.values(), strict=True)
            ]
            table.add_row(name, *cells)
        console.print(table)


def judge(found: Found, result: Result) -> None:
    """Each ranker's means over all conditions, and what is asked of the default one."""
    for name in RANKERS:
        means = np.mean([values for words, values in found.items() if words[3] == name], axis=0)
        for heading, values in zip(MEASURES, means.T, strict=True):
            result.figures[f"{heading}, {name}"] = Figure("", tuple(values.tolist()))
    result.notes["conditions"] = [
        dict(zip(("kind", "slow", "snr", "ranker"), words, strict=True))
        | {heading: round(float(value), 4) for heading, value in zip(MEASURES, np.median(values, axis=0), strict=True)}
        for words, values in found.items()
    ]
    plain = found["fmri", "no slow bursts", "middle", "mutual"]
    gains = [
        values[:, 0] - found[kind, slow, level, "variance"][:, 0]
        for (kind, slow, level, name), values in found.items()
        if slow == SLOW and name == "mutual"
    ]
    others = [name for name in RANKERS if name not in ("mutual", FORMER)]
    best = max(others, key=lambda name: result.figures[f"precision at 8, {name}"].median)
    limits: dict[str, tuple[np.ndarray, dict[str, float]]] = {
        "precision at 8, mutual, fmri, middle SNR": (plain[:, 0], {"at_least": 0.6}),
        "artefacts at 8, mutual, fmri, middle SNR": (plain[:, 1], {"at_most": 0.1}),
        "precision at 8, mutual less variance, slow bursts": (np.min(gains, axis=0), {"at_least": 0.2}),
    }
    result.figures[ONE] = Figure("", (1.0,))
    for name, (values, limit) in limits.items():
        result.figures[name] = Figure("", tuple(values.tolist()))
        result.ratios.append(Ratio(name, name, ONE, **limit))
    of, over = "precision at 8, mutual", f"precision at 8, {best}"
    result.ratios.append(Ratio(f"{of} over {best}, the next best", of, over, at_least=1))


def places(bench: Bench, begun: Callable[[str], None], result: Result) -> None:
    """Count how often each place in time is among the best 8 windows of stationary noise, and print it."""
    begun(f"stationary noise: train an extractor on {bench.training_runs} runs, {bench.steps} steps")
    training = [stationary(TRAINING_SEED + number, max(PLACES)) for number in range(bench.training_runs)]
    rankers = rankers_with(train_extractor(training, FRAMES, bench.steps))
    del rankers["uniform"]
    table = Table("ranker", title=f"best 8 windows of {bench.noise_runs} runs of stationary noise", box=box.SIMPLE_HEAD)
    for heading in ("frames", "fair share", "first", "last", "others", "largest distance in SD"):
        table.add_column(heading, justify="right", no_wrap=True)
    found = {(name, length): np.zeros(length // FRAMES, dtype=int) for name in rankers for length in PLACES}
    for length in PLACES:
        begun(f"stationary noise: {bench.noise_runs} runs of {length} frames")
        for seed in range(bench.first_seed, bench.first_seed + bench.noise_runs):
            run = stationary(seed, length)
            for name, ranker in rankers.items():
                found[name, length][np.argsort(-ranker.scores(*run, FRAMES), kind="stable")[:8]] += 1
    for (name, length), count_W in found.items():
        far_W = from_fair_share(count_W)
        share, inner = 8 * bench.noise_runs / len(count_W), f"{count_W[1:-1].min()} to {count_W[1:-1].max()}"
        cells = (length, f"{share:.1f}", count_W[0], count_W[-1], inner, f"{np.abs(far_W).max():.1f}")
        table.add_row(name, *map(str, cells))
        figure = f"distance of places in {length} frames, {name}"
        result.figures[figure] = Figure("SD", (float(np.abs(far_W).max()),))
        if name in ("mutual", "ridge"):
            result.ratios.append(Ratio(figure, figure, ONE, at_most=3))
    result.notes["places"] = [
        {"ranker": name, "frames": length, "counts": count_W.tolist()} for (name, length), count_W in found.items()
    ]
    Console(width=130, highlight=False).print(table)


def from_fair_share(count_W: np.ndarray) -> np.ndarray:
    """Distance of counts from the same chance for each window, in standard deviations of a binomial count."""
    share = count_W.mean()
    chance, runs = 8 / len(count_W), count_W.sum() / 8
    return (count_W - share) / np.sqrt(runs * chance * (1 - chance))


def cost(ranker: Ranker, repeat: int, centre_R3: np.ndarray, begun: Callable[[str], None], result: Result) -> None:
    """Time the scores of runs of several lengths."""

    def call(run: Run) -> Callable[[], object]:
        return lambda: ranker.scores(run.roi_RT, run.centre_R3, FRAMES)

    work = {
        f"score {length} frames": call(simulate("fmri", 0.6, False, 0, centre_R3, length // FRAMES))
        for length in LENGTHS
    }
    result.figures |= interleave(work, repeat, begun)
    result.ratios += [
        Ratio("score 1200 frames, CPU seconds", "score 1200 frames, CPU", ONE, at_most=1),
        Ratio("score 2400 over 1200 frames, CPU", "score 2400 frames, CPU", "score 1200 frames, CPU", at_most=2.5),
    ]
