"""`slim-brain reconstruct` as a file of a checkout."""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from launchers.commands.__main__ import console

    console("reconstruct")
