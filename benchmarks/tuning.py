"""The tuner as units of a record: kernels with goals first, and the file written after each kernel.

python -m benchmarks.tuning     compiles what it will try, and all else that is launched, into Triton's cache
"""

from __future__ import annotations

import contextlib
import importlib
import os
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ept_kernels import launch
from ept_kernels.dev import aot, tune
from ept_kernels.dev.compile_only import TARGETS
from ept_kernels.dev.tunables import Tunable, tunables
from ept_kernels.library import launcher_of

from .record import ROOT, Row, Work

GOAL_SIZES = {"4096", str(4096 * 4096), str(14336 * 4096)}  # widths, and numbers of weights, of cases with a goal
# Kernels that take most of a training step, and those with few candidates, come first.
ORDER = ("rms_norm", "gated_activation", "rotary", "prompted_embedding", "dequantize_4bit", "joint_prompt")


def works_of(table: str, device: str) -> list[Work]:
    """Returns every tunable kernel as a unit, those with a goal first."""
    if device == "cuda":  # its product is one of the paths, available once it is loaded
        with contextlib.suppress(ImportError):
            importlib.import_module("bitsandbytes")
    found = sorted(tunables(table == "reduced", device), key=lambda tunable: (not has_goal(tunable), rank(tunable)))
    measure = rehearsed if table == "rehearsal" else tuned
    works = [Work(f"tune/{t.kernel} {t.key}", partial(measure, t, torch.device(device)), limit=90) for t in found]
    return works if device == "cuda" or table == "rehearsal" else []


def has_goal(tunable: Tunable) -> bool:
    """Checks whether there is a goal for the kernel at this size; two kernels have the same size in all models."""
    if "by_token" in tunable.kernel:
        return False
    return tunable.kernel.startswith(("rotary", "gated_activation")) or not GOAL_SIZES.isdisjoint(
        tunable.key.split("x")
    )


def rank(tunable: Tunable) -> int:
    """Returns the kernel's place in `ORDER`; products come last, then their paths."""
    places = [place for place, name in enumerate(ORDER) if tunable.kernel.startswith(name)]
    return places[0] if places else len(ORDER) + (".path" in tunable.kernel)


def tuned(tunable: Tunable, device: torch.device) -> Row:
    """Measures every candidate and writes the winner to this device's file, which later processes read."""
    device = torch.device(device.type, torch.accelerator.current_device_index())
    row = tune.tune(tunable, device)
    tune.write(launch.config_file(device), row, device, "python benchmarks/gpu_report.py")
    gained = f"{row['median_us']} µs, {row['default_us']} µs by the heuristic"
    says = f"{row['kernel']} {row['size']}: {gained}; {len(row['refused'])} of {row['tried']} refused"
    return {**row, "file": str(launch.config_file(device).relative_to(ROOT)), "summary": says}


def rehearsed(tunable: Tunable, device: torch.device) -> Row:
    """Compiles every candidate, and returns those that a device would refuse."""
    from triton.runtime.errors import TritonError

    launcher: Any = launcher_of(tunable.problem.operator)
    inputs, refused = tunable.problem.small.inputs(device), {}
    for config in tunable.candidates:
        configs = tunable.trying(config)
        with launch.configured(configs):
            try:
                launcher(*inputs)
            except TritonError as error:
                refused[str(configs[tunable.kernel])] = str(error).partition("\n")[0]
    return {"kernel": tunable.kernel, "size": tunable.key, "tried": len(tunable.candidates), "refused": refused}


def main() -> None:
    """Compiles for the GPU at hand, on half of the processors."""
    from triton import knobs

    target = "sm_{}{}".format(*torch.cuda.get_device_capability())
    if target not in TARGETS:
        raise SystemExit(f"{target} is not one of {', '.join(TARGETS)}: kernels are compiled when they are launched")
    began, jobs = time.monotonic(), max(1, (os.cpu_count() or 1) // 2)
    count = aot.fill(Path(knobs.cache.dir), target, only="", jobs=jobs)
    print(f"{count} kernels compiled ahead for {target} in {time.monotonic() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main()
