"""What every process of a run does, however it was started.

    python -m launchers.job RUN/config.yaml

The launcher sets RANK, LOCAL_RANK and WORLD_SIZE, how processes meet (SLIM_STORE, a file, on one machine; MASTER_ADDR
and MASTER_PORT on a cluster), and OUTCOME: a folder where each process leaves how it ended. That file is what counts: a
process that did its work may still be aborted by a library while it exits.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from launchers.outcome import Outcome
from shards.core.cli import CRASHED, DONE, RESUME, STOPPING, WRONG, crashed, lasting_output
from shards.core.errors import ConfigError, DatasetError, Stopped, UserError, is_full
from shards.core.files import printable
from shards.core.workers import remove_sockets
from shards.format.reader import away
from slim.checkpoints.run_folder import CHECKPOINTS, CONFIG, LATEST
from slim.training.result import TrainingResult

if TYPE_CHECKING:
    from slim.config import TrainSettings
    from slim.training.callbacks import Callback
    from slim.training.task import TrainingTask

CALLBACKS = "SLIM_CALLBACKS"  # variable that names callbacks of the user, see `slim.training.callbacks`
STORE = "SLIM_STORE"  # variable that names the file by which processes of one machine meet
_LAST = 600.0  # seconds to end a step and save without a launcher
# glibc gives freed memory back to the system and asks for it anew, thousands of times a step; keeping it
# made a CPU step of the published geometry 14 times faster on a virtual machine with slow page faults (batch 4).
KEEP_FREED = {"MALLOC_TRIM_THRESHOLD_": str(2**33), "MALLOC_MMAP_THRESHOLD_": str(2**32)}


def prepare(on_gpu: bool) -> None:
    """Environment of DeepSpeed, before it is imported: quiet, and on the CPU no compiler needed.

    By itself DeepSpeed takes a GPU wherever there is one, whatever `run.device` says.
    """
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "ERROR")
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning, module="torch.distributed")
    if not on_gpu:
        os.environ["DS_ACCELERATOR"] = "cpu"
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    import deepspeed.ops

    if not on_gpu:
        # Otherwise `initialize` compiles a shared-memory backend with g++ and ninja that gloo never uses.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def work(config: Path) -> TrainingResult:
    """Train as the merged configuration says, in a process group made from the environment."""
    import torch
    import torch.distributed as dist

    from slim.checkpoints import lock
    from slim.config import load_run

    settings = load_run(config)
    if os.environ["RANK"] == "0":
        lock.take(config.parent)
    gpus = torch.cuda.device_count()
    if settings.run.device == "cuda" and not gpus:
        raise ConfigError(config, "run.device", "cuda, but no GPU is seen here", "auto or cpu, or a machine with a GPU")
    on_gpu = settings.run.device != "cpu" and gpus > 0
    prepare(on_gpu)
    import deepspeed

    from slim.training import callbacks
    from slim.training.trainer import Trainer

    with while_away(settings):
        task = open_task(settings)
    device = torch.device("cpu")
    if on_gpu:
        local = int(os.environ["LOCAL_RANK"])
        if local >= gpus:
            raise ConfigError(config, "run.processes", f"more than the {gpus} GPUs here", "one process per GPU")
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    if STORE in os.environ:
        world = int(os.environ["WORLD_SIZE"])
        store = dist.FileStore(os.environ[STORE], world)
        dist.init_process_group(backend, store=store, rank=int(os.environ["RANK"]), world_size=world)
    deepspeed.init_distributed(dist_backend=backend, verbose=False)
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    rank = dist.get_rank()
    chosen = (*own_callbacks(), *callbacks.usual(task.name, settings, device, rank, flops_counter(task)))
    result = Trainer(task, device, chosen).run()
    dist.barrier()
    dist.destroy_process_group()  # after a failure the others may be in the midst of something, so nothing is awaited
    return result


def open_task(settings: TrainSettings) -> TrainingTask:
    """Data and learner of a run with these settings; see `slim.training.task.TrainingTask`."""
    from slim.config import FinetuneSettings, PretrainSettings
    from slim.finetune.task import FinetuneTask
    from slim.pretrain.task import PretrainTask

    if isinstance(settings, FinetuneSettings):
        return FinetuneTask(settings)
    assert isinstance(settings, PretrainSettings)
    return PretrainTask(settings)


def flops_counter(task: TrainingTask) -> Callable[[], float] | None:
    """Counts the FLOPs of a step per token of brain; None for a run whose steps are not counted."""
    from slim.planning.forecast import flops_per_token
    from slim.pretrain.task import PretrainTask

    if not isinstance(task, PretrainTask):
        return None
    return partial(flops_per_token, task.settings, task.datasets[0])


def own_callbacks() -> list[Callback]:
    """Callbacks of the user's own, from the functions that SLIM_CALLBACKS names.

    The variable is of this process's environment, never of a configuration: a run that somebody sent names no code.

    Raises
    ------
    ConfigError
        If a function cannot be imported, or makes no callback.
    """
    from slim.training.callbacks import Callback

    made = []
    for name in filter(None, os.environ.get(CALLBACKS, "").split(",")):
        module, _, function = name.strip().partition(":")
        try:
            callback = getattr(import_module(module), function)()
        except (ImportError, AttributeError, TypeError, ValueError) as error:
            expected = "module:function, a function that can be imported and makes a Callback"
            raise ConfigError("environment", CALLBACKS, f"{name} ({error})", expected) from None
        if not isinstance(callback, Callback):
            raise ConfigError(
                "environment", CALLBACKS, f"{name}, which makes a {type(callback).__name__}", "a Callback"
            )
        made.append(callback)
    return made


@contextmanager
def while_away(settings: TrainSettings) -> Iterator[None]:
    """Stopped, in place of a `DatasetError`, where a dataset of a run that was started cannot be reached at present."""
    try:
        yield
    except DatasetError:
        for data in settings.data:
            if (why := away(data.path)) is not None:
                raise Stopped(why, "when it is back, call the same command again") from None
        raise


def stop_with_parent() -> None:
    """Ask this process to stop, as a signal would, once the launcher is gone (killed, perhaps).

    It ends at once while nothing listens for signals yet, and after a while if it cannot come to an end by itself.
    """
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        if signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(_LAST)
        os._exit(RESUME)

    threading.Thread(target=watch, daemon=True).start()


def main(config: Path) -> int:
    """Work, and leave the outcome for the launcher."""
    # A signal that comes before the trainer listens waits until it does.
    signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
    stop_with_parent()
    mine = Path(os.environ["OUTCOME"]) / f"{os.environ['RANK']}.json"
    try:
        result = work(config)
        outcome = Outcome(status=DONE if result.finished else RESUME, ended=time.time(), result=result)
    except UserError as error:
        outcome = Outcome(status=WRONG, ended=time.time(), error=error.line())
    except Stopped as stop:
        outcome = Outcome(status=CRASHED, ended=time.time(), stopped=str(stop), then=stop.then)
    except Exception as error:
        full = f"no space left for {getattr(error, 'filename', None) or config}; make room" if is_full(error) else ""
        line = f"error: {crashed(error, config.parent)}"
        outcome = Outcome(status=CRASHED, ended=time.time(), error=line, stopped=full)
    outcome.write(mine)
    return outcome.status


def what_next(run: Path | None) -> str:
    """What the same command would do after a failure, by the checkpoints and the configuration of a run."""
    from slim.config import load_run

    again = "the same command continues from the last complete checkpoint"
    if run is None:
        return again
    with suppress(UserError):
        if load_run(run / CONFIG).run.resume == "never":
            again = f"with run.resume=auto {again}"
    return again if (run / CHECKPOINTS / LATEST).exists() else f"{again}: there is none yet, so from step 0"


def judge(
    folder: Path, processes: int, codes: Mapping[int, int] | None = None, run: Path | None = None
) -> TrainingResult:
    """What has become of a job whose processes have all ended.

    Parameters
    ----------
    folder : Path
        With their outcomes.
    processes : int
    codes : mapping of int to int, optional
        By rank, exit status (negative: signal) of those that ended by themselves or were killed from outside.
    run : Path, optional
        Whose checkpoints say what the same command would do.

    Raises
    ------
    UserError
        If a process found a mistake of the user's.
    Stopped
        If a process failed or died; a second call goes on from the last complete checkpoint. It names what made
        processes fail, not what followed from it in the others.
    """
    found = {rank: Outcome.read(folder, rank) for rank in range(processes)}
    results = {rank: outcome for rank, outcome in found.items() if outcome is not None}
    for outcome in results.values():
        if outcome.status == WRONG:
            raise Told(outcome.error)
    for rank, code in sorted((codes or {}).items()):
        if rank not in results:
            how = f"status {code}" if code >= 0 else signal.Signals(-code).name
            hint = ": was the machine out of memory?" if code == -signal.SIGKILL else ""
            raise Stopped(f"process {rank} died ({how}{hint})", what_next(run))
    failed = sorted((outcome.ended, rank) for rank, outcome in results.items() if outcome.status == CRASHED)
    for _, rank in failed:
        if results[rank].stopped:
            said = bool(results[rank].then)  # it says itself how to continue
            raise Stopped(f"process {rank}: {results[rank].stopped}", "" if said else what_next(run))
    for _, rank in failed:
        print(results[rank].error, file=sys.stderr)
        raise Stopped(f"process {rank} failed (above)", what_next(run))
    ends = [results[rank].result if rank in results else None for rank in range(processes)]
    for rank, end in enumerate(ends):
        if end is None:
            raise Stopped(f"process {rank} died", what_next(run))
    assert ends[0] is not None
    return ends[0]  # all processes stop at the same step


class Told(UserError):
    """A mistake that a process of the run has already put into words."""

    def __init__(self, line: str):
        Exception.__init__(self, line)
        self._line = printable(line)

    def line(self) -> str:
        return self._line

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self._line,)


def leave(status: int) -> NoReturn:
    """Exit at once: threads of gloo and wandb can abort an ordinary exit after all work is done."""
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.flush()
    remove_sockets()
    os._exit(status)


if __name__ == "__main__":
    with lasting_output():
        leave(main(Path(sys.argv[1])))
