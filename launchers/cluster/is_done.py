"""Whether a job has done its work, for a script: exit status 0 if the file of its outcome says so, else 1.

python -m launchers.cluster.is_done DATASET/work/slurm/outcome/3.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from shards.core.cli import DONE


def is_done(outcome: Path) -> bool:
    """False, too, where there is no such file or it cannot be read."""
    try:
        found = json.loads(outcome.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(found, dict) and type(found.get("status")) is int and found["status"] == DONE


if __name__ == "__main__":
    sys.exit(not is_done(Path(sys.argv[1])))
