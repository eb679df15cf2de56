"""What is known of an explanation before its sessions come, as in TASK.json."""

from __future__ import annotations

from typing import Any

ABOUT: dict[str, Any] = {
    "task": "sex",
    "type": "classification",
    "label": "sex",
    "classes": ["A", "B"],
    "score": "logit of B",
    "pooling": "cov",
    "start": "still",
    "tolerance": 0.02,
    "run": "runs/name",
    "data": "data/mylab",
    "step": 900,
    "weights": "encoder",
    "space": "MNI",
}
