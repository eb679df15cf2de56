"""A run in Weights & Biases: whatever is wrong with it is a warning, and the training goes on."""

from __future__ import annotations

import os
import uuid
from pathlib import Path
from typing import Any, Literal

from slim.checkpoints.run_folder import WANDB_ID

_SETTINGS = {
    "SILENT": "true",
    # neither the machine's name nor the address of a repository, unless these variables ask for them
    "HOST": "-",
    "DISABLE_GIT": "true",
    "INIT_TIMEOUT": "30",  # seconds for the server to answer
}


class Tracking:
    """Sends lines to wandb; rank 0 only.

    Parameters
    ----------
    folder : Path
        The run. Without an answer of the server it is kept in `folder/wandb`, from where `wandb sync` sends it.
    mode : "offline" or "online"
    config : dict
        Shown in wandb.
    """

    def __init__(self, folder: Path, mode: Literal["offline", "online"], config: dict[str, Any]):
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
        except Exception as error:  # of any kind: wandb's own, of the file system, of its service
            _warn(f"wandb could not be started ({_reason(error)}); metrics.jsonl has all there is")

    def _begin(self, folder: Path, mode: Literal["offline", "online"], about: dict[str, Any]) -> None:
        import wandb

        if mode == "online":
            why = None if _has_key(wandb) else "there is no API key; call `wandb login`, or set WANDB_API_KEY"
            if why is None:
                try:
                    self._run = wandb.init(mode="online", **about)
                    return
                except Exception as error:  # no network, a key that the server refuses, ...
                    why = _reason(error)
                    wandb.teardown()
            _warn(
                f"run.wandb=online, but {why}. It is kept offline: `wandb sync {folder}/wandb/offline-run-*` sends it"
            )
        self._run = wandb.init(mode="offline", **about)

    def log(self, line: dict[str, float | None]) -> None:
        """Send one step."""
        if self._run is None:
            return
        try:
            self._run.log({name: value for name, value in line.items() if name != "step"}, step=line["step"])
        except Exception as error:
            _warn(f"wandb takes no more steps ({_reason(error)}); metrics.jsonl has all there is")
            self._run = None

    def close(self) -> None:
        """End the run in wandb."""
        if self._run is not None:
            try:
                self._run.finish()
            except Exception as error:
                _warn(f"wandb could not be ended ({_reason(error)})")


def _has_key(wandb: Any) -> bool:
    # Asked for first: at a terminal wandb would wait for one to be typed in.
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    try:
        return bool(wandb.login(prompt=False))
    except TypeError:  # before 0.31
        return bool(wandb.api.api_key)
    except Exception:  # one that the server does not take: told by `init`
        return True


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def _warn(text: str) -> None:
    print(f"warning: {text}", flush=True)
