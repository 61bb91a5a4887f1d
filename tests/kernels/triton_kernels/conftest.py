"""The Triton kernels against their references: on a GPU (`make gpu`), or on CPU tensors under Triton's interpreter
(`make test`). Which of the two is chosen when Triton is imported, so these tests run in a process of their own:
`TRITON_INTERPRET=1 pytest tests/kernels/triton_kernels`, or with `EPT_KERNELS=triton` on a GPU.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from ept_kernels import launch
from ept_kernels.launch import configured

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

if not INTERPRETED and not (os.environ.get("EPT_KERNELS") == "triton" and torch.cuda.is_available()):
    collect_ignore_glob = ["*.py"]


# Of the joint prompt, fewer and larger programs than are shipped: the interpreter's time goes by their number.
LARGE = {
    "joint_prompt_products": {"BLOCK_K": 512, "PROGRAMS": 2},
    "joint_prompt_rows": {"BLOCK_S": 32},
    "joint_prompt_sides": {"BLOCK_S": 32},
    "joint_prompt": {"BLOCK_S": 32, "BLOCK_D": 1024},
    "joint_prompt_backward": {"BLOCK_D": 2048},
}


@pytest.fixture
def large_blocks() -> Iterator[None]:
    with configured(LARGE):
        yield


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where the kernels run: the GPU, or the CPU under the interpreter."""
    return torch.device("cpu" if INTERPRETED else "cuda")


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fills whatever a launcher allocates with NaN, or an index far outside, until a kernel writes it."""
    new_empty = torch.Tensor.new_empty

    def poisoned_new_empty(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        x = new_empty(self, *args, **kwargs)
        return x.fill_(float("nan") if x.is_floating_point() else torch.iinfo(x.dtype).max // 2)

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned_new_empty)


def launches_of(function: Callable[..., Any], *arguments: Any) -> int:
    """Calls `function` and counts the kernels that it launches."""
    before = launch.launches()
    function(*arguments)
    return launch.launches() - before


def mostly_untouched(elements: int, dtype: torch.dtype) -> torch.Tensor:
    """Reserves zeros in memory that takes no space until it is written."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
    try:
        memory = mmap.mmap(-1, elements * dtype.itemsize, flags=flags)
    except (OSError, ValueError) as error:
        pytest.skip(f"no address space for {elements} elements: {error}")
    return torch.frombuffer(memory, dtype=dtype)


def rounding(actual: torch.Tensor, exact: torch.Tensor) -> torch.Tensor | float:
    """Bounds the rounding to 16 bits: half a unit; for bfloat16 under the interpreter, which truncates, a whole one."""
    if actual.dtype == torch.float32:
        return 0.0
    limits, units = torch.finfo(actual.dtype), 1 if INTERPRETED and actual.dtype == torch.bfloat16 else 0.5
    return units * limits.eps * exact.abs() + limits.smallest_normal
