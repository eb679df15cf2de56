"""The model card of an export: what the weights are, how they were made, and how they may be used."""

from __future__ import annotations

from typing import Any

from shards.core import templates
from shards.preprocessing.confounds import CleanSettings
from slim.checkpoints.provenance import Ancestor
from slim.checkpoints.seen import Seen
from slim.checkpoints.weights import CONFIG, SUMS, Base
from slim.config import check_run


def write(about: dict[str, Any]) -> str:
    """The model card in Markdown, from the content of `config.json`."""
    made, data = about["made"], about["data"]
    chosen = data["configuration"]["settings"]
    return templates.render(
        "model_card.md",
        "slim.inference",
        made=made,
        ancestors=Ancestor.model_validate(made["init"]).line() if "init" in made else [],
        finetuned=made.get("finetuned"),
        base=Base.model_validate(made["base"]) if about.get("adapter") else None,
        seen=Seen.from_tree(about["seen"], CONFIG).count if "seen" in about else None,
        settings=check_run(about["settings"], CONFIG),
        data=data,
        grid=data["grid"],
        windows=data["windows"],
        parcels=chosen["parcels"],
        cleaning=CleanSettings.model_validate(chosen["clean"]).words or "none",
        config=CONFIG,
        sums=SUMS,
    )
