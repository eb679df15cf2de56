"""What every process of a pretraining run does, however it was started.

    python -m launchers.job RUN/config.yaml

The launcher sets RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT, and OUTCOME: a folder where each process
leaves how it ended. That file is what counts: a process that did its work may still be aborted by a library while it
exits.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import threading
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

from shards.console import DONE, RESUME, WRONG
from shards.errors import ConfigError, Stopped, UserError, is_full

CRASHED = 70  # sysexits' EX_SOFTWARE: a fault of this software


def prepare() -> None:
    """Environment of DeepSpeed, before it is imported: quiet, and no compiler needed on machines without a GPU."""
    import torch

    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "ERROR")
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning, module="torch.distributed")
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    import deepspeed.ops

    if not torch.cuda.is_available():
        # Otherwise `initialize` compiles a shared-memory backend with g++ and ninja that gloo never uses.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def work(config: Path) -> dict[str, Any]:
    """Train as the merged configuration says, in a process group made from the environment."""
    prepare()
    import deepspeed
    import torch
    import torch.distributed as dist

    from slim.config import load_config
    from slim.trainer import Trainer

    settings = load_config(config)
    gpus = torch.cuda.device_count()
    if settings.run.device == "cuda" and not gpus:
        raise ConfigError(config, "run.device", "cuda, but no GPU is seen here", "auto or cpu, or a machine with a GPU")
    device = torch.device("cpu")
    if settings.run.device != "cpu" and gpus:
        local = int(os.environ["LOCAL_RANK"])
        if local >= gpus:
            raise ConfigError(config, "run.processes", f"more than the {gpus} GPUs here", "one process per GPU")
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    deepspeed.init_distributed(dist_backend="nccl" if device.type == "cuda" else "gloo", verbose=False)
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    result = Trainer(settings, device).run()
    dist.barrier()
    dist.destroy_process_group()  # after a failure the others may be in the midst of something, so nothing is awaited
    return result


def stop_with_parent() -> None:
    """Ask this process to stop, as a signal would, once the launcher is gone (killed, perhaps)."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


def main() -> int:
    """Work, and leave the outcome for the launcher."""
    stop_with_parent()
    config = Path(sys.argv[1])
    outcome = Path(os.environ["OUTCOME"]) / f"{os.environ['RANK']}.json"
    result: dict[str, Any]
    try:
        result = work(config)
        result["status"] = DONE if result["finished"] else RESUME
    except UserError as error:
        result = {"status": WRONG, "error": error.line()}
    except Stopped as stop:
        result = {"status": CRASHED, "stopped": str(stop)}
    except Exception as error:
        result = {"status": CRASHED, "error": traceback.format_exc()}
        if is_full(error):
            result["stopped"] = f"no space left for {getattr(error, 'filename', None) or config}; make room"
    result["ended"] = time.time()
    if outcome.parent.is_dir():  # it went with the launcher
        outcome.write_text(json.dumps(result))
    return int(result["status"])


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # threads of gloo and wandb can abort an ordinary exit after all work is done
