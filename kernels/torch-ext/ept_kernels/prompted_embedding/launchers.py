"""Launchers of the prompted embedding's Triton kernels, and their choices."""

import math
from typing import Any

import torch
import triton
from torch import Tensor

from .. import launch
from ..launch import Config, Kinds, Prepared, Size
from ..library import check_shapes
from .backward import prompted_embedding_backward_kernel, prompted_embedding_reduce_kernel, token_at_kernel
from .forward import prompted_embedding_kernel
from .reference import BACKWARD, FORWARD

_BACKWARD = {"BLOCK_M": 64, "BLOCK_D": 64, "BLOCK_R": 16, "STAGES": 4, "num_warps": 4, "num_stages": 3}

# Meta-parameters by kernel, used without a measurement. PROGRAMS: wanted number of programs, which determines how many
# batch rows each of them handles. STAGES: depth of the software pipeline over them.
CONFIGS: dict[str, Config] = {
    "prompted_embedding": {"BLOCK_T": 16, "BLOCK_D": 256, "PROGRAMS": 512, "num_warps": 8, "num_stages": 1},
    "prompted_embedding_backward": _BACKWARD,
    "prompted_embedding_reduce": {"BLOCK_E": 256, "BLOCK_P": 16, "num_warps": 4, "num_stages": 2},
}
TOKEN_AT = {"BLOCK_M": 64, "BLOCK_N": 128, "num_warps": 4, "num_stages": 1}  # too small to be worth tuning
# Up to this width the backward takes smaller tiles; otherwise there are too few of them to fill a GPU.
NARROW = 1024


def token_at(positions: Tensor, m: int) -> Tensor:
    """Computes `ept_kernels.token_at_reference` in one launch."""
    positions = positions.contiguous()
    found = positions.new_empty(positions.shape[0], m, dtype=torch.int32)
    run = _token_at(launch.kinds(positions), m)
    with launch.on_device(positions):
        run(positions, found)
    return found


@launch.cached_choice
def _token_at(kinds: Kinds, m: int) -> Prepared:
    check_shapes("positions batch n", positions=kinds[3][0])
    ((batch, n),) = kinds[3]
    grid = (triton.cdiv(m, TOKEN_AT["BLOCK_M"]) * batch,)
    return Prepared(token_at_kernel, grid, (n, m), TOKEN_AT, kinds)


def prompted_embedding(
    input_ids: Tensor,
    positions: Tensor | None,
    table: Tensor,
    prompt: Tensor,
    A: Tensor,
    B: Tensor,
    scale: float,
    adapter_ids: Tensor | None = None,
    found: Tensor | None = None,
) -> Tensor:
    """Computes `ept_kernels.prompted_embedding_reference` in two launches, or one with `token_at` or without an update.

    Without positions the batch is packed, and `found` holds the starts of its texts.
    """
    if positions is not None:
        positions = positions.contiguous()
        if found is None:
            found = token_at(positions, A.shape[-2] if A.numel() and positions.numel() else 0)
    tensors = (input_ids.contiguous(), positions, found, table, prompt.contiguous(), A.contiguous(), B.contiguous())
    adapter_ids = None if adapter_ids is None else adapter_ids.contiguous()
    run, shape = _forward(launch.kinds(*tensors, adapter_ids), table.stride(), float(scale))
    out = table.new_empty(*shape)
    with launch.on_device(table):
        run(*tensors, adapter_ids, out)
    return out


def prompted_embedding_packed(
    input_ids: Tensor, cu_seqlens: Tensor, table: Tensor, prompt: Tensor, A: Tensor, B: Tensor, scale: float
) -> Tensor:
    """Computes `ept_kernels.prompted_embedding_packed_reference` in one launch."""
    return prompted_embedding(input_ids, None, table, prompt, A, B, scale, None, cu_seqlens.contiguous())


@launch.cached_choice
def _forward(kinds: Kinds, strides: Size, scale: float) -> tuple[Prepared, Size]:
    """Prepares the launch, and computes the shape of its result."""
    _, (_, _, _, dtype, *_), device, (ids, positions, found, table, prompt, A_shape, B, adapter_ids) = kinds
    is_packed, parameters = positions is None, {"prompt": prompt, "A": A_shape, "B": B, "adapter_ids": adapter_ids}
    check_shapes(FORWARD, input_ids=None if is_packed else ids, positions=positions, table=table, **parameters)
    (vocabulary, d), s, (*adapters, m, r) = table, prompt[-2], A_shape
    if is_packed:
        (tokens,), batch = ids, found[0] - 1
        n = triton.cdiv(tokens, max(batch, 1))  # of an average text
    else:
        batch, n = ids
        tokens = batch * n
    m, r = (m, r) if math.prod(A_shape) and tokens else (0, 0)
    if m and not is_packed:
        check_shapes(f"token_at {batch} {m}", token_at=found)
    config, options = _chosen("prompted_embedding", d, r, dtype, dtype, device)
    columns, tiles_s = triton.cdiv(d, config["BLOCK_D"]), triton.cdiv(s, config["BLOCK_T"])
    tiles = columns * (triton.cdiv(m, config["BLOCK_T"]) + tiles_s)
    busy = columns * (triton.cdiv(min(m, n), config["BLOCK_T"]) + tiles_s)  # without positions that texts rarely reach
    runs = min(batch, triton.cdiv(config["PROGRAMS"], max(busy, 1))) if not adapters else batch
    rows = triton.cdiv(batch, max(runs, 1))
    runs = triton.cdiv(batch, max(rows, 1))
    grid = (tiles * runs + batch * triton.cdiv(n, config["BLOCK_T"]),)
    numbers = (scale, batch, n, s, d, m, r, rows, runs, vocabulary, A_shape[0], *strides)
    run = Prepared(prompted_embedding_kernel, grid, numbers, options | {"PACKED": is_packed}, kinds)
    return run, (tokens + batch * s, d) if is_packed else (batch, s + n, d)


def prompted_embedding_backward(
    grad_output: Tensor,
    positions: Tensor,
    A: Tensor,
    B: Tensor,
    scale: float,
    adapter_ids: Tensor | None = None,
    found: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Computes `ept_kernels.prompted_embedding_backward_reference`: 3 launches, 2 with `token_at`, 1 without update."""
    s, (*adapters, m, _) = grad_output.shape[1] - positions.shape[1], A.shape
    has_update = A.numel() and positions.numel()
    if found is None:
        found = token_at(positions, m if has_update else 0)
    A, B = A.contiguous(), B.contiguous()
    adapter_ids = None if adapter_ids is None else adapter_ids.contiguous()
    like = torch.empty_like if has_update else torch.zeros_like
    grad_A, grad_B = like(A), like(B, dtype=A.dtype)
    tensors = (grad_output, found, A, B, adapter_ids)
    first, last, parts_A, parts_B = _backward(launch.kinds(*tensors), grad_output.stride(), s, float(scale))
    grad_prompt = A.new_empty(*adapters, s, B.shape[-1])
    partial_A, partial_B = (A.new_empty(size, dtype=torch.float32) for size in (parts_A, parts_B))
    with launch.on_device(grad_output):
        first(*tensors, grad_prompt, partial_A, partial_B)
        if last is not None:
            last(partial_A, partial_B, grad_A, grad_B)
    return grad_prompt, grad_A, grad_B


@launch.cached_choice
def _backward(kinds: Kinds, strides: Size, s: int, scale: float) -> tuple[Prepared, Prepared | None, int, int]:
    """Prepares both launches, and counts the elements of the partial sums of `grad_A` and `grad_B`."""
    _, (read, _, written, *_), device, (grad, found, A_shape, B, adapter_ids) = kinds
    positions = found[0], grad[1] - s
    check_shapes(BACKWARD, grad_output=grad, positions=positions, A=A_shape, B=B, adapter_ids=adapter_ids)
    (batch, rows, d), (*lead, m, r) = grad, A_shape
    if not math.prod(A_shape) or not batch * (rows - s):
        r = 0
    else:
        check_shapes(f"token_at {batch} {m}", token_at=found)
    adapters = math.prod(lead)
    config, options = _chosen("prompted_embedding_backward", d, r, read, written, device)
    columns = triton.cdiv(d, config["BLOCK_D"])
    tiles = triton.cdiv(m, config["BLOCK_M"]) if r else 0
    grid = (columns * (triton.cdiv(s, config["BLOCK_M"]) + tiles), adapters)
    first = Prepared(prompted_embedding_backward_kernel, grid, (batch, s, d, m, r, *strides), options, kinds)
    if not r:
        return first, None, 0, 0
    config, options = _chosen("prompted_embedding_reduce", d, r, read, written, device)
    grid = (triton.cdiv(m * r, config["BLOCK_E"]) + triton.cdiv(r * d, config["BLOCK_E"]), adapters)
    numbers = (scale, columns, tiles, m * r, r * d)
    last = Prepared(prompted_embedding_reduce_kernel, grid, numbers, options, kinds)
    return first, last, adapters * columns * m * r, adapters * tiles * r * d


def _chosen(
    kernel: str, d: int, r: int, read: torch.dtype, written: torch.dtype, device: torch.device
) -> tuple[Config, dict[str, Any]]:
    """Chooses the configuration and meta-parameters of `kernel`, which reads rows in `read` and writes in `written`."""
    config = launch.config_for(launch.key(kernel, read), (d, launch.padded(r)), device, heuristic(kernel, d, r, read))
    config = bounded(config, d, r)
    options: dict[str, Any] = {name: value for name, value in config.items() if name != "PROGRAMS"}
    if "BLOCK_T" in config:
        options["RANK"] = launch.padded(r) if r else 0
    if "BLOCK_D" in config:
        options["PRECISION"] = launch.precision(written, device)
    return config, options


def heuristic(kernel: str, d: int, r: int = 0, dtype: torch.dtype = torch.bfloat16) -> Config:
    """Chooses meta-parameters of `kernel` at width `d`, rank `r` and the table's `dtype` without a measurement."""
    config = dict(CONFIGS[kernel])
    if kernel == "prompted_embedding_backward" and d <= NARROW:
        config.update(BLOCK_M=32, BLOCK_D=32)
    elif kernel == "prompted_embedding" and dtype.itemsize > 2:
        config["BLOCK_D"] //= 2  # half as many float32 columns fill a tile
        config["num_warps"] = 4  # eight leave a thread too few registers for operands in three pieces
    return bounded(config, d, r)


def bounded(config: Config, d: int, r: int) -> Config:
    """Narrows the column tile to what `d` needs and to the part of B, `[rank, BLOCK_D]`, that fits into registers."""
    if "BLOCK_D" not in config:
        return config
    widest = launch.padded(d)
    if "BLOCK_T" in config:  # the forward holds B's tile throughout
        widest = min(widest, max(16, 1024 * config["num_warps"] // launch.padded(r)))
    return {**config, "BLOCK_D": min(config["BLOCK_D"], widest)}
