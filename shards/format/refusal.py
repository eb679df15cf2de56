"""A scan that was refused: a line of `failed.jsonl`."""

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
        Which scan.
    reason, hint : str
        What is wrong, which ends with the hint; and what to do.
    fingerprint : str
        Of its files and what is stated of it when it was refused.
    """

    key: StrictStr
    cohort: StrictStr
    source: StrictStr
    reason: StrictStr
    hint: StrictStr
    fingerprint: StrictStr


def read_refusals(path: Path | UPath) -> list[Refusal]:
    """Those in a JSON-lines file; an absent file has none.

    Raises
    ------
    DatasetError
        If a line is none.
    """
    lines = enumerate(layout.read_lines(path), 1)
    return [check(Refusal, line, f"{path}: line {number}", DatasetError) for number, line in lines]
