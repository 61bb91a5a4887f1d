"""A step under torch's profiler: its Chrome trace, its time by kind of work, and the memory it allocates on a CPU."""

from __future__ import annotations

import itertools
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, record_function

from .kinds import DEQUANTISATION, KINDS, LAUNCHES, kind_of

_STEP = "training step"


def trace_step(step: Callable[[], None], file: Path, memory: bool = False) -> None:
    """Writes the Chrome trace of one `step`, for chrome://tracing or Perfetto; our operators are named `ept::...`."""
    file.parent.mkdir(parents=True, exist_ok=True)
    _profiled(step, memory).export_chrome_trace(str(file))


def shares_by_kind(step: Callable[[], None]) -> dict[str, float]:
    """Returns the fraction of the time of one `step` that each kind of work takes; they add up to 1.

    This is the time of kernels on a GPU, and of operators on a CPU; `launches` is the rest.
    """
    return shares_of(list(_profiled(step).events()), torch.cuda.is_available())


def shares_of(events: list[Any], on_gpu: bool) -> dict[str, float]:
    """Divides the profiled step among kinds of work, from `events` of torch's profiler."""
    on_cpu = [event for event in events if event.device_type == DeviceType.CPU]
    (step,) = (event for event in on_cpu if event.name == _STEP)
    times = dict.fromkeys(KINDS, 0.0)
    for event in on_cpu:
        if on_gpu:
            for kernel in event.kernels:
                is_dequantisation = "dequantize" in kernel.name.lower()
                times[DEQUANTISATION if is_dequantisation else kind_of(_operator(event))] += kernel.duration
        elif "::" in event.name and not event.name.startswith("autograd::"):
            times[kind_of(_operator(event))] += event.self_cpu_time_total
    total = max(step.cpu_time_total, sum(times.values()))
    return {**{kind: time / total for kind, time in times.items()}, LAUNCHES: 1 - sum(times.values()) / total}


def _operator(event: Any) -> str:
    """Returns the operator that `event` belongs to: the outermost one of a library or of an attention, else its
    own.
    """
    name, outer = event.name, event
    while outer is not None:
        if outer.name.startswith(("ept::", "bitsandbytes::")) or "attention" in outer.name:
            name = outer.name
        outer = outer.cpu_parent
    return name


def _profiled(step: Callable[[], None], memory: bool = False) -> torch.profiler.profile:
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
    with torch.profiler.profile(activities=activities, profile_memory=memory) as profiler, record_function(_STEP):
        step()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    return profiler


def allocated_by(step: Callable[[], None], file: Path | None = None) -> int:
    """Returns the maximum bytes that `step` holds on the CPU at one time, in addition to those from before.

    Args:
        file: keeps the Chrome trace.
    """
    with tempfile.TemporaryDirectory() as folder:
        trace = file or Path(folder) / "trace.json"
        trace_step(step, trace, memory=True)
        events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    changes = [(event["ts"], event["args"]["Bytes"]) for event in events if event.get("name") == "[memory]"]
    in_use = itertools.accumulate(change for _, change in sorted(changes, key=lambda change: change[0]))
    if (peak := max(in_use, default=0)) <= 0:
        raise RuntimeError("torch's profiler reported no allocation of the step")
    return peak
