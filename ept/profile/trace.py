"""A step under torch's profiler: its Chrome trace, and the memory it allocates on a CPU."""

from __future__ import annotations

import itertools
import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity


def trace_step(step: Callable[[], None], file: Path, memory: bool = False) -> None:
    """Writes the Chrome trace of one `step`, for chrome://tracing or Perfetto; our operators are named `ept::...`."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
    with torch.profiler.profile(activities=activities, profile_memory=memory) as profiler:
        step()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    file.parent.mkdir(parents=True, exist_ok=True)
    profiler.export_chrome_trace(str(file))


def allocated_by(step: Callable[[], None], file: Path | None = None) -> int:
    """Returns the most bytes that `step` holds on the CPU at one time, above what was there before.

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
