"""The record of a refused scan: a line of `failed.jsonl`."""

from __future__ import annotations

from pathlib import Path

from pydantic import StrictStr
from upath import UPath

from shards.core.errors import DatasetError
from shards.core.settings import check
from shards.format import layout
from shards.format.record import Record


class Refusal(Record):
    """Why a scan cannot be converted.

    Attributes
    ----------
    key, cohort, source : str
        The scan.
    reason, hint : str
        What is wrong, with the hint at the end; and the hint, what to do.
    fingerprint : str
        Fingerprint of its files and of the facts given about it when it was refused.
    """

    key: StrictStr
    cohort: StrictStr
    source: StrictStr
    reason: StrictStr
    hint: StrictStr
    fingerprint: StrictStr


def read_refusals(path: Path | UPath) -> list[Refusal]:
    """Read the refusals in a JSON lines file. A missing file gives an empty list.

    Raises
    ------
    DatasetError
        If a line is not a refusal.
    """
    lines = enumerate(layout.read_lines(path), 1)
    return [check(Refusal, line, f"{path}: line {number}", DatasetError) for number, line in lines]
