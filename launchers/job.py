"""The entry point of every process of a run.

    python -m launchers.job RUN/config.yaml

The launcher sets RANK, LOCAL_RANK and WORLD_SIZE; SLIM_STORE, a file by which the processes connect on one machine, or
MASTER_ADDR and MASTER_PORT on a cluster; and OUTCOME, a folder to which each process writes how it ended. The launcher
reads these files rather than exit statuses, because a library may abort a process at exit after its work is done.
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
from dataclasses import replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from launchers.outcome import Outcome
from shards.core.cli import CRASHED, DONE, RESUME, STOPPING, WRONG, crashed, lasting_output, show_log
from shards.core.errors import ConfigError, DatasetError, Stopped, UserError, is_full
from shards.core.files import printable
from shards.core.workers import remove_sockets
from shards.format.reader import away
from slim.checkpoints.run_folder import CHECKPOINTS, CONFIG, LATEST
from slim.training.result import TrainingResult

if TYPE_CHECKING:
    import torch

    from slim.config import TrainSettings
    from slim.training.callbacks import Callback
    from slim.training.task import TrainingTask

logger = logging.getLogger("slim.job")  # what `slim` logs is printed

CALLBACKS = "SLIM_CALLBACKS"  # variable that names functions of users, see `slim.training.callbacks`
STORE = "SLIM_STORE"  # variable that names the file by which the processes of one machine connect
_LAST = 600.0  # seconds to finish a step and save after the launcher has died
# By default glibc returns freed memory to the system and requests it again thousands of times per step. Keeping it made
# a CPU step of the published geometry 14 times faster on a virtual machine with slow page faults (batch 4).
KEEP_FREED = {"MALLOC_TRIM_THRESHOLD_": str(2**33), "MALLOC_MMAP_THRESHOLD_": str(2**32)}


def prepare(on_gpu: bool) -> None:
    """Set the environment of DeepSpeed before it is imported: few messages, and no compiler needed on the CPU.

    DeepSpeed would use a GPU if there is one, also with `run.device=cpu`.
    """
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "ERROR")
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning, module="torch.distributed")
    if not on_gpu:
        os.environ["DS_ACCELERATOR"] = "cpu"
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    import deepspeed.ops

    if not on_gpu:
        # Otherwise `initialize` compiles a shared-memory backend with g++ and ninja, which gloo does not use.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def work(config: Path) -> TrainingResult:
    """Train with the merged configuration, in the process group that the environment describes."""
    import torch
    import torch.distributed as dist

    from slim.checkpoints import lock
    from slim.config import load_run

    settings = load_run(config)
    if os.environ["RANK"] == "0":
        lock.take(config.parent)
    gpus = torch.cuda.device_count()
    if settings.run.device == "cuda" and not gpus:
        hint = "Check the driver and CUDA_VISIBLE_DEVICES"
        expected = "auto or cpu, or a machine with a GPU"
        raise ConfigError(config, "run.device", "cuda, but no GPU is available", expected, hint)
    on_gpu = settings.run.device != "cpu" and gpus > 0
    prepare(on_gpu)
    import deepspeed

    from launchers.run_probe import RunProbe
    from slim.training import callbacks
    from slim.training.trainer import Trainer

    with while_away(settings):
        task = open_task(settings)
    device = torch.device("cpu")
    if on_gpu:
        local = int(os.environ["LOCAL_RANK"])
        if local >= gpus:
            raise ConfigError(config, "run.processes", f"more than the {gpus} GPUs available", "one process per GPU")
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
    choose_chunk(task, device, config.parent)
    probing = [RunProbe(settings, device)] if settings.run.probe is not None and rank == 0 else []
    usual = callbacks.usual(task.name, settings, device, rank, flops_counter(task))
    result = Trainer(task, device, (*own_callbacks(), *usual, *probing)).run()
    dist.barrier()
    dist.destroy_process_group()  # not after a failure: other processes may be inside a collective operation
    for one in probing:  # the others need not wait for the last probe
        one.complete()
        result = replace(result, warnings=[*result.warnings, *one.failed])
    return result


def open_task(settings: TrainSettings) -> TrainingTask:
    """Open the data and make the task of a run; see `slim.training.task.TrainingTask`."""
    from slim.config import FinetuneSettings, PretrainSettings
    from slim.finetune.task import FinetuneTask
    from slim.pretrain.task import PretrainTask

    if isinstance(settings, FinetuneSettings):
        return FinetuneTask(settings)
    assert isinstance(settings, PretrainSettings)
    return PretrainTask(settings)


def choose_chunk(task: TrainingTask, device: torch.device, run: Path) -> None:
    """Replace `chunk_tokens: auto` in the settings of a task. Rank 0 chooses, and adds it to the run's provenance."""
    from slim.checkpoints import exchange
    from slim.checkpoints.provenance import Provenance
    from slim.config import AUTO
    from slim.planning import chunks

    settings = task.settings
    if settings.chunk_tokens != AUTO:
        return
    allowed = min(exchange.gather(chunks.allowed_bytes(device, settings.run.processes)))
    tokens = None
    if os.environ["RANK"] == "0":
        choice = chunks.choose(settings, task.datasets, allowed, device.type == "cuda")
        logger.info("%s", choice)
        before, tokens = Provenance.read(run), choice.chunk_tokens
        chosen = {**before.chosen, "chunk_tokens": tokens}
        before.model_copy(update={"chosen": chosen}).write(run)
    task.settings = settings.model_copy(update={"chunk_tokens": exchange.broadcast(tokens)})


def flops_counter(task: TrainingTask) -> Callable[[], float] | None:
    """A function that returns the FLOPs of a step per token of brain; None for fine-tuning, which is not counted."""
    from slim.planning.forecast import flops_per_token
    from slim.pretrain.task import PretrainTask

    if not isinstance(task, PretrainTask):
        return None
    return partial(flops_per_token, task.settings, task.datasets[0])


def own_callbacks() -> list[Callback]:
    """Make the callbacks of the user, from the functions named in SLIM_CALLBACKS.

    They are named in the environment, not in the configuration: the config.yaml of a run received from others must not
    be able to run code.

    Raises
    ------
    ConfigError
        If a function cannot be imported, or does not return a callback.
    """
    from slim.training.callbacks import Callback

    made = []
    for name in filter(None, os.environ.get(CALLBACKS, "").split(",")):
        module, _, function = name.strip().partition(":")
        try:
            callback = getattr(import_module(module), function)()
        except (ImportError, AttributeError, TypeError, ValueError) as error:
            expected = "module:function, an importable function that returns a Callback"
            raise ConfigError("environment", CALLBACKS, f"{name} ({error})", expected) from None
        if not isinstance(callback, Callback):
            raise ConfigError(
                "environment", CALLBACKS, f"{name}, which returns a {type(callback).__name__}", "a Callback"
            )
        made.append(callback)
    return made


@contextmanager
def while_away(settings: TrainSettings) -> Iterator[None]:
    """Turn a `DatasetError` into Stopped if a dataset cannot be reached at present, for example on a lost mount."""
    try:
        yield
    except DatasetError:
        for data in settings.data:
            if (why := away(data.path)) is not None:
                raise Stopped(why, "give the same command again when it is back") from None
        raise


def stop_with_parent() -> None:
    """Stop this process, as a signal would, when the launcher has died.

    It exits at once if no signal handler is set yet, and after a time limit if it does not stop by itself.
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
    """Train, and write the outcome for the launcher."""
    # Signals that arrive before the trainer has set its handlers are delivered then.
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
    """What the same command would do after a failure, from the checkpoints and the configuration of the run."""
    from slim.config import load_run

    again = "the same command continues from the last complete checkpoint"
    if run is None:
        return again
    with suppress(UserError):
        if load_run(run / CONFIG).run.resume == "never":
            again = f"with run.resume=auto {again}"
    return again if (run / CHECKPOINTS / LATEST).exists() else f"{again}; as there is none yet, from step 0"


def judge(
    folder: Path, processes: int, codes: Mapping[int, int] | None = None, run: Path | None = None
) -> TrainingResult:
    """Determine how a job ended, after all its processes have ended.

    Parameters
    ----------
    folder : Path
        Folder of the outcomes.
    processes : int
    codes : mapping of int to int, optional
        By rank, exit status (negative: signal) of the processes that the launcher did not kill.
    run : Path, optional
        Folder of the run. Its checkpoints determine what the same command would do.

    Raises
    ------
    UserError
        If a process found a mistake of the user.
    Stopped
        If a process failed or died. It names the process that failed first, not the failures that followed.
    """
    found = {rank: Outcome.read(folder, rank) for rank in range(processes)}
    results = {rank: outcome for rank, outcome in found.items() if outcome is not None}
    for outcome in results.values():
        if outcome.status == WRONG:
            raise Told(outcome.error)
    for rank, code in sorted((codes or {}).items()):
        if rank not in results:
            how = f"status {code}" if code >= 0 else signal.Signals(-code).name
            hint = ", perhaps because the machine ran out of memory" if code == -signal.SIGKILL else ""
            raise Stopped(f"process {rank} died ({how}{hint})", what_next(run))
    failed = sorted((outcome.ended, rank) for rank, outcome in results.items() if outcome.status == CRASHED)
    for _, rank in failed:
        if results[rank].stopped:
            has_advice = bool(results[rank].then)  # the text already says what to do
            raise Stopped(f"process {rank}: {results[rank].stopped}", "" if has_advice else what_next(run))
    for _, rank in failed:
        print(results[rank].error, file=sys.stderr)
        raise Stopped(f"process {rank} failed with the error above", what_next(run))
    ends = [results[rank].result if rank in results else None for rank in range(processes)]
    for rank, end in enumerate(ends):
        if end is None:
            raise Stopped(f"process {rank} died", what_next(run))
    assert ends[0] is not None
    return ends[0]  # all processes stop at the same step


class Told(UserError):
    """A mistake of the user that another process found; it holds that process's message."""

    def __init__(self, line: str):
        Exception.__init__(self, line)
        self._line = printable(line)

    def line(self) -> str:
        return self._line

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self._line,)


def leave(status: int) -> NoReturn:
    """Exit without clean-up: threads of gloo and wandb can abort a normal exit after all work is done."""
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.flush()
    remove_sockets()
    os._exit(status)


if __name__ == "__main__":
    show_log()
    with lasting_output():
        leave(main(Path(sys.argv[1])))
