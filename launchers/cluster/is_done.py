"""Exit with status 0 if a job has finished its work, according to the file of its outcome, and 1 otherwise.

python -m launchers.cluster.is_done DATASET/work/slurm/outcome/3.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from shards.core.cli import DONE


def is_done(outcome: Path) -> bool:
    """Whether a job has finished; False if the file does not exist or cannot be read."""
    try:
        found = json.loads(outcome.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(found, dict) and type(found.get("status")) is int and found["status"] == DONE


if __name__ == "__main__":
    sys.exit(not is_done(Path(sys.argv[1])))
