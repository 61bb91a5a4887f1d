"""The two ceilings that figures are held against, measured in the same process: copy bandwidth and dense products."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from .timing import time_in_turn


class Ceilings(NamedTuple):
    """Bytes a second (read plus written) of a copy, and operations a second of a square product by data type."""

    bytes_per_second: float
    operations_per_second: dict[str, float]

    def floor(self, bytes_moved: int, operations: int, dtype: str) -> tuple[float, str]:
        """The least seconds that so much work takes, and which ceiling sets them: `memory` or `compute`."""
        memory = bytes_moved / self.bytes_per_second
        compute = operations / self.operations_per_second[dtype]
        return max((memory, "memory"), (compute, "compute"))


class _Size(NamedTuple):
    copy_bytes: int  # of the source; so many are read and as many written
    product: int  # edge of the square matrices
    dtypes: tuple[str, ...]
    seconds: float


SIZES = {
    "gpu": _Size(4 << 30, 8192, ("bfloat16", "float16", "float32"), 0.4),
    "cpu": _Size(128 << 20, 1024, ("float32",), 0.5),
    "reduced": _Size(1 << 20, 64, ("float32",), 0.01),
}


def measure(table: str, device: str) -> tuple[Ceilings, list[dict[str, Any]]]:
    """The ceilings of `device` at the sizes of `table` (`gpu`, `cpu`, `reduced`), and a row for each. On
    random data: products of zeros can run faster than real ones.
    """
    size = SIZES[table]
    source = torch.randint(256, (size.copy_bytes,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    timing = time_in_turn({"copy": lambda _: target.copy_(source)}, device, 1, size.seconds)["copy"]
    bandwidth = 2 * size.copy_bytes / timing.median
    rows = [{"ceiling": "copy", "bytes": 2 * size.copy_bytes, "bytes_per_second": bandwidth, **timing.as_dict()}]
    rates = {}
    for name in size.dtypes:
        a, b = (torch.randn(size.product, size.product, device=device).to(getattr(torch, name)) for _ in range(2))
        timing = time_in_turn({"product": lambda _, a=a, b=b: a @ b}, device, 1, size.seconds)["product"]
        operations = 2 * size.product**3
        rates[name] = operations / timing.median
        rows.append(
            {
                "ceiling": f"{name} product",
                "operations": operations,
                "operations_per_second": rates[name],
                **timing.as_dict(),
            }
        )
    return Ceilings(bandwidth, rates), rows
