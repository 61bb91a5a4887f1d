"""A GPU that only compiles: the package's GPU code path, driven with CPU tensors on any machine.

    compile_only.activate("sm_90")  # before the first operator is called, for the rest of the process

From then on CPU tensors go through the launchers like those of such a GPU. Triton compiles a launched kernel as on a
host with that GPU: for the same types, constants and divisible numbers, and with the same cache keys. The kernel is
refused if the GPU would refuse it (shared memory, threads, the grid), or if it spills. Nothing runs: results stay as
they were allocated, so code that compares values must check `active`.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import re
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

from .. import launch, library


class Target(NamedTuple):
    """A GPU to compile for; `shared`: bytes of shared memory available to a program."""

    backend: str
    architecture: int | str
    warp: int  # threads
    shared: int


TARGETS = {
    "sm_80": Target("cuda", 80, 32, 163 * 1024),
    "sm_90": Target("cuda", 90, 32, 227 * 1024),
    "sm_100": Target("cuda", 100, 32, 227 * 1024),
    "gfx942": Target("hip", "gfx942", 64, 64 * 1024),
}
MAX_GRID = (2**31 - 1, 2**16 - 1, 2**16 - 1)  # programs along each axis, on NVIDIA GPUs

_active: str | None = None
_until_exit = contextlib.ExitStack()
atexit.register(_until_exit.close)  # any later, the modules that it needs are gone


def activate(target: str) -> None:
    """Makes this process behave like one on a host with the GPU `target` (from `TARGETS`), which only compiles.

    Raises:
        RuntimeError: there is no such target, or Triton's interpreter is on.
    """
    global _active
    _until_exit.enter_context(driving(target))
    _active = target
    library.take_kernels("cpu")


def active() -> str | None:
    """Returns the target that kernels are compiled for instead of being run, if any."""
    return _active


@contextlib.contextmanager
def driving(target: str) -> Iterator[Driver]:
    """Makes launchers choose and Triton compile for `target`, running nothing, in the context; raises as `activate`."""
    if target not in TARGETS:
        raise RuntimeError(f"target {target!r} is unknown: known are {', '.join(TARGETS)}")
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise RuntimeError("unset TRITON_INTERPRET: under the interpreter nothing is compiled")
    from triton.runtime import driver

    # Triton 3.4 has no `_active`; later, reading `active` looks for a GPU.
    held = "_active" if hasattr(driver, "_active") else "active"
    ours = Driver(target)
    in_place = mock.patch.object(driver, held, ours)
    with in_place, launch.acting_as(ours.limits.architecture), _assembling_without_lines():
        yield ours


@contextlib.contextmanager
def _assembling_without_lines() -> Iterator[None]:
    """Makes ptxas omit PTX and line numbers, two thirds of a binary, which no launch reads; the code stays the same.

    Neither earlier stages, which would generate other code, nor the cache keys are affected: a host with a GPU looks
    for binaries with line numbers.
    """
    from triton import knobs
    from triton.backends.nvidia.compiler import CUDABackend

    make_cubin, one_at_a_time = CUDABackend.make_cubin, threading.Lock()

    def without_lines(*arguments: Any) -> bytes:
        with one_at_a_time, knobs.compilation.scope():
            knobs.compilation.disable_line_info = True
            return make_cubin(*arguments)

    with mock.patch.object(CUDABackend, "make_cubin", without_lines):
        yield


class Driver:
    """A driver with the interface that Triton's just-in-time compiler expects."""

    def __init__(self, target: str) -> None:
        self.target, self.limits = target, TARGETS[target]
        self.utils = self
        self.launcher_cls = lambda source, metadata: partial(self._launch, metadata.name)

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget(*self.limits[:3])

    def get_current_device(self) -> str:
        return self.target  # Triton's key for compiled kernels

    def get_current_stream(self, device: Any = None) -> int:
        return 0

    def get_device_properties(self, device: Any) -> dict[str, int]:
        return {"max_shared_mem": self.limits.shared}

    def load_binary(self, name: str, binary: bytes, shared: int, device: Any) -> tuple[Any, Any, int, int, int]:
        """Returns the module, the function, registers, spills and maximum threads.

        Triton loads a kernel without a module again at every launch. Yet there is none since 3.9, where Triton would
        unload it, possibly when another driver has taken this one's place.
        """
        from triton.compiler import CompiledKernel

        module = None if hasattr(CompiledKernel, "__del__") else self
        facts, threads = facts_of(binary, self.limits.backend), 1024
        if self.limits.backend == "cuda":  # 65,536 registers, allocated by eights, to whole warps
            threads = min(threads, 65536 // (-(-facts["registers"] // 8) * 8) // 32 * 32)
        return module, facts, facts["registers"], facts["spilled_bytes"] // 4, threads

    def _launch(self, name: str, x: int, y: int, z: int, stream: int, facts: dict[str, int], *rest: Any) -> None:
        from triton.runtime.errors import TritonError

        if facts["spilled_bytes"]:
            raise TritonError(f"{name} spills {facts['spilled_bytes']} bytes a thread on {self.target}")
        if self.limits.backend == "cuda" and any(n > most for n, most in zip((x, y, z), MAX_GRID)):
            raise TritonError(f"{name} is launched with a grid of {(x, y, z)}, but the limits are {MAX_GRID}")


def facts_of(binary: bytes, backend: str) -> dict[str, int]:
    """Reads a thread's registers and spilled bytes from machine code."""
    if backend == "hip":
        # Scalar registers spill into lanes of vector registers; only vector spills and scratch go to memory.
        spilled = max(4 * _noted(binary, ".vgpr_spill_count"), _noted(binary, ".private_segment_fixed_size"))
        return {"registers": _noted(binary, ".vgpr_count"), "spilled_bytes": spilled}
    usage = disassembled(binary, "cuobjdump", "--dump-resource-usage")
    sizes = {name: int(re.findall(rf"\b{name}:(\d+)", usage)[-1]) for name in ("REG", "LOCAL", "STACK")}
    local = sizes["LOCAL"] + sizes["STACK"]
    # A frame into which nothing is stored does not count.
    spills = bool(local) and re.search(r"\b(?:LDL|STL)\b", disassembled(binary, "nvdisasm", "-c")) is not None
    return {"registers": sizes["REG"], "spilled_bytes": local if spills else 0}


def disassembled(cubin: bytes, tool: str, option: str) -> str:
    """Returns the output of a tool that comes with Triton for a binary."""
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / tool
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([str(path), option, file.name], capture_output=True, text=True, check=True).stdout


def _noted(binary: bytes, name: str) -> int:
    """Reads a number from the notes of AMD's machine code, which are MessagePack."""
    number = rb"(?:([\x00-\x7f])|\xcc(.)|\xcd(..)|\xce(....))"
    return max(
        int.from_bytes(next(group for group in found if group), "big")
        for found in re.findall(re.escape(name.encode()) + number, binary, re.DOTALL)
    )
