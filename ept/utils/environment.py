"""The environment of a measurement: versions of the libraries, and the machine."""

from __future__ import annotations

import os
import platform
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from ..version import __version__

CUDA_ALLOCATED = "cuda allocated"
PACKAGES = ("torch", "triton", "transformers", "peft", "accelerate", "bitsandbytes", "datasets", "safetensors")


def versions() -> dict[str, str | None]:
    """Lists the versions of Python, of ept and of the libraries; None for one that is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version(), "ept": __version__}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found


def hardware() -> dict[str, Any]:
    """Describes the machine: processor, cores, and GPUs with their memory in bytes."""
    import torch

    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines() if cpuinfo.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    gpus = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return {
        "platform": platform.platform(),
        "processor": models[0] if models else platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpus": [{"name": gpu.name, "memory_bytes": gpu.total_memory} for gpu in gpus],
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
    }


def peak_memory() -> tuple[int, str]:
    """Returns the maximum memory in use so far, in bytes, and its kind: `cuda allocated`, or that of the whole process
    since it began.
    """
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated(), CUDA_ALLOCATED
    import resource

    unit = 1 if sys.platform == "darwin" else 1024  # Linux counts in KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit, "process resident, since it began"
