"""Launchers of the prompted embedding's Triton kernels, and their choices.

Two launches forward, three backward; the first is the same.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from ..launch import Config, cached_choice, config_for, key, launch, on_device, padded, precision
from .backward import prompted_embedding_backward_kernel, prompted_embedding_reduce_kernel, token_at_kernel
from .forward import prompted_embedding_kernel, prompted_embedding_packed_kernel

_FORWARD = {"num_warps": 8, "num_stages": 1}
_BACKWARD = {"BLOCK_M": 64, "BLOCK_D": 64, "BLOCK_R": 16, "STAGES": 4, "num_warps": 4, "num_stages": 3}

# Meta-parameters by kernel, used where nothing was measured. PROGRAMS: how many programs are wanted, which decides how
# many batch rows one takes. ITERS: row tiles that a program may take, one after another. STAGES: depth of the software
# pipeline over them.
CONFIGS: dict[str, Config] = {
    "prompted_embedding": {"BLOCK_T": 16, "BLOCK_D": 256, "PROGRAMS": 512, **_FORWARD},
    "prompted_embedding_packed": {"BLOCK_T": 16, "BLOCK_D": 256, "ITERS": 4, "STAGES": 1, **_FORWARD},
    "prompted_embedding_backward": _BACKWARD,
    "prompted_embedding_reduce": {"BLOCK_E": 256, "BLOCK_P": 16, "num_warps": 4, "num_stages": 2},
}
TOKEN_AT = {"BLOCK_M": 64, "BLOCK_N": 128, "num_warps": 4, "num_stages": 1}  # too small to be worth measuring
# Up to this width the backward takes smaller tiles: otherwise there are too few of them to fill a GPU.
NARROW = 1024


def token_at(positions: Tensor, m: int) -> Tensor:
    """Computes `ept_kernels.token_at_reference` in one launch."""
    batch, n = positions.shape
    found = positions.new_empty(batch, m, dtype=torch.int32)
    grid = (triton.cdiv(m, TOKEN_AT["BLOCK_M"]) * batch,)
    with on_device(positions):
        launch(token_at_kernel, grid, positions.contiguous(), found, n, m, **TOKEN_AT)
    return found


def prompted_embedding(
    input_ids: Tensor,
    positions: Tensor,
    table: Tensor,
    prompt: Tensor,
    A: Tensor,
    B: Tensor,
    scale: float,
    adapter_ids: Tensor | None = None,
    found: Tensor | None = None,
) -> Tensor:
    """Computes `ept_kernels.prompted_embedding_reference` in two launches, one with `token_at` or without an update."""
    batch, n = input_ids.shape
    s, d = prompt.shape[-2], table.shape[1]
    m, r = A.shape[-2:] if A.numel() and n else (0, 0)
    positions = positions.contiguous()
    if found is None:
        found = token_at(positions, m) if m else positions.new_empty(0, dtype=torch.int32)
    out = table.new_empty(batch, s + n, d)
    config, options = _chosen("prompted_embedding", d, r, table.dtype, table.dtype, table.device)
    tiles = triton.cdiv(d, config["BLOCK_D"]) * (triton.cdiv(m, config["BLOCK_T"]) + triton.cdiv(s, config["BLOCK_T"]))
    runs = min(batch, triton.cdiv(config["PROGRAMS"], max(tiles, 1))) if adapter_ids is None else batch
    rows = triton.cdiv(batch, max(runs, 1))
    runs = triton.cdiv(batch, max(rows, 1))
    with on_device(table):
        launch(
            prompted_embedding_kernel,
            (tiles * runs + batch * triton.cdiv(n, config["BLOCK_T"]),),
            *(input_ids.contiguous(), positions, found, table, *(x.contiguous() for x in (prompt, A, B))),
            *(None if adapter_ids is None else adapter_ids.contiguous(), out, float(scale)),
            *(batch, n, s, d, m, r, rows, runs, table.shape[0], A.shape[0]),
            *table.stride(),
            **options,
        )
    return out


def prompted_embedding_packed(
    input_ids: Tensor, cu_seqlens: Tensor, table: Tensor, prompt: Tensor, A: Tensor, B: Tensor, scale: float
) -> Tensor:
    """Computes `ept_kernels.prompted_embedding_packed_reference` in one launch."""
    texts, tokens = cu_seqlens.shape[0] - 1, input_ids.shape[0]
    s, d = prompt.shape[0], table.shape[1]
    m, r = A.shape
    out = table.new_empty(tokens + texts * s, d)
    config, options = _chosen("prompted_embedding_packed", d, r, table.dtype, table.dtype, table.device)
    tiles = triton.cdiv(tokens, config["BLOCK_T"])
    runs = triton.cdiv(tiles, config["ITERS"])  # as even as possible
    tiles = triton.cdiv(tiles, max(runs, 1))
    prompt_tiles = triton.cdiv(texts * s, config["BLOCK_T"])
    grid = (triton.cdiv(d, config["BLOCK_D"]) * (prompt_tiles + runs),)
    tensors = (input_ids.contiguous(), cu_seqlens.contiguous(), table, *(x.contiguous() for x in (prompt, A, B)))
    shape = (tokens, texts, s, d, m, r, prompt_tiles, tiles, texts.bit_length())
    with on_device(table):
        launch(prompted_embedding_packed_kernel, grid, *tensors, out, float(scale), *shape, *table.stride(), **options)
    return out


def prompted_embedding_backward(
    grad_output: Tensor,
    positions: Tensor,
    A: Tensor,
    B: Tensor,
    scale: float,
    adapter_ids: Tensor | None = None,
    found: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Computes `ept_kernels.prompted_embedding_backward_reference` in three launches.

    In two where `token_at` is given, in one where there is no update.
    """
    batch, n = positions.shape
    s, d = grad_output.shape[1] - n, grad_output.shape[2]
    m, r = A.shape[-2:] if A.numel() and n else (A.shape[-2], 0)
    adapters = 1 if adapter_ids is None else A.shape[0]
    grad_prompt = A.new_empty(*A.shape[:-2], s, d)
    grad_A, grad_B = ((x.new_empty if r else x.new_zeros)(x.shape, dtype=A.dtype) for x in (A, B))
    if found is None:
        found = token_at(positions, m) if r else positions.new_empty(0, dtype=torch.int32)

    shape_and_types = (d, r, grad_output.dtype, A.dtype, grad_output.device)
    config, options = _chosen("prompted_embedding_backward", *shape_and_types)
    columns = triton.cdiv(d, config["BLOCK_D"])
    position_tiles = triton.cdiv(m, config["BLOCK_M"]) if r else 0
    partial_A = A.new_empty((adapters, columns, m, r), dtype=torch.float32)
    partial_B = A.new_empty((adapters, position_tiles, r, d), dtype=torch.float32)
    with on_device(grad_output):
        launch(
            prompted_embedding_backward_kernel,
            (columns * (triton.cdiv(s, config["BLOCK_M"]) + position_tiles), adapters),
            grad_output,
            found,
            A.contiguous(),
            B.contiguous(),
            None if adapter_ids is None else adapter_ids.contiguous(),
            *(grad_prompt, partial_A, partial_B),
            *(batch, s, d, m, r),
            *grad_output.stride(),
            **options,
        )
        if r:
            reduce, reduce_options = _chosen("prompted_embedding_reduce", *shape_and_types)
            tiles = triton.cdiv(m * r, reduce["BLOCK_E"]) + triton.cdiv(r * d, reduce["BLOCK_E"])
            launch(
                prompted_embedding_reduce_kernel,
                (tiles, adapters),
                *(partial_A, partial_B, grad_A, grad_B, float(scale)),
                *(columns, position_tiles, m * r, r * d),
                **reduce_options,
            )
    return grad_prompt, grad_A, grad_B


@cached_choice
def _chosen(
    kernel: str, d: int, r: int, read: torch.dtype, written: torch.dtype, device: torch.device
) -> tuple[Config, dict[str, Any]]:
    """Chooses the configuration and meta-parameters of `kernel` that reads rows in `read` and writes in `written`."""
    config = config_for(key(kernel, read), (d, padded(r)), device, heuristic(kernel, d, r, read))
    config = bounded(config, d, r)
    options: dict[str, Any] = {name: value for name, value in config.items() if name not in ("ITERS", "PROGRAMS")}
    if "BLOCK_T" in config:
        options["RANK"] = padded(r) if r else 0
    if "BLOCK_D" in config:
        options["PRECISION"] = precision(written, device)
    return config, options


def heuristic(kernel: str, d: int, r: int = 0, dtype: torch.dtype = torch.bfloat16) -> Config:
    """Chooses meta-parameters of `kernel` at width `d`, rank `r` and the table's `dtype` where nothing was measured."""
    config = dict(CONFIGS[kernel])
    if kernel == "prompted_embedding_backward" and d <= NARROW:
        config.update(BLOCK_M=32, BLOCK_D=32)
    elif "BLOCK_T" in config and dtype.itemsize > 2:
        config["BLOCK_D"] //= 2  # of a float32 table's rows half as many columns fill a tile
    return bounded(config, d, r)


def bounded(config: Config, d: int, r: int) -> Config:
    """Narrows the column tile to what `d` needs and to what the registers hold of B, `[rank, BLOCK_D]`."""
    if "BLOCK_D" not in config:
        return config
    widest = padded(d)
    if "BLOCK_T" in config:  # the forward holds B's tile throughout
        widest = min(widest, max(16, 1024 * config["num_warps"] // padded(r)))
    return {**config, "BLOCK_D": min(config["BLOCK_D"], widest)}
