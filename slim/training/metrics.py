"""Metrics of a run: averages over processes, metrics.jsonl and wandb, and warnings of collapse or slow data."""

from __future__ import annotations

import json
import math
import resource
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from shards.core.files import read_log, write_atomically
from shards.core.findings import Finding, bad, look
from slim.checkpoints.run_folder import METRICS
from slim.training.tracking import Tracking

MetricsLine = dict[str, float | None]  # a line of metrics.jsonl: numbers by name; `step` is always there
RECENT = 50  # logged steps a warning looks back on
_RANK_ROWS = 2048  # rows of the matrix whose effective rank is logged


def effective_rank(x_MC: Tensor) -> float:
    """Exponential of the entropy of the eigenvalue shares of the covariance (after Roy & Vetterli, EUSIPCO 2007)."""
    x_MC = x_MC.double() - x_MC.double().mean(dim=0)
    share = torch.linalg.eigvalsh(x_MC.T @ x_MC).clamp_min(0)
    total = share.sum()
    if total <= 0:
        return 0.0
    share = share[share > 0] / total
    return float(torch.exp(-(share * share.log()).sum()))


def peak_memory_bytes(device: torch.device) -> int:
    """Peak memory so far: of the GPU's allocator or, without a GPU, of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def spread_of(what: str, x_MC: Tensor | None) -> dict[str, float | None]:
    """`WHAT_std` and `WHAT_rank` of features: the mean SD over channels, and the effective rank of the first rows."""
    if x_MC is None:
        return {f"{what}_std": None, f"{what}_rank": None}
    return {f"{what}_std": float(x_MC.std(dim=0).mean()), f"{what}_rank": effective_rank(x_MC[:_RANK_ROWS])}


def averages(
    logs: list[dict[str, Tensor]], tokens: list[Tensor], device: torch.device, names: Sequence[str]
) -> tuple[dict[str, float | None], tuple[float, float]]:
    """Average logged numbers over the micro-batches of all processes, and sum their tokens. All processes must call it.

    Parameters
    ----------
    logs : list of dict of str to Tensor, ()
        One dict for each micro-batch of this process. A micro-batch without a name is left out of that mean.
    tokens : list of Tensor, (2,)
        Tokens kept and tokens of brain of each micro-batch.
    names : sequence of str
        Names of the numbers to average.

    Returns
    -------
    tuple
        The means by name, None where no process logged the name; and both sums of tokens.
    """
    zero = torch.zeros((), device=device)
    values = torch.stack([torch.stack([log.get(name, zero) for log in logs]).sum() for name in names])
    counts = torch.tensor([sum(name in log for log in logs) for name in names], device=device)
    reduced = torch.cat([values.float(), counts.float(), torch.stack(tokens).sum(dim=0).to(device, torch.float32)])
    if dist.get_world_size() > 1:
        dist.all_reduce(reduced)
    *numbers, kept, brain = reduced.tolist()
    sums, counted = numbers[: len(names)], numbers[len(names) :]
    mean = {name: sums[i] / counted[i] if counted[i] else None for i, name in enumerate(names)}
    return mean, (kept, brain)


class Monitor:
    """Writes one line per logged step; rank 0 only.

    Parameters
    ----------
    folder : Path
        Folder of the run.
    start_step : int
        Steps already done. Later lines, left by a run that was killed after its last checkpoint, are removed.
    mode : "offline", "online" or "disabled"
        Mode of wandb.
    config : dict
        Configuration shown in wandb.
    """

    def __init__(
        self,
        folder: Path,
        start_step: int,
        mode: Literal["offline", "online", "disabled"],
        config: Mapping[str, object],
    ):
        self.path = folder / METRICS
        self.recent: deque[MetricsLine] = deque(maxlen=RECENT)
        if self.path.exists():
            lines = [line for line in read_metrics(self.path)[0] if number(line, "step") <= start_step]
            write_atomically(self.path, "".join(json.dumps(line) + "\n" for line in lines))
            self.recent.extend(lines[-RECENT:])
        self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 - open as long as the run
        self._tracking = None if mode == "disabled" else Tracking(folder, mode, config)

    def log(self, line: MetricsLine) -> None:
        """Write one step."""
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        self.recent.append(line)
        if self._tracking is not None:
            self._tracking.log(line)

    def warnings(self) -> list[Finding]:
        """See `warnings_of`, on the most recent lines."""
        return warnings_of(list(self.recent))

    def close(self) -> None:
        """Close the file and the wandb run."""
        self._file.close()
        if self._tracking is not None:
            self._tracking.close()


def warnings_of(lines: list[MetricsLine]) -> list[Finding]:
    """Warnings from the last logged lines, at most one of each kind; empty after too few lines to judge.

    Parameters
    ----------
    lines : list of dict
        Lines of metrics.jsonl, of which the last 50 are used.
    """
    lines = lines[-RECENT:]
    if len(lines) < 10:
        return []

    def mean(name: str) -> float | None:
        values = [value for line in lines if (value := line.get(name)) is not None]
        return sum(values) / len(values) if values else None

    found = []
    gain, rank, wait = mean("gain"), mean("target_rank"), mean("data_wait")
    if gain is not None and gain <= 0:
        found.append(
            bad(
                "gain",
                f"no gain over predicting the mean of each place ({gain:+.3f} over {len(lines)} logged steps): "
                "normal early in training; if it stays so, the model has collapsed",
            )
        )
    if rank is not None and rank < 5:
        found.append(
            bad(
                "rank",
                f"dimensional collapse: the effective rank of the targets is {rank:.1f}; raise loss.sig or loss.mae",
            )
        )
    if wait is not None and wait > 0.5:
        found.append(look("data", f"training waits for data {wait:.0%} of the time: raise run.workers"))
    return found


def read_metrics(path: Path) -> tuple[list[MetricsLine], int]:
    """Lines of a metrics file, and the number of unreadable lines. A killed run may leave an incomplete last line."""
    found, unreadable = read_log(path)
    lines = []
    for line in found:
        step = line.get("step")
        if isinstance(step, int | float) and math.isfinite(step) and all(map(_is_number, line.values())):
            lines.append({**line, "step": int(step)})
    return lines, unreadable + len(found) - len(lines)


def number(line: MetricsLine, name: str) -> float:
    """A number that every line has, such as `step` or `seconds`."""
    value = line[name]
    assert value is not None, name
    return value


def _is_number(value: object) -> bool:
    """Whether `Monitor.log` can have written a value: None, or a number in the range of a float."""
    return value is None or type(value) is float or (type(value) is int and abs(value) < 2**63)
