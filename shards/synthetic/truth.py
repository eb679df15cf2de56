"""The ground truth of the synthetic cohort: networks and their connectivity, traits of subjects, events.

Sizes are in mm and s. All random numbers depend on the seed of the cohort, the subject and the session."""

from __future__ import annotations

import zlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from shards.core.errors import ConfigError
from shards.core.files import sha256

SPACE = "MNI152NLin2009cAsym"

GENERATOR = "SLIM-Brain synthetic cohort"

PARCEL_IMAGE = f"space-{SPACE}_desc-parcels_dseg.nii.gz"  # at the root of a cohort of recipe 3

RECIPES = (2, 3)  # a new one wherever the same parameters give other bytes; 3 adds what is finer than parcels


def both_sides(x: int, y: int, z: int) -> list[tuple[int, int, int]]:
    """A focus in each hemisphere."""
    return [(-x, y, z), (x, y, z)]


# Foci of each network, in MNI mm.
NETWORKS: dict[str, list[tuple[int, int, int]]] = {
    "visual": [*both_sides(10, -90, 2), *both_sides(40, -74, -2)],
    "somatomotor-hand": [*both_sides(38, -26, 56), (0, -18, 62)],
    "somatomotor-face": [*both_sides(54, -8, 32)],
    "auditory": [*both_sides(54, -22, 8)],
    "dorsal-attention": [*both_sides(26, -60, 54), *both_sides(26, -4, 54)],
    "salience": [(0, 18, 42), *both_sides(38, 18, -2), *both_sides(28, 46, 26)],
    "frontoparietal-left": [(-42, 26, 32), (-46, -52, 46), (-58, -44, -8)],
    "frontoparietal-right": [(42, 26, 32), (46, -52, 46), (58, -44, -8)],
    "default": [(0, -54, 28), (0, 52, 2), *both_sides(46, -66, 32)],
    "limbic": [*both_sides(24, -8, -22), *both_sides(38, 10, -34), (0, 34, -18)],
    "subcortical": [*both_sides(12, -18, 8), *both_sides(22, 4, 2)],
    "cerebellar": [*both_sides(28, -66, -38), (0, -58, -20)],
}

# Mean correlations in the population. Other pairs have `USUAL_CORRELATION`.
EVENT_EVERY_S, ARTEFACT_EVERY_FRAMES = 20.0, 40

USUAL_CORRELATION = 0.05

CORRELATIONS = {
    ("visual", "somatomotor-hand"): 0.3,
    ("visual", "auditory"): 0.2,
    ("visual", "dorsal-attention"): 0.3,
    ("somatomotor-hand", "somatomotor-face"): 0.4,
    ("somatomotor-face", "auditory"): 0.4,
    ("dorsal-attention", "salience"): 0.2,
    ("frontoparietal-left", "frontoparietal-right"): 0.4,
    ("default", "limbic"): 0.2,
    ("default", "dorsal-attention"): -0.3,
    ("default", "salience"): -0.2,
    ("subcortical", "cerebellar"): 0.3,
}

# The networks that are active in an event. No pair of them depends on a trait.
STATES = {
    "look": ("visual", "dorsal-attention"),
    "move": ("somatomotor-hand", "subcortical"),
    "listen": ("auditory", "somatomotor-face"),
    "think": ("frontoparietal-left", "frontoparietal-right"),
    "remember": ("default", "limbic"),
    "startle": ("salience", "cerebellar"),
}

# A trait increases the correlation of three pairs and decreases that of three others. Each network is in one pair only,
# so the matrix stays positive definite with large effects. The networks of a pair do not overlap in the brain;
# otherwise their correlation would change the variance of voxels.
TRAIT_PAIRS: dict[str, list[tuple[str, str, int]]] = {
    "group": [
        ("visual", "salience", 1),
        ("somatomotor-hand", "cerebellar", -1),
        ("somatomotor-face", "default", 1),
        ("auditory", "dorsal-attention", -1),
        ("frontoparietal-left", "subcortical", 1),
        ("frontoparietal-right", "limbic", -1),
    ],
    "score": [
        ("visual", "somatomotor-face", 1),
        ("somatomotor-hand", "salience", -1),
        ("auditory", "default", 1),
        ("dorsal-attention", "cerebellar", -1),
        ("frontoparietal-left", "limbic", 1),
        ("frontoparietal-right", "subcortical", -1),
    ],
}

# The same for the traits of recipe 3, in the coupling of the fine patterns of these networks.
FINE_PAIRS: dict[str, list[tuple[str, str, int]]] = {
    "fine_group": [
        ("visual", "default", 1),
        ("somatomotor-hand", "frontoparietal-left", -1),
        ("somatomotor-face", "subcortical", 1),
        ("auditory", "frontoparietal-right", -1),
        ("dorsal-attention", "limbic", 1),
        ("salience", "cerebellar", -1),
    ],
    "fine_score": [
        ("visual", "frontoparietal-left", 1),
        ("somatomotor-hand", "limbic", -1),
        ("somatomotor-face", "frontoparietal-right", 1),
        ("auditory", "cerebellar", -1),
        ("dorsal-attention", "subcortical", 1),
        ("salience", "default", -1),
    ],
}

GROUP_EFFECT = 0.25  # effect on the correlation of a pair: + in one group, - in the other

SCORE_EFFECT = 0.38  # effect per unit of the score

GROUPS = ("A", "B")

FINGERPRINT_SD = 0.22  # SD of the correlation of a pair over subjects, without the traits


@dataclass(frozen=True)
class SyntheticCohort:
    """Size and sampling of a synthetic cohort.

    Parameters
    ----------
    subjects, sessions, frames : int
        Number of subjects, of sessions per subject, and of frames per session (at least 20).
    voxel_mm : float
        Edge of a voxel, 1 to 20 mm.
    tr : float
        Repetition time, seconds, at most 10.
    snr : float
        RMS of network activity over the brain, divided by the SD of the noise of a voxel.
    seed : int
        At least 0.
    recipe : int
        2, or 3 with traits that are finer than parcels.
    noise : Path, optional
        A scan, whose surrogates are the noise instead of a smooth random field.

    Raises
    ------
    ConfigError
        If a value is out of range.
    """

    subjects: int = 24
    sessions: int = 2
    frames: int = 120
    voxel_mm: float = 8.0
    tr: float = 0.72
    snr: float = 0.9
    seed: int = 0
    recipe: int = 2
    noise: Path | None = None

    def __post_init__(self) -> None:
        for name, good, expected in (
            ("subjects", self.subjects >= 1, "at least 1"),
            ("sessions", self.sessions >= 1, "at least 1"),
            ("frames", 20 <= self.frames <= 32_767, "20 to 32767, the limit of NIfTI-1"),
            ("voxel-mm", 1 <= self.voxel_mm <= 20, "1 to 20 mm"),
            ("tr", 0 < self.tr <= 10, "more than 0 and at most 10 s"),
            ("snr", 0 < self.snr < float("inf"), "a number above 0"),
            ("seed", self.seed >= 0, "at least 0"),
            ("recipe", self.recipe in RECIPES, f"one of {', '.join(map(str, RECIPES))}"),
            ("noise", self.noise is None or self.noise.is_file(), "a scan: a NIfTI file of four dimensions"),
        ):
            if not good:
                got = getattr(self, name.replace("-", "_"))
                raise ConfigError("command line", f"--{name}", got, expected)

    def parameters(self) -> dict[str, object]:
        """What the bytes of a cohort depend on, besides the recipe; a scan by its name and content."""
        found = {name: value for name, value in asdict(self).items() if name not in ("recipe", "noise")}
        if self.noise is not None:
            found["noise"] = {"name": self.noise.name, "sha256": sha256(self.noise)}
        return found

    def runs(self) -> list[tuple[int, int]]:
        """(subject, session) of every scan, both counted from 1."""
        return [(i, j) for i in range(1, self.subjects + 1) for j in range(1, self.sessions + 1)]


def rng_of(seed: int, purpose: str, *indices: int) -> np.random.Generator:
    """A separate random generator for each purpose, so that more draws for one do not change the others."""
    return np.random.default_rng([seed, zlib.crc32(purpose.encode()), *indices])


def traits(seed: int, subject: int) -> tuple[str, float]:
    """The `group` and `score` of a subject. Subjects 1 and 2, 3 and 4 ... are in different groups."""
    return _drawn_traits(seed, subject, "group", "score")


def fine_traits(seed: int, subject: int) -> tuple[str, float]:
    """The `fine_group` and `fine_score` of a subject (recipe 3), independent of `traits`."""
    return _drawn_traits(seed, subject, "fine_group", "fine_score")


def _drawn_traits(seed: int, subject: int, group: str, score: str) -> tuple[str, float]:
    flip = int(rng_of(seed, group, (subject - 1) // 2).integers(2))
    value = float(np.clip(rng_of(seed, score, subject).standard_normal(), -2, 2))
    return GROUPS[(subject + flip) % 2], round(value, 4)


def connectivity(seed: int, subject: int, session: int | None = None) -> np.ndarray:
    """Correlations of a subject's networks, (N, N): the sum of population mean, fingerprint and traits.

    With `session`, as in recipe 3, the fingerprint is that of the session: it tells nobody apart.
    """
    base_NN = np.full((len(NETWORKS), len(NETWORKS)), USUAL_CORRELATION)
    index = {name: i for i, name in enumerate(NETWORKS)}
    for (a, b), value in CORRELATIONS.items():
        base_NN[index[a], index[b]] = base_NN[index[b], index[a]] = value
    owner = (subject,) if session is None else (subject, session)
    return _with_traits(base_NN, rng_of(seed, "fingerprint", *owner), TRAIT_PAIRS, traits(seed, subject))


def fine_connectivity(seed: int, subject: int) -> np.ndarray:
    """Correlations of the activity of a subject's fine patterns, (N, N): fingerprint and traits; 0 on average."""
    zero_NN = np.zeros((len(NETWORKS), len(NETWORKS)))
    return _with_traits(zero_NN, rng_of(seed, "fine_fingerprint", subject), FINE_PAIRS, fine_traits(seed, subject))


def _with_traits(
    corr_NN: np.ndarray,
    fingerprint: np.random.Generator,
    pairs: dict[str, list[tuple[str, str, int]]],
    of_subject: tuple[str, float],
) -> np.ndarray:
    """Add a fingerprint and the effects of a group and a score; the result is positive definite with diagonal 1."""
    corr_NN = corr_NN.copy()
    upper = np.triu(fingerprint.normal(0, FINGERPRINT_SD, corr_NN.shape), 1)
    corr_NN += upper + upper.T
    group, score = of_subject
    effects = (GROUP_EFFECT if group == GROUPS[0] else -GROUP_EFFECT, SCORE_EFFECT * score)
    index = {name: i for i, name in enumerate(NETWORKS)}
    for trait, effect in zip(pairs, effects, strict=True):
        for a, b, sign in pairs[trait]:
            corr_NN[index[a], index[b]] += sign * effect
            corr_NN[index[b], index[a]] += sign * effect
    np.fill_diagonal(corr_NN, 1.0)
    values, vectors = np.linalg.eigh(corr_NN)
    corr_NN = (vectors * np.maximum(values, 0.05)) @ vectors.T
    sd_N = np.sqrt(np.diag(corr_NN))
    return corr_NN / np.outer(sd_N, sd_N)


def planted(cohort: SyntheticCohort, subject: int, session: int) -> dict[str, list[dict[str, Any]]]:
    """The events and artefacts of a scan, as in `truth.json`.

    Returns
    -------
    dict
        `events`: state, its networks, onset_s after frame 0, length_s, amplitude (peak of the response in SDs of the
        networks' ongoing activity). `artefacts`: kind (`rim`: motion; `global`: motion and a drop of the signal in the
        whole brain), frame (counted from 0), frames (1 or 2).
    """
    rng = rng_of(cohort.seed, "events", subject, session)
    seconds = cohort.frames * cohort.tr
    usable = max(seconds - 8, seconds / 2)  # the response peaks about five seconds after the onset
    count = max(1, round(seconds / EVENT_EVERY_S))
    events = []
    for k in range(count):
        state = str(rng.choice(list(STATES)))
        events.append(
            {
                "state": state,
                "networks": list(STATES[state]),
                "onset_s": round(usable * (k + rng.uniform(0.05, 0.75)) / count, 2),
                "length_s": round(rng.uniform(1.5, 5), 2),
                "amplitude": round(rng.uniform(1.8, 3), 2),
            }
        )

    rng = rng_of(cohort.seed, "artefacts", subject, session)
    count = max(1, round(cohort.frames / ARTEFACT_EVERY_FRAMES))
    artefacts = []
    for k in range(count):
        first, last = (cohort.frames * (k + share) / count for share in (0.15, 0.85))
        artefacts.append(
            {
                "kind": str(rng.choice(["rim", "global"])),
                "frame": int(rng.uniform(first, last)),
                "frames": int(rng.integers(1, 3)),
            }
        )
    return {"events": events, "artefacts": artefacts}


def truth(cohort: SyntheticCohort) -> dict[str, object]:
    """The ground truth of a cohort, as in `truth.json`."""
    subjects: dict[str, object] = {}
    for subject in range(1, cohort.subjects + 1):
        sessions = {f"ses-{j}": planted(cohort, subject, j) for j in range(1, cohort.sessions + 1)}
        subjects[f"sub-{subject:02d}"] = all_traits(cohort, subject) | {"sessions": sessions}
    facts = {
        "generator": GENERATOR,
        "recipe": cohort.recipe,
        "parameters": cohort.parameters(),
        "networks": [{"name": name, "centres_mm": foci} for name, foci in NETWORKS.items()],
        "trait_pairs": TRAIT_PAIRS,
    }
    if cohort.recipe == 3:
        facts |= {"fine_trait_pairs": FINE_PAIRS}
    return facts | {"subjects": subjects}


def all_traits(cohort: SyntheticCohort, subject: int) -> dict[str, object]:
    """The traits of a subject by name, the columns of participants.tsv."""
    found = dict(zip(TRAIT_PAIRS, traits(cohort.seed, subject), strict=True))
    if cohort.recipe == 3:
        found |= dict(zip(FINE_PAIRS, fine_traits(cohort.seed, subject), strict=True))
    return found
