"""The model card of an export: what its weights are, how they came about, and what they may be used for."""

from __future__ import annotations

from typing import Any

from shards.core import templates
from shards.preprocessing.confounds import CleanSettings
from slim.checkpoints.weights import CONFIG, SUMS
from slim.config import check_run


def write(about: dict[str, Any]) -> str:
    """The card, Markdown, from what `config.json` says."""
    made, data = about["made"], about["data"]
    chosen = data["configuration"]["settings"]
    return templates.render(
        "model_card.md",
        "slim.inference",
        made=made,
        finetuned=made.get("finetuned"),
        seen=len(about["seen"]["people"]) if "seen" in about else None,
        settings=check_run(about["settings"], CONFIG),
        data=data,
        grid=data["grid"],
        windows=data["windows"],
        parcels=chosen["parcels"],
        cleaning=CleanSettings.model_validate(chosen["clean"]).words or "none",
        config=CONFIG,
        sums=SUMS,
    )
