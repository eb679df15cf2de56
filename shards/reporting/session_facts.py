"""What is known of a session, as names and values for a page."""

from __future__ import annotations

import math

import numpy as np

from shards.conversion.session import assumptions
from shards.format.grid import Grid
from shards.format.session_record import SessionRecord
from shards.reporting import html
from shards.reporting.distribution import MEASURES


def details(session: SessionRecord, grid: Grid) -> dict[str, object]:
    """The facts about a session that are known, without its names and its quality measures."""
    facts: dict[str, object] = {
        "Frames": f"{session.frames} of {session.tr:g} s, scanned at {session.source_tr:.4g} s",
        "Kept": f"{session.n_kept} of {html.count(session.n_windows, 'window')}, "
        f"{session.n_patches} of {math.prod(grid.patch_shape)} patches",
    }
    if session.mask_source is not None:
        facts["Brain mask"] = "computed from the scan" if session.mask_source == "computed" else session.mask_source
    if session.centred_by_mm is not None:
        moved = ", ".join(f"{mm:+g}" for mm in session.centred_by_mm)
        facts["Native space"] = f"moved by ({moved}) mm to the centre of the grid; not registered"
    if session.orientation_assumed:
        facts["Orientation"] = f"{session.orientation_assumed} assumed; left and right cannot be verified"
    if words := assumptions(session):
        facts["To check"] = "; ".join(words)
    if session.dropped_frames is not None:
        facts["Leading frames dropped"] = session.dropped_frames
    if session.cleaned:
        facts["Cleaned"] = session.cleaned
    return facts


def all_facts(session: SessionRecord, grid: Grid) -> dict[str, object]:
    """Names, quality measures and details of a session."""
    measured = {
        measure.title: measure.words(value)
        for measure in MEASURES
        if np.isfinite(value := measure.of(session)) and measure.field != "source_tr"
    }
    names = {"Cohort, subject, split": f"{session.cohort}, {session.subject}, {session.split}"}
    return names | measured | details(session, grid)
