"""Which windows each ranker chooses in simulated runs with planted events and artefacts, and what ranking costs.

The runs are those of `simulate.py`: two kinds, each with and without slow incoherent bursts, at three signal-to-noise
ratios, on the parcels of the MNI152 brain mask. Every ranker scores the same runs, which are made from other seeds
in each round. `mutual` has an extractor for each kind, trained here on other runs of that kind, all ratios mixed, slow
bursts in half of them.

A window *holds an event* if it is among the fifth of its run's windows with the most planted energy (mean square over
parcels and frames). Of the `k` windows with the highest scores, and as means over the runs of a round,

- *precision at k* is the share that hold an event; chance is 0.2, and at 32 of the usual 70 windows 14/32 is the most;
- *artefacts at 8* is the share of the best 8 that an artefact affects and that hold no event: a frame of a spike, or
  the middle half of a slow burst;
- *Spearman* is the rank correlation of the scores with the planted energy, over all windows.

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
from launchers.benches.simulate import SNR, Run, simulate
from shards.core.settings import Settings
from shards.format.grid import Grid
from shards.format.patches import parcel_means
from slim.ranking.extractor_training import train_extractor
from slim.ranking.parcels import parcels_from_mask
from slim.ranking.rankers import Ranker, make_ranker

FRAMES = 5  # of a window
LENGTHS = (300, 600, 1200, 2400)  # frames of the runs that are timed
RANKERS = ("mutual", "ridge", "median-variance", "variance", "leave-one-out", "uniform", "random")
SLOW = "slow bursts"
ONE = "one, to compare a figure with a number"
LEVELS = ("low", "middle", "high")
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
    first_seed: int = Field(0, ge=0, lt=TRAINING_SEED // 2, description="seed of the first run")


SMALL = {"runs": 1, "windows": 40, "training_runs": 2, "steps": 5}


def run(bench: Bench, repeat: int, folder: Path, begun: Callable[[str], None]) -> Result:
    """Measure all of it; see the head of this file."""
    centre_R3 = mni_parcels()
    result = Result(notes={"settings": bench.model_dump(mode="json"), "parcels": len(centre_R3), "chance": 0.2})
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
        mutual[kind] = make_ranker("mutual", extractor)
        rankers = {name: mutual[kind] if name == "mutual" else make_ranker(name) for name in RANKERS}
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
    cost(mutual["fmri"], repeat, centre_R3, begun, result)
    return result


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
    best = max(RANKERS[1:], key=lambda name: result.figures[f"precision at 8, {name}"].median)
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
