"""The Triton kernels against their references: on a GPU (`make gpu`), or on CPU tensors under Triton's interpreter
(`make test`). Which of the two is chosen when Triton is imported, so these tests run in a process of their own:
`TRITON_INTERPRET=1 pytest tests/kernels/triton_kernels`, or with `EPT_KERNELS=triton` on a GPU.

`pytest tests/kernels/triton_kernels --compile-only sm_90` drives them all as on such a GPU, without having one:
see `ept_kernels.dev.compile_only`.
"""

from __future__ import annotations

import mmap
import os
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import layer_checks
import numpy as np
import pytest
import torch

from ept_kernels import launch
from ept_kernels.dev import compile_only
from ept_kernels.launch import configured

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
ON_GPU = not INTERPRETED and os.environ.get("EPT_KERNELS") == "triton" and torch.cuda.is_available()

if INTERPRETED:
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    _splat = InterpreterBuilder.create_splat

    def _splat_of_bool(builder: Any, shape: Any, handle: Any) -> Any:
        """Triton 3.9 refuses masks that are no booleans, and makes integers of a compared scalar as it spreads it."""
        made = _splat(builder, shape, handle)
        return TensorHandle(made.data.astype(bool), made.dtype) if handle.data.dtype == bool else made

    InterpreterBuilder.create_splat = _splat_of_bool
    # As on a GPU, the larger or smaller of NaN and a number is the number; before Triton 3.9 it is NaN here.
    InterpreterBuilder.create_maxnumf = lambda self, a, b: self.binary_op(a, b, np.fmax)
    InterpreterBuilder.create_minnumf = lambda self, a, b: self.binary_op(a, b, np.fmin)


def pytest_addoption(parser: pytest.Parser) -> None:
    text = "compile what a GPU such as sm_90 would run, on CPU tensors, in place of running it; values are not compared"
    parser.addoption("--compile-only", metavar="TARGET", help=text)


def pytest_configure(config: pytest.Config) -> None:
    if target := config.getoption("--compile-only", None):
        compile_only.activate(target)
        for module, name in ((torch.testing, "assert_close"), (layer_checks, "assert_same")):
            setattr(module, name, lambda *values, **options: None)


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    is_here = collection_path.suffix == ".py" and collection_path.parent == Path(__file__).parent
    return True if is_here and not (INTERPRETED or ON_GPU or compile_only.active()) else None


def pytest_pycollect_makemodule(module_path: Path) -> None:
    """Leaves out the assertions, as `python -O` does, where nothing has computed what they are about: then a test is
    there for what it launches.
    """
    if compile_only.active() and module_path.parent == Path(__file__).parent:
        module = types.ModuleType(module_path.stem)
        module.__file__ = str(module_path)
        sys.modules[module.__name__] = module  # where pytest will look for it
        try:
            exec(compile(module_path.read_text(encoding="utf-8"), module_path, "exec", optimize=1), module.__dict__)
        except (Exception, pytest.skip.Exception):  # pytest meets it again, as that module's own
            del sys.modules[module.__name__]


# Of the joint prompt, fewer and larger programs than are shipped: the interpreter's time goes by their number. They are
# for it alone: no GPU has the shared memory.
LARGE = {
    "joint_prompt_products": {"BLOCK_K": 512, "PROGRAMS": 2},
    "joint_prompt_rows": {"BLOCK_S": 32},
    "joint_prompt_sides": {"BLOCK_S": 32},
    "joint_prompt_expand": {"BLOCK_D": 2048},
}


@pytest.fixture
def large_blocks() -> Iterator[None]:
    with configured(LARGE if INTERPRETED else {}):
        yield


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where the kernels run: the GPU, or the CPU under the interpreter and where they are only compiled."""
    return torch.device("cuda" if ON_GPU else "cpu")


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fills whatever a launcher allocates with NaN, or an index far outside, until a kernel writes it."""

    def filled(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def allocate_filled(*args: Any, **kwargs: Any) -> torch.Tensor:
            x = allocate(*args, **kwargs)
            return x.fill_(float("nan") if x.is_floating_point() else torch.iinfo(x.dtype).max // 2)

        return allocate_filled

    for module, name in ((torch.Tensor, "new_empty"), (torch, "empty_like")):
        monkeypatch.setattr(module, name, filled(getattr(module, name)))


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
        pytest.skip(
            f"no address space for {elements} elements ({error}): runs where a process may reserve it (`ulimit -v`)"
        )
    return torch.frombuffer(memory, dtype=dtype)


def far_apart(x: torch.Tensor, dim: int) -> torch.Tensor:
    """The same values with offsets beyond 2³¹ elements along `dim`, in memory that is reserved but mostly untouched.

    It reaches as far below the first element: an offset that wraps round in 32 bits reads zeros there.
    """
    if x.dim() < -dim:
        return x
    half = 2**31
    strides = list(x.contiguous().stride())
    strides[dim] = -(-half // (x.shape[dim] - 1)) + 64
    length = half + sum((size - 1) * stride for size, stride in zip(x.shape, strides, strict=True)) + 1
    far = mostly_untouched(length, x.dtype).as_strided(x.shape, strides, half)
    far.copy_(x)
    return far


def rounding(actual: torch.Tensor, exact: torch.Tensor) -> torch.Tensor | float:
    """Bounds the rounding to 16 bits: half a unit; for bfloat16 under the interpreter, which truncates, a whole one."""
    if actual.dtype == torch.float32:
        return 0.0
    limits, units = torch.finfo(actual.dtype), 1 if INTERPRETED and actual.dtype == torch.bfloat16 else 0.5
    return units * limits.eps * exact.abs() + limits.smallest_normal
