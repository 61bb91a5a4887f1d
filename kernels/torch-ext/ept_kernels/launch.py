"""What the kernels' launchers share: entering the device, counting launches, measured configurations.

A configuration is a set of meta-parameters of one kernel (block sizes, ``num_warps``, ``num_stages``). Measured ones
are data, one JSON a device under ``configs/``: ``{kernel: {"<size>": {meta-parameters}}}``, the size being the
embedding width; the nearest size is taken, and a heuristic where nothing was measured.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import re
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch

CONFIGS = Path(__file__).parent / "configs"


class AotCase(NamedTuple):
    """One kernel as it is compiled ahead of time, without a GPU.

    Attributes:
        name: of the case, unique. fn: the ``@triton.jit`` function.
        signature: type of every run-time argument by name, as ``triton.compiler.ASTSource`` takes it, constants
            included as ``"constexpr"``. constexprs: value of every constant by name.
    """

    name: str
    fn: Any
    signature: dict[str, str]
    constexprs: dict[str, Any]
    num_warps: int
    num_stages: int


class _Counter:
    def __init__(self) -> None:
        self.launches = 0


_counter = _Counter()


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **meta: Any) -> None:
    """Launches ``kernel``; nothing is launched for an empty grid."""
    if not all(grid):
        return
    _counter.launches += 1
    kernel[grid](*args, **meta)


def launches() -> int:
    """Number of kernels launched through :func:`launch` so far in this process."""
    return _counter.launches


def on_device(tensor: torch.Tensor) -> contextlib.AbstractContextManager[Any]:
    """Enters the device that ``tensor`` lies on: Triton launches on the current one."""
    if tensor.device.type == "cpu":
        return contextlib.nullcontext()
    return torch.get_device_module(tensor.device).device(tensor.device)


def config_for(kernel: str, size: int, device: torch.device, default: dict[str, int]) -> dict[str, int]:
    """Meta-parameters of ``kernel`` at embedding width ``size``: the nearest measured ones of this device, else
    ``default``.
    """
    if device.type == "cpu":
        return default
    measured = _measured(_device_name(device)).get(kernel)
    if not measured:
        return default
    nearest = min(measured, key=lambda key: abs(math.log(int(key) / size)))
    return {**default, **measured[nearest]}


@functools.cache
def _device_name(device: torch.device) -> str:
    name = torch.get_device_module(device).get_device_name(device)
    return re.sub(r"[^A-Za-z0-9]+", "_", name).strip("_")


@functools.cache
def _measured(device_name: str) -> dict[str, dict[str, dict[str, int]]]:
    path = CONFIGS / f"{device_name}.json"
    if path.is_file():
        return json.loads(path.read_text(encoding="utf-8"))
    warnings.warn(
        f"no measured launch configurations for {device_name} in {path.name}: heuristic ones are used",
        stacklevel=2,
    )
    return {}
