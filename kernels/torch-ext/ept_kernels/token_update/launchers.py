"""Launchers of the Triton kernels of the token-dependent update, and their choices."""

from typing import Any

import torch
import triton
from torch import Tensor

from .. import launch
from ..launch import Config, Kinds, Prepared, Size
from ..library import check_shapes
from .kernels import (
    prompted_embedding_by_token_backward_kernel,
    prompted_embedding_by_token_before_kernel,
    prompted_embedding_by_token_kernel,
    prompted_embedding_by_token_reduce_kernel,
)
from .reference import (
    BACKWARD,
    FORWARD,
    prompted_embedding_by_token_backward_reference,
    prompted_embedding_by_token_reference,
)

_TILES = {"BLOCK_T": 16, "BLOCK_D": 64, "num_warps": 4, "num_stages": 2}

# Meta-parameters by kernel, used without a measurement. PROGRAMS: wanted number of programs, which determines how many
# tokens each of them handles.
CONFIGS: dict[str, Config] = {
    "prompted_embedding_by_token": {**_TILES, "BLOCK_T": 32},
    "prompted_embedding_by_token_before": _TILES,
    "prompted_embedding_by_token_backward": {**_TILES, "PROGRAMS": 512},
    "prompted_embedding_by_token_reduce": {"BLOCK_E": 256, "BLOCK_P": 16, "num_warps": 4, "num_stages": 2},
}
# Elements of a tile of W_in or W_out, [rank, BLOCK_D], that fit into registers beside the others; fewer for products
# of operands in three pieces.
HELD = {
    "prompted_embedding_by_token": 2048,
    "prompted_embedding_by_token_before": 512,
    "prompted_embedding_by_token_backward": 1024,
}
MAX_RANK = 256  # of the activations that a program holds at once; with a larger one it spills, or runs out of memory
MOST = 64  # of the rank at a time in a product with W_out, and in a program of the sums


def prompted_embedding_by_token(
    input_ids: Tensor,
    positions: Tensor,
    table: Tensor,
    prompt: Tensor,
    W_in: Tensor,
    b_in: Tensor,
    W_out: Tensor,
    b_out: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Computes `ept_kernels.prompted_embedding_by_token_reference` in one launch."""
    if W_in.shape[1] > MAX_RANK:
        return prompted_embedding_by_token_reference(
            input_ids, positions, table, prompt, W_in, b_in, W_out, b_out, scale
        )
    parameters = (x.contiguous() for x in (prompt, W_in, b_in, W_out, b_out))
    tensors = (input_ids.contiguous(), positions.contiguous(), table, *parameters)
    run, shape, of_hidden = _forward(launch.kinds(*tensors), table.stride(), float(scale))
    out, hidden = table.new_empty(*shape), table.new_empty(*of_hidden, dtype=torch.float32)
    with launch.on_device(table):
        run(*tensors, out, hidden)
    return out, hidden


@launch.cached_choice
def _forward(kinds: Kinds, strides: Size, scale: float) -> tuple[Prepared, Size, Size]:
    """Prepares the launch, and computes the shapes of its results."""
    _, (_, _, dtype, *_), device, shapes = kinds
    names = ("input_ids", "positions", "table", "prompt", "W_in", "b_in", "W_out", "b_out")
    check_shapes(FORWARD, **dict(zip(names, shapes)))
    (batch, n), _, (vocabulary, d), (s, _), (_, r), *_ = shapes
    options = _chosen("prompted_embedding_by_token", d, r, dtype, dtype, device)
    options["STEP"] = min(options["RANK"], MOST)
    tiles = triton.cdiv(n, options["BLOCK_T"]) + triton.cdiv(s, options["BLOCK_T"])
    numbers = (scale, n, s, d, r, vocabulary, *strides)
    run = Prepared(prompted_embedding_by_token_kernel, (batch * tiles,), numbers, options, kinds)
    return run, (batch, s + n, d), (batch, n, r)


def prompted_embedding_by_token_backward(
    grad_output: Tensor,
    input_ids: Tensor,
    positions: Tensor,
    table: Tensor,
    W_out: Tensor,
    hidden: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Computes `ept_kernels.prompted_embedding_by_token_backward_reference` in three launches."""
    if W_out.shape[0] > MAX_RANK:
        return prompted_embedding_by_token_backward_reference(
            grad_output, input_ids, positions, table, W_out, hidden, scale
        )
    input_ids, positions, W_out, hidden = (x.contiguous() for x in (input_ids, positions, W_out, hidden))
    kinds = launch.kinds(grad_output, input_ids, positions, table, W_out, hidden)
    first, second, last, parts = _backward(kinds, grad_output.stride(), table.stride(), float(scale))
    (r, d), s = W_out.shape, grad_output.shape[1] - positions.shape[1]
    before = hidden.new_empty(hidden.shape)
    shapes = (d, r), (r,), (r, d), (d,)
    grad_prompt = W_out.new_empty(s, d)
    gradients = [W_out.new_empty(shape) for shape in shapes]
    partial = [hidden.new_empty(parts, *shape) for shape in shapes]
    with launch.on_device(grad_output):
        first(grad_output, positions, W_out, hidden, before)
        second(grad_output, input_ids, positions, table, hidden, before, grad_prompt, *partial)
        last(*partial, *gradients)
    grad_W_in, grad_b_in, grad_W_out, grad_b_out = gradients
    return grad_prompt, grad_W_in, grad_b_in, grad_W_out, grad_b_out, before


@launch.cached_choice
def _backward(kinds: Kinds, of_grad: Size, of_table: Size, scale: float) -> tuple[Prepared, Prepared, Prepared, int]:
    """Prepares the three launches, and computes how many programs, each with its own sums, share a column tile."""
    _, (read, _, _, _, written, _), device, shapes = kinds
    names = ("grad_output", "input_ids", "positions", "table", "W_out", "hidden")
    check_shapes(BACKWARD, **dict(zip(names, shapes)))
    (batch, rows, d), (_, n), _, (vocabulary, _), (r, _), _ = shapes
    s = rows - n
    options = _chosen("prompted_embedding_by_token_before", d, r, read, written, device)
    grid = (batch * triton.cdiv(n, options["BLOCK_T"]),)
    first = Prepared(prompted_embedding_by_token_before_kernel, grid, (scale, n, s, d, r, *of_grad), options, kinds)
    options = _chosen("prompted_embedding_by_token_backward", d, r, read, written, device)
    columns, tiles = triton.cdiv(d, options["BLOCK_D"]), batch * triton.cdiv(n, options["BLOCK_T"])
    each = triton.cdiv(max(tiles, 1), triton.cdiv(options.pop("PROGRAMS"), columns))
    parts = triton.cdiv(max(tiles, 1), each)
    options["RANK"] = min(options["RANK"], MOST)
    ranks = triton.cdiv(max(r, 1), options["RANK"])
    grid = (columns * (parts * ranks + triton.cdiv(s, options["BLOCK_T"])),)
    numbers = (batch, n, s, d, r, vocabulary, each, parts, *of_grad, *of_table)
    second = Prepared(prompted_embedding_by_token_backward_kernel, grid, numbers, options, kinds)
    options = _chosen("prompted_embedding_by_token_reduce", d, r, read, written, device)
    of_W, of_b, of_h = (triton.cdiv(size, options["BLOCK_E"]) for size in (d * r, d, r))
    last = Prepared(
        prompted_embedding_by_token_reduce_kernel, (2 * of_W + of_b + of_h,), (scale, parts, d, r), options, kinds
    )
    return first, second, last, parts


def _chosen(
    kernel: str, d: int, r: int, read: torch.dtype, written: torch.dtype, device: torch.device
) -> dict[str, Any]:
    """Chooses the meta-parameters of `kernel`, which reads rows in `read` and writes in `written`."""
    default = heuristic(kernel, d, r, read)
    config = launch.config_for(launch.key(kernel, read), (d, launch.padded(r)), device, default)
    options: dict[str, Any] = bounded(kernel, config, d, r)
    if "BLOCK_D" in config:
        options |= {"RANK": launch.padded(r), "PRECISION": launch.precision(written, device)}
        options |= launch.all_registers(device)
    return options


def heuristic(kernel: str, d: int, r: int, dtype: torch.dtype = torch.bfloat16) -> Config:
    """Chooses meta-parameters of `kernel` at width `d`, rank `r` and the table's `dtype` without a measurement."""
    config = dict(CONFIGS[kernel])
    if kernel == "prompted_embedding_by_token" and dtype.itemsize > 2:
        config |= {"BLOCK_T": 16, "BLOCK_D": 32}  # a quarter for operands in three pieces
    if kernel == "prompted_embedding_by_token" and launch.padded(r) > MOST:
        config["num_warps"] = 8  # with four warps, a thread has too few registers for so many activations
    return bounded(kernel, config, d, r)


def bounded(kernel: str, config: Config, d: int, r: int) -> Config:
    """Narrows the column tile to what `d` needs and to the part of a matrix `[rank, BLOCK_D]` that registers hold."""
    if "BLOCK_D" not in config:
        return dict(config)
    widest = min(launch.padded(d), max(16, HELD[kernel] // min(launch.padded(r), MOST)))
    return {**config, "BLOCK_D": min(config["BLOCK_D"], widest)}
