"""Launch choices of the prompted embedding's kernels: heuristic ones, what the tuner may try, what is compiled ahead.

`ITERS`: row tiles that a program may take, one after another. `STAGES`: depth of the software pipeline over them.
"""

from __future__ import annotations

from typing import Any

import torch

from ..launch import AotCase, Config, cached_choice, config_for, padded, precision
from .backward import (
    prompted_embedding_backward_kernel,
    prompted_embedding_reduce_kernel,
    prompted_embedding_token_at_kernel,
)
from .forward import prompted_embedding_kernel, prompted_embedding_packed_kernel

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
KERNELS = {
    "prompted_embedding": prompted_embedding_kernel,
    "prompted_embedding_packed": prompted_embedding_packed_kernel,
    "prompted_embedding_token_at": prompted_embedding_token_at_kernel,
    "prompted_embedding_backward": prompted_embedding_backward_kernel,
    "prompted_embedding_reduce": prompted_embedding_reduce_kernel,
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


# Ahead of time.

# Table's and gradient's type, width d, rank r, mixed adapters.
_AOT_PROBLEMS = (
    ("bf16", 768, 30, False),
    ("bf16", 4096, 60, False),
    ("bf16", 4096, 30, True),
    ("fp16", 4096, 0, False),
    ("fp32", 768, 30, True),
    ("fp32", 4096, 60, False),
)
_ROW_STRIDES = ("d", "stride_table_v", "stride_prompt_s", "stride_grad_b", "stride_grad_t", "stride_B_r")
_UNIT_STRIDES = (
    "stride_ids",
    "stride_ids_n",
    "stride_positions_n",
    "stride_cu",
    "stride_table_d",
    "stride_prompt_d",
    "stride_grad_d",
    "stride_A_r",
    "stride_B_d",
    "stride_adapter",
)


def aot_cases() -> list[AotCase]:
    """Every kernel with representative signatures, for `ept_kernels.dev.aot`."""
    cases = [
        aot_case("prompted_embedding_token_at", "int64", {"positions": "*i64"}),
        aot_case("prompted_embedding_token_at", "int32", {"positions": "*i32"}),
        aot_case("prompted_embedding_reduce", "fp32", {}),
    ]
    for dtype, d, r, mixed in _AOT_PROBLEMS:
        label = f"{dtype} d={d} r={r}" + (" mixed" if mixed else "")
        types = pointer_types(dtype, mixed)
        cases.append(aot_case("prompted_embedding", label, types, d, r))
        cases.append(aot_case("prompted_embedding_backward", label, types, d, r))
        if not mixed:
            cases.append(aot_case("prompted_embedding_packed", label, types, d, r))
    return cases


def pointer_types(dtype: str, mixed: bool) -> dict[str, str]:
    """Types of the pointers that `aot_case` takes, for rows in `dtype` (Triton's name)."""
    types = dict.fromkeys(("table", "out", "grad_output"), f"*{dtype}")
    return types | {"input_ids": "*i64", "positions": "*i64", "adapter_ids": "*i64" if mixed else "None"}


def aot_case(
    kernel: str, label: str, types: dict[str, str], d: int = 4096, r: int = 30, config: Config | None = None
) -> AotCase:
    """One kernel for contiguous inputs; `types` names the pointers that are not float32, and what is `None`.

    Width and row strides are given as constants: compiled at run time, they are known to be divisible by 16. Without
    `config` the heuristic's is taken.
    """
    fn = KERNELS[kernel]
    dtype = torch.float32 if types.get("table", "*fp32") == "*fp32" else torch.bfloat16
    product_precision = "bf16x6" if "table" not in fn.arg_names or dtype == torch.float32 else "tf32"
    options = meta(kernel, config or heuristic(kernel, d, r, dtype), r, product_precision)
    warps, stages = options.pop("num_warps"), options.pop("num_stages")
    options |= (
        dict.fromkeys(_UNIT_STRIDES, 1)
        | dict.fromkeys(_ROW_STRIDES, d)
        | {name: None for name, type_ in types.items() if type_ == "None"}
    )
    constants = {name: value for name, value in options.items() if name in fn.arg_names}
    pointers = dict.fromkeys(("prompt", "A", "B", "grad_prompt", "grad_A", "grad_B", "partial_A", "partial_B"), "*fp32")
    pointers |= {"token_at": "*i32", "cu_seqlens": "*i32", "scale": "fp32", **types}
    signature = {name: "constexpr" if name in constants else pointers.get(name, "i32") for name in fn.arg_names}
    return AotCase(f"{kernel} {label}", fn, signature, constants, warps, stages)
