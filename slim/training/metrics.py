"""What a run says about itself: metrics.jsonl, wandb, one progress line, and warnings when it goes wrong."""

from __future__ import annotations

import json
import resource
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

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
    """Largest memory so far: of the GPU's allocator, or of this process where there is no GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def spread_of(what: str, x_MC: Tensor | None) -> dict[str, float | None]:
    """`WHAT_std` and `WHAT_rank` of features: mean SD of a channel, effective rank of the first rows."""
    if x_MC is None:
        return {f"{what}_std": None, f"{what}_rank": None}
    return {f"{what}_std": float(x_MC.std(dim=0).mean()), f"{what}_rank": effective_rank(x_MC[:_RANK_ROWS])}


def averages(
    logs: list[dict[str, Tensor]], tokens: list[Tensor], device: torch.device, names: Sequence[str]
) -> tuple[dict[str, float | None], tuple[float, float]]:
    """Means of what the micro-batches of all processes logged, and sums of their tokens; every process calls it.

    Parameters
    ----------
    logs : list of dict of str to Tensor, ()
        Of this process; a micro-batch that lacks a name does not count for it.
    tokens : list of Tensor, (2,)
        Tokens kept, and tokens of brain.
    names : sequence of str
        Of the numbers to be averaged.

    Returns
    -------
    tuple
        The means by name, None where nobody logged; and both sums.
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
    """Writes a line per logged step; rank 0 only.

    Parameters
    ----------
    folder : Path
        The run.
    start_step : int
        Steps done before; lines behind it (of a run that was killed after its last checkpoint) are dropped.
    mode : "offline", "online" or "disabled"
        Of wandb.
    config : dict
        Shown in wandb.
    """

    def __init__(
        self, folder: Path, start_step: int, mode: Literal["offline", "online", "disabled"], config: dict[str, Any]
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
        """Close file and wandb run."""
        self._file.close()
        if self._tracking is not None:
            self._tracking.close()


def warnings_of(lines: list[MetricsLine]) -> list[Finding]:
    """What the last logged lines warn of, each kind once; empty while all is well or little is known.

    Parameters
    ----------
    lines : list of dict
        Lines of metrics.jsonl; the last 50 count.
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
                f"no gain over the mean of each place ({gain:+.3f} over {len(lines)} logged steps): nothing "
                "is learned yet; normal early on, a collapse if it stays",
            )
        )
    if rank is not None and rank < 5:
        found.append(
            bad(
                "rank",
                f"targets have an effective rank of {rank:.1f}: dimensional collapse; raise loss.sig or loss.mae",
            )
        )
    if wait is not None and wait > 0.5:
        found.append(look("data", f"{wait:.0%} of the time is spent waiting for data: raise run.workers"))
    return found


def read_metrics(path: Path) -> tuple[list[MetricsLine], int]:
    """Lines of a metrics file, and how many could not be read: a kill may cut the last one in two."""
    found, unreadable = read_log(path)
    lines = []
    for line in found:
        if _is_number(line.get("step")) and line["step"] is not None and all(map(_is_number, line.values())):
            lines.append({**line, "step": int(line["step"])})
    return lines, unreadable + len(found) - len(lines)


def number(line: MetricsLine, name: str) -> float:
    """A number that every line has, such as `step` or `seconds`."""
    value = line[name]
    assert value is not None, name
    return value


def _is_number(value: object) -> bool:
    """Whether a value is what `Monitor.log` writes: a number a float can hold, or none."""
    return value is None or type(value) is float or (type(value) is int and abs(value) < 2**63)
