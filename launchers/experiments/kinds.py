"""The kinds of synthetic cohorts that encoders are compared on."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from shards.synthetic.truth import PARCEL_IMAGE

COARSE = ("group", "score", "fingerprint", "state")


@dataclass(frozen=True)
class Kind:
    """A kind of cohort.

    Attributes
    ----------
    name : str
        In the names of its folders.
    words : str
        In the heads of tables.
    options : tuple of str
        Of `slim-brain make-cohort`.
    tasks : tuple of str
        Presets of tasks, without `synthetic_`.
    parcels : str, optional
        The label image in the cohort, if functional connectivity of its parcels is a baseline.
    poolings : tuple of str
        Poolings that have a main table of their own, besides `cov`; of `launchers.experiments.trials.POOLINGS`.
    """

    name: str
    words: str
    options: tuple[str, ...]
    tasks: tuple[str, ...] = COARSE
    parcels: str | None = None
    poolings: tuple[str, ...] = ()

    @classmethod
    def of_snr(cls, snr: float) -> Kind:
        """Traits in the coupling of networks, at a signal-to-noise ratio of voxels."""
        return cls(f"snr{snr:g}", f"SNR {snr:g}", ("--snr", f"{snr:g}"))


FINE = Kind(
    "fine-snr0.9",
    "fine traits, SNR 0.9",
    ("--snr", "0.9", "--recipe", "3"),
    ("fine_group", "fine_score", "fingerprint", "group", "score", "state"),
    PARCEL_IMAGE,
    ("patterns",),
)

_REAL = Path("rapidtide", "sub-RAPIDTIDETEST.nii.gz")  # below SLIM_REAL_DATA


def real_noise() -> Kind | None:
    """Coarse traits in noise that is real: surrogates of a scan; None without a folder of real scans."""
    folder = os.environ.get("SLIM_REAL_DATA")
    if not folder:
        return None
    options = ("--snr", "0.9", "--noise", str(Path(folder).resolve() / _REAL))
    return Kind("real-snr0.9", "noise of a real scan, SNR 0.9", options)
