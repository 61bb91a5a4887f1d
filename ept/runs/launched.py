"""What a launcher (`torchrun`, `accelerate launch`) has told this process, through its environment."""

from __future__ import annotations

import os
from typing import TypeVar

E = TypeVar("E", bound=BaseException)


def count() -> int:
    """How many processes have been started, on all machines."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def several() -> bool:
    """Whether more than one process has been started."""
    return count() > 1


def process_index() -> int:
    """The number of this process, from 0."""
    return int(os.environ.get("RANK", "0"))


def local_index() -> int:
    """The number of this process on its machine, and of its accelerator."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def is_main() -> bool:
    """Whether this is the process that prints and writes."""
    return process_index() == 0


def is_on(variable: str) -> bool:
    return os.environ.get(variable, "").lower() in ("1", "true", "yes")


def cpu_is_asked_for() -> bool:
    """Whether `accelerate launch --cpu` has started this process."""
    return is_on("ACCELERATE_USE_CPU")


def was_started_alone() -> bool:
    """Whether `accelerate launch --cpu --num_processes N` has started this process: N times only under mpirun."""
    return cpu_is_asked_for() and "MASTER_ADDR" in os.environ and "WORLD_SIZE" not in os.environ


def started_alike(words: str) -> str:
    """What to type for `ept` with these words in as many processes as now."""
    if not several():
        return f"`ept {words}`"
    if os.environ.get("LOCAL_WORLD_SIZE") != str(count()):
        return f"the same launch with `-m ept {words}`"
    return f"`torchrun --nproc-per-node {count()} -m ept {words}`"


def mark_told(error: E) -> E:
    """Marks another process's error, which that process shows."""
    error._ept_told = True  # type: ignore[attr-defined]
    return error


def was_told(error: BaseException) -> bool:
    return getattr(error, "_ept_told", False)
