"""Launch choices of the prompted embedding's kernels.

`ITERS`: row tiles that a program may take, one after another. `STAGES`: depth of the software pipeline over them.
"""

from __future__ import annotations

from typing import Any

import torch

from ..launch import Config, cached_choice, config_for, padded, precision

_FORWARD = {"BLOCK_T": 32, "BLOCK_D": 128, "ITERS": 4, "STAGES": 3, "num_warps": 4, "num_stages": 3}
_BACKWARD = {"BLOCK_M": 64, "BLOCK_D": 64, "BLOCK_R": 16, "STAGES": 4, "num_warps": 4, "num_stages": 3}

# Meta-parameters by kernel, used where nothing was measured.
CONFIGS: dict[str, Config] = {
    "prompted_embedding": _FORWARD,
    "prompted_embedding_packed": _FORWARD,
    "prompted_embedding_token_at": {"BLOCK_M": 64, "BLOCK_N": 128, "num_warps": 4, "num_stages": 1},
    "prompted_embedding_backward": _BACKWARD,
    "prompted_embedding_reduce": {"BLOCK_E": 256, "BLOCK_P": 16, "num_warps": 4, "num_stages": 2},
}
# Up to this width the backward takes smaller tiles: otherwise there are too few of them to fill a GPU.
NARROW = 1024


def heuristic(kernel: str, d: int, r: int = 0, dtype: torch.dtype = torch.bfloat16) -> Config:
    """Meta-parameters of `kernel` at width `d`, rank `r` and the table's `dtype` where nothing was measured."""
    config = dict(CONFIGS[kernel])
    if kernel == "prompted_embedding_backward":
        if d <= NARROW:
            config.update(BLOCK_M=32, BLOCK_D=32)
    elif "BLOCK_T" in config and dtype.itemsize > 2:
        config["BLOCK_T"] = max(16, config["BLOCK_T"] // 2)  # of a float32 table's rows half as many fill a tile
    return bounded(config, d, r)


def bounded(config: Config, d: int, r: int) -> Config:
    """`config` with a column tile no wider than `d` needs and than the registers hold of B, `[rank, BLOCK_D]`."""
    if "BLOCK_D" not in config:
        return config
    widest = padded(d)
    if "BLOCK_T" in config:  # the forward holds B's tile throughout
        widest = min(widest, max(16, 1024 * config["num_warps"] // padded(r)))
    return {**config, "BLOCK_D": min(config["BLOCK_D"], widest)}


def meta(kernel: str, config: Config, r: int = 0, product_precision: str = "ieee") -> dict[str, Any]:
    """What `kernel` is launched or compiled with: `config`, the padded rank and the precision of the products."""
    chosen: dict[str, Any] = {name: value for name, value in config.items() if name != "ITERS"}
    if "BLOCK_T" in config:
        chosen["RANK"] = padded(r) if r else 0
    if "BLOCK_D" in config:
        chosen["PRECISION"] = product_precision
    return chosen


def key(kernel: str, dtype: torch.dtype) -> str:
    """Name of `kernel` in a file of measured configurations, for what it reads in `dtype`."""
    return f"{kernel}/{8 * dtype.itemsize}-bit"


@cached_choice
def chosen(
    kernel: str, d: int, r: int, read: torch.dtype, written: torch.dtype, device: torch.device
) -> tuple[Config, dict[str, Any]]:
    """Configuration and meta-parameters of `kernel` that reads rows in `read` and writes results in `written`."""
    config = config_for(key(kernel, read), (d, padded(r)), device, heuristic(kernel, d, r, read))
    config = bounded(config, d, r)
    return config, meta(kernel, config, r, precision(written, device))
