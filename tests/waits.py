"""Finds, on a CPU, what would make the processor wait for a GPU."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
# Operators that read a number, or a size that depends on numbers, back from the device.
WAITING = {aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default, aten._unique2.default}
PACKAGES = ("ept", "ept_kernels", "transformers", "peft")
# On a CPU, the code checks whether anything has to move, every id has a row, and a text ends in padding;
# on an accelerator it moves, the kernel turns such a row into NaN, and a classifier gets a mask.
CPU_ONLY = {
    "ept.model.layout.arrangement",
    "ept.embedding.check_vocabulary",
    "ept.model.inputs._up_to_last_token",
}


class Waits(TorchDispatchMode):
    """Lists every wait by the function that asks for it; where PyTorch itself does, `torch`."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def of_an_accelerator(self) -> list[str]:
        """Lists the waits without those that occur only on a CPU."""
        return [place for place in self.found if place not in CPU_ONLY]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # Indexing by a mask is a nonzero in disguise.
        by_mask = func is aten.index.Tensor and any(x is not None and x.dtype == torch.bool for x in args[1])
        if func in WAITING or by_mask or _is_copied_from_host(func, args, kwargs or {}):
            self.found.append(_caller())
        return func(*args, **(kwargs or {}))


def _is_copied_from_host(func: Any, args: Any, kwargs: dict[str, Any]) -> bool:
    """Detects a copy from ordinary memory, for which a GPU makes the processor wait. Here other devices stand in."""
    is_copy = func is aten._to_copy.default and args[0].device.type == "cpu"
    return is_copy and torch.device(kwargs.get("device") or "cpu").type != "cpu"


def _caller() -> str:
    frame = sys._getframe(2)
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        if module.partition(".")[0] in PACKAGES:
            return f"{module}.{frame.f_code.co_name}"
        frame = frame.f_back  # type: ignore[assignment]
    return "torch"
