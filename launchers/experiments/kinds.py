"""The kinds of synthetic cohorts that encoders are compared on."""

from __future__ import annotations

from dataclasses import dataclass

from shards.synthetic.write import PARCELS

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
    """

    name: str
    words: str
    options: tuple[str, ...]
    tasks: tuple[str, ...] = COARSE
    parcels: str | None = None

    @classmethod
    def of_snr(cls, snr: float) -> Kind:
        """Traits in the coupling of networks, at a signal-to-noise ratio of voxels."""
        return cls(f"snr{snr:g}", f"SNR {snr:g}", ("--snr", f"{snr:g}"))

    @staticmethod
    def who(people: int, usual: int) -> str:
        """The name of the pretraining cohort of so many people."""
        return "pretrained" if people == usual else f"pretrained{people}"


FINE = Kind(
    "fine-snr0.9",
    "fine traits, SNR 0.9",
    ("--snr", "0.9", "--recipe", "3"),
    ("fine_group", "fine_score", "fingerprint", "group", "score", "state"),
    PARCELS,
)
