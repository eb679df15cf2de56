"""Estimate memory, time and disk space of a pretraining before you run it.

    slim-brain plan CONFIG.yaml [--gpu-memory 80GB] [--tflops N] [--peak-tflops H100] [--json] [key=value ...]

No GPU is needed. If the dataset of the configuration does not exist yet, the MNI152 mask is used as the brain.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from pydantic import ByteSize, TypeAdapter, ValidationError
from rich import box
from rich.console import Console
from rich.table import Table

from shards.core.cli import DONE, Parser, call_of
from shards.core.errors import ConfigError
from shards.core.presets import find
from shards.core.settings import read_yaml
from slim.config import load_config

if TYPE_CHECKING:
    from slim.planning.forecast import Forecast

PARTS = {
    "states": "weights, moments, EMA target, running means",
    "master copy": "weights that AdamW updates",
    "gathered": "weights of other processes, while in use",
    "gradients": "from the backward pass, and those of this process",
    "flat gradients": "a copy, to be reduced or for AdamW",
    "bucket": "gradients on their way to other processes",
    "optimizer": "copies that AdamW makes",
    "batch": "voxels, and which tokens are where",
    "targets": "features of the EMA target",
    "encoder": "activations",
    "predictor": "activations, including those of the losses",
    "backward": "gradients of activations, recomputed layers",
    "means": "copies for running means and EMA",
}


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser("plan", __doc__.splitlines()[0], "configs/pretrain/published.yaml --gpu-memory 24GB")
    parser.add_argument("config", metavar="CONFIG.yaml")
    parser.add_settings("settings of the pretraining; run.processes: GPUs of the whole job")
    parser.add_argument(
        "--gpu-memory", metavar="SIZE", help="memory of a GPU: 80GB (80e9 bytes) or 40960MiB; default: the GPU here"
    )
    parser.add_argument(
        "--tflops", type=float, metavar="N", help="TFLOP/s that a GPU sustains; the result names the default"
    )
    parser.add_argument(
        "--peak-tflops",
        metavar="N|GPU",
        help="peak TFLOP/s of a GPU in bf16, or its name, such as H100; default: the GPU here, else --tflops",
    )
    parser.add_argument("--call-us", type=float, metavar="US", default=7.5, help="microseconds of a call (default 7.5)")
    parser.add_argument(
        "--load-ms", type=float, metavar="MS", default=45, help="CPU milliseconds of loading a sample (default 45)"
    )
    args = parser.parse_args(argv)
    for option in ("tflops", "call_us", "load_ms"):
        value = getattr(args, option)
        if value is not None and not 0 < value < float("inf"):
            raise ConfigError("command line", f"--{option.replace('_', '-')}", f"{value:g}", "a number above 0")

    from shards.format.layout import read_manifest

    typed = any(word.partition("=")[0] == "data" for word in args.settings)
    config = find("pretrain", args.config, "CONFIG")
    absent = [] if typed or "data" in read_yaml(config) else ["data=DATASET"]
    settings = load_config(config, [*args.settings, *absent])
    for item in settings.data if typed else ():
        read_manifest(item.path)
    memory = size(args.gpu_memory)

    from slim.planning.forecast import forecast, present

    speeds = {"peak_tflops": peak(args.peak_tflops), "call_us": args.call_us, "load_ms": args.load_ms}
    facts = forecast(settings, present(settings, typed), memory, args.tflops, begun, **speeds)
    show(facts)
    print(f"next: {following(facts, [args.config, *args.settings])}")
    if args.json:
        print(json.dumps(asdict(facts)))
    return DONE


def begun(what: str) -> None:
    print(f"{what} ...", file=sys.stderr, flush=True)


def size(text: str | None) -> int | None:
    """Bytes of GPU memory. The default is the visible GPU; None without one."""
    if text is None:
        import torch

        return torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else None
    try:
        memory = int(TypeAdapter(ByteSize).validate_python(text))
    except ValidationError:
        memory = 0
    if memory <= 0:
        raise ConfigError("command line", "--gpu-memory", text, "a size such as 80GB or 40960MiB")
    return memory


def peak(text: str | None) -> float | None:
    """Peak TFLOP/s in bf16: a number, or that of a GPU by its name. By default of the visible GPU; None without one."""
    from slim.training.mfu import peak_flops

    if text is None:
        import torch

        known = peak_flops(torch.cuda.get_device_name(0), "bf16") if torch.cuda.is_available() else None
        return None if known is None else known / 1e12
    try:
        value = float(text)
    except ValueError:
        value = (peak_flops(text, "bf16") or 0) / 1e12
    if not 0 < value < float("inf"):
        raise ConfigError(
            "command line", "--peak-tflops", text, "a number above 0, or a GPU such as H100, A100 or L40S"
        )
    return value


def show(facts: Forecast) -> None:
    """Two tables: the memory of a step, and everything else."""
    console = Console(highlight=False)
    counted = " and ".join(map(str, facts.counted_batches))
    processes = f"{facts.processes} GPU{'s' * (facts.processes > 1)}"
    batch = f"run.batch {facts.batch} x {facts.accumulate}"
    console.print(f"model {facts.model}, {facts.precision}, {batch}, {processes}, zero.stage {facts.zero_stage}")

    peak = facts.peak_memory_bytes
    name, unit, digits = ("GiB", 2**30, 2) if peak >= 2**30 else ("MiB", 2**20, 1)
    parts = Table("memory per GPU", name, "", box=box.SIMPLE_HEAD)
    parts.columns[1].justify = "right"
    large = {part: size for part, size in facts.memory_parts.items() if size >= peak / 200}
    for part, size in sorted(large.items(), key=lambda item: -item[1]):
        parts.add_row(part, f"{size / unit:.{digits}f}", PARTS[part])
    if rest := peak - sum(large.values()):
        parts.add_row("others", f"{rest / unit:.{digits}f}")
    parts.add_section()
    how = "counted" if facts.batch in facts.counted_batches else f"extrapolated from run.batch {counted}"
    parts.add_row("peak", f"{peak / unit:.{digits}f}", how)
    console.print(parts)

    unknown = "unknown without the data or run.steps"
    rows = {"not counted": facts.left_out}
    if facts.gpu_memory_bytes is None:
        rows["largest run.batch"] = "unknown without --gpu-memory"
    else:
        given = ByteSize(facts.gpu_memory_bytes).human_readable(separator=" ")
        rows["fits"] = f"{'yes' if facts.fits else 'no'}, in {given}"
        most = facts.largest_batch
        how = "counted" if most in facts.counted_batches else f"extrapolated from {counted}"
        rows["largest run.batch"] = f"{most} ({how})" if most else f"none: not even {facts.counted_batches[0]}"
    rows["brain"] = facts.basis
    rows["parameters"] = ", ".join(f"{name} {value / 1e6:.2f} M" for name, value in facts.parameters.items())
    rows["tokens of a sample"] = ", ".join(f"{name} {number(value)}" for name, value in facts.tokens.items())
    flops = facts.step_flops
    rows["FLOPs of a step"] = (
        f"{flops / 1e12:.3g} TFLOP per GPU" if flops >= 1e11 else f"{flops / 1e9:.3g} GFLOP per GPU"
    )
    rows["steps"] = number(facts.steps) if facts.steps else unknown
    speed = f"{facts.tflops:g} TFLOP/s"
    speed += " (assumed; --tflops N)" if facts.tflops_assumed else ""
    # Small kernels and data loading take time, too, which has to be measured on the GPU that is used.
    rows["time"] = unknown if facts.hours is None else f"{hours(facts.hours)} of arithmetic alone at {speed}"
    rows["chunks"] = "none" if facts.chunk_tokens is None else f"{number(facts.chunk_tokens)} tokens"
    if facts.chunk_chosen:
        rows["chunks"] += " (auto)" if facts.gpu_memory_bytes else " (auto; the memory of the GPU is not known)"
    rows["calls of a step"] = f"{number(facts.step_calls)} per GPU"
    rates = facts.rates
    rows["samples/s, at most"] = f"{rates.samples_per_s:.1f}, limited by {rates.binds}"
    rows["  by arithmetic"] = f"{rates.arithmetic:.1f} at a peak of {rates.peak_tflops:g} TFLOP/s"
    rows["  by launches"] = f"{rates.launches:.1f} at {rates.call_us:g} µs a call"
    rows["  by loading"] = f"{rates.loading:.1f} at {rates.load_ms:g} ms a sample in each loading process"
    kept = facts.checkpoints_kept
    rows["checkpoints"] = f"{disk(facts.checkpoint_bytes)} each, {disk(kept * facts.checkpoint_bytes)} for {kept}"
    rows["shards"] = "unknown without the data; 32 windows at 2 mm took 50 to 70 MB a session"
    total, sessions = facts.shards_bytes, facts.sessions
    if total is not None and sessions:
        rows["shards"] = f"{disk(total)}, {disk(total / sessions)} for each of {number(sessions)} sessions"
    table = Table(show_header=False, box=None)
    for name, text in rows.items():
        table.add_row(name, text)
    console.print(table)


def number(value: int) -> str:
    """`12 345`."""
    return f"{value:,}".replace(",", " ")


def hours(value: float) -> str:
    """A duration as text: `45 min`, `3.2 h`, `5.1 days`."""
    if value < 1 / 60:
        return "less than a minute"
    if value < 1:
        return f"{60 * value:.0f} min"
    return f"{value:.1f} h" if value < 48 else f"{value / 24:.1f} days"


def disk(value: float) -> str:
    """Bytes in decimal units: `1.2 GB`."""
    return ByteSize(value).human_readable(decimal=True, separator=" ")


def following(facts: Forecast, words: list[str]) -> str:
    """What to do next."""
    if facts.fits is False:
        most = facts.largest_batch
        return f"run.batch={most}" if most else "a smaller chunk_tokens or model, or more processes at zero.stage=3"
    return call_of("pretrain", *words, *([] if facts.sessions else ["data=DATASET"]))
