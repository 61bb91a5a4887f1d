"""Launchers of the prompted embedding's Triton kernels, one launch forward and three backward, and their choices."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from ..launch import Config, all_registers, cached_choice, config_for, key, launch, on_device, padded, precision
from .backward import (
    prompted_embedding_backward_kernel,
    prompted_embedding_reduce_kernel,
    prompted_embedding_token_at_kernel,
)
from .forward import prompted_embedding_kernel, prompted_embedding_packed_kernel

# Meta-parameters by kernel, used where nothing was measured. ITERS: row tiles that a program may take, one after
# another. STAGES: depth of the software pipeline over them.
_FORWARD = {"BLOCK_T": 32, "BLOCK_D": 128, "ITERS": 4, "STAGES": 3, "num_warps": 4, "num_stages": 3}
_BACKWARD = {"BLOCK_M": 64, "BLOCK_D": 64, "BLOCK_R": 16, "STAGES": 4, "num_warps": 4, "num_stages": 3}
CONFIGS: dict[str, Config] = {
    "prompted_embedding": _FORWARD,
    "prompted_embedding_packed": _FORWARD,
    "prompted_embedding_token_at": {"BLOCK_M": 64, "BLOCK_N": 128, "num_warps": 4, "num_stages": 1},
    "prompted_embedding_backward": _BACKWARD,
    "prompted_embedding_reduce": {"BLOCK_E": 256, "BLOCK_P": 16, "num_warps": 4, "num_stages": 2},
}
# Up to this width the backward takes smaller tiles: otherwise there are too few of them to fill a GPU.
NARROW = 1024


def prompted_embedding(
    input_ids: Tensor,
    positions: Tensor,
    table: Tensor,
    prompt: Tensor,
    A: Tensor,
    B: Tensor,
    scale: float,
    adapter_ids: Tensor | None = None,
) -> Tensor:
    """Computes `ept_kernels.prompted_embedding_reference` in one launch."""
    batch, n = input_ids.shape
    s, d = prompt.shape[-2], table.shape[1]
    m, r = A.shape[-2:]
    out = table.new_empty(batch, s + n, d)
    config, options = _chosen("prompted_embedding", d, r, table.dtype, table.dtype, table.device)
    if adapter_ids is not None:
        options = options | all_registers(table.device)  # the assembler otherwise spills a few on sm_100
    runs, tiles = _runs(triton.cdiv(n, config["BLOCK_T"]), config["ITERS"])
    groups = triton.cdiv(s, config["BLOCK_T"]) + runs
    grid = (triton.cdiv(d, config["BLOCK_D"]) * groups * batch,)
    tensors = (input_ids, positions, table, prompt, A, B, adapter_ids, out)
    shape = (n, s, d, m, r, A.shape[0], groups, tiles)
    strides = (*input_ids.stride(), *positions.stride(), *table.stride(), *_strides(adapter_ids, prompt, A, B))
    with on_device(table):
        launch(prompted_embedding_kernel, grid, *tensors, float(scale), *shape, *strides, **options)
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
    runs, tiles = _runs(triton.cdiv(tokens, config["BLOCK_T"]), config["ITERS"])
    prompt_tiles = triton.cdiv(texts * s, config["BLOCK_T"])
    grid = (triton.cdiv(d, config["BLOCK_D"]) * (prompt_tiles + runs),)
    tensors = (input_ids, cu_seqlens, table, prompt, A, B)
    shape = (tokens, texts, s, d, m, r, prompt_tiles, tiles, texts.bit_length())
    strides = (stride for x in tensors for stride in x.stride())
    with on_device(table):
        launch(prompted_embedding_packed_kernel, grid, *tensors, out, float(scale), *shape, *strides, **options)
    return out


def prompted_embedding_backward(
    grad_output: Tensor, positions: Tensor, A: Tensor, B: Tensor, scale: float, adapter_ids: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Computes `ept_kernels.prompted_embedding_backward_reference` in three launches, one where there is no update."""
    batch, n = positions.shape
    s, d = grad_output.shape[1] - n, grad_output.shape[2]
    m, r = A.shape[-2:]
    adapters = 1 if adapter_ids is None else A.shape[0]
    grad_prompt = A.new_empty(*A.shape[:-2], s, d)
    if r == 0 or m == 0 or n == 0:
        r = 0
        grad_A, grad_B = A.new_zeros(A.shape), A.new_zeros(B.shape)
    else:
        grad_A, grad_B = A.new_empty(A.shape), A.new_empty(B.shape)

    shape_and_types = (d, r, grad_output.dtype, A.dtype, grad_output.device)
    config, options = _chosen("prompted_embedding_backward", *shape_and_types)
    columns = triton.cdiv(d, config["BLOCK_D"])
    prompt_tiles = triton.cdiv(s, config["BLOCK_M"])
    position_tiles = triton.cdiv(m, config["BLOCK_M"]) if r else 0
    token_at = A.new_empty((batch, m) if r else (0, 0), dtype=torch.int32)
    partial_A = A.new_empty((adapters, columns, m, r), dtype=torch.float32)
    partial_B = A.new_empty((adapters, position_tiles, r, d), dtype=torch.float32)
    with on_device(grad_output):
        if r:
            inverse, inverse_options = _chosen("prompted_embedding_token_at", *shape_and_types)
            grid: tuple[int, ...] = (triton.cdiv(m, inverse["BLOCK_M"]) * batch,)
            arguments = (positions, token_at, n, m, *positions.stride())
            launch(prompted_embedding_token_at_kernel, grid, *arguments, **inverse_options)
        grid = (columns * (prompt_tiles + position_tiles), adapters)
        tensors = (grad_output, token_at, A, B, adapter_ids, grad_prompt, partial_A, partial_B)
        shape, strides = (batch, s, d, m, r), (*grad_output.stride(), *_strides(adapter_ids, A, B))
        launch(prompted_embedding_backward_kernel, grid, *tensors, *shape, *strides, **options)
        if r:
            reduce, reduce_options = _chosen("prompted_embedding_reduce", *shape_and_types)
            tiles = triton.cdiv(m * r, reduce["BLOCK_E"]) + triton.cdiv(r * d, reduce["BLOCK_E"])
            sums = (partial_A, partial_B, grad_A, grad_B, float(scale), columns, position_tiles, m * r, r * d)
            launch(prompted_embedding_reduce_kernel, (tiles, adapters), *sums, **reduce_options)
    return grad_prompt, grad_A, grad_B


def _runs(tiles: int, longest: int) -> tuple[int, int]:
    """Splits `tiles` into runs of at most `longest`, as even as possible: how many runs, tiles in each."""
    runs = triton.cdiv(tiles, longest)
    return runs, triton.cdiv(tiles, max(runs, 1))


def _strides(adapter_ids: Tensor | None, *parameters: Tensor) -> list[int]:
    """Lists each parameter's strides along adapters, rows and columns, then that of `adapter_ids`; 0 without them."""
    if adapter_ids is None:
        return [*(stride for x in parameters for stride in (0, *x.stride()[-2:])), 0]
    return [*(stride for x in parameters for stride in x.stride()), adapter_ids.stride(0)]


@cached_choice
def _chosen(
    kernel: str, d: int, r: int, read: torch.dtype, written: torch.dtype, device: torch.device
) -> tuple[Config, dict[str, Any]]:
    """Chooses the configuration and meta-parameters of `kernel` that reads rows in `read` and writes in `written`."""
    config = config_for(key(kernel, read), (d, padded(r)), device, heuristic(kernel, d, r, read))
    config = bounded(config, d, r)
    options: dict[str, Any] = {name: value for name, value in config.items() if name != "ITERS"}
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
        config["BLOCK_T"] = max(16, config["BLOCK_T"] // 2)  # of a float32 table's rows half as many fill a tile
    return bounded(config, d, r)


def bounded(config: Config, d: int, r: int) -> Config:
    """Narrows the column tile to what `d` needs and to what the registers hold of B, `[rank, BLOCK_D]`."""
    if "BLOCK_D" not in config:
        return config
    widest = padded(d)
    if "BLOCK_T" in config:  # the forward holds B's tile throughout
        widest = min(widest, max(16, 1024 * config["num_warps"] // padded(r)))
    return {**config, "BLOCK_D": min(config["BLOCK_D"], widest)}
