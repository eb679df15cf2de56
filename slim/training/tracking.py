"""Logging of a run to Weights & Biases. A failure there is logged as a warning and never stops the training."""

from __future__ import annotations

import logging
import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from slim.checkpoints.run_folder import WANDB_ID

logger = logging.getLogger(__name__)

_SETTINGS = {
    "SILENT": "true",
    # send neither the host name nor the address of a git repository, unless these variables ask for them
    "HOST": "-",
    "DISABLE_GIT": "true",
    "INIT_TIMEOUT": "30",  # seconds for the server to answer
}


class Tracking:
    """Logs steps to wandb; rank 0 only.

    Parameters
    ----------
    folder : Path
        Folder of the run. If the server cannot be reached, the log is kept in `folder/wandb`, and `wandb sync` sends it
        later.
    mode : "offline" or "online"
    config : dict
        Configuration shown in wandb.
    """

    def __init__(self, folder: Path, mode: Literal["offline", "online"], config: Mapping[str, object]):
        self._run: Any = None
        for name, value in _SETTINGS.items():
            os.environ.setdefault(f"WANDB_{name}", value)
        try:
            note = folder / WANDB_ID
            note.parent.mkdir(exist_ok=True)
            if not note.exists():
                note.write_text(uuid.uuid4().hex[:12], encoding="utf-8")
            about: dict[str, Any] = {
                "name": folder.name,
                "id": note.read_text(encoding="utf-8").strip(),
                "dir": str(folder),
            }
            about |= {"project": "slim-brain", "resume": "allow", "config": config}
            self._begin(folder, mode, about)
        except Exception as error:  # wandb raises exceptions of its own, of the file system and of its service
            logger.warning("wandb did not start (%s); all metrics are in metrics.jsonl", _reason(error))

    def _begin(self, folder: Path, mode: Literal["offline", "online"], about: dict[str, Any]) -> None:
        import wandb

        if mode == "online":
            why = None if _has_key(wandb) else "there is no API key; call `wandb login`, or set WANDB_API_KEY"
            if why is None:
                try:
                    self._run = wandb.init(mode="online", **about)
                    return
                except Exception as error:  # for example no network, or a key that the server refuses
                    why = _reason(error)
                    wandb.teardown()
            how = f"send it with `wandb sync {folder}/wandb/offline-run-*`"
            logger.warning("run.wandb=online, but %s. The run is logged offline; %s", why, how)
        self._run = wandb.init(mode="offline", **about)

    def log(self, line: dict[str, float | None]) -> None:
        """Log one step."""
        if self._run is None:
            return
        try:
            self._run.log({name: value for name, value in line.items() if name != "step"}, step=line["step"])
        except Exception as error:
            logger.warning("logging to wandb failed and ends here (%s); see metrics.jsonl", _reason(error))
            self._run = None

    def close(self) -> None:
        """Finish the wandb run."""
        if self._run is not None:
            try:
                self._run.finish()
            except Exception as error:
                logger.warning("wandb did not finish the run (%s)", _reason(error))


def _has_key(wandb: Any) -> bool:
    # Check before `wandb.init`, which would wait for a key to be typed at a terminal.
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    try:
        return bool(wandb.login(prompt=False))
    except TypeError:  # before 0.31
        return bool(wandb.api.api_key)
    except Exception:  # the server refuses the key: `wandb.init` says why
        return True


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
