"""Launch choices of the fused products with a 4-bit weight, and sums over splits.

Too few tiles to fill a GPU are split along the sum; the splits' partial sums are added in a fixed order by a second
launch. `paths.py` says when these kernels are taken, and what else there is.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import (
    Config,
    Prepared,
    Size,
    all_registers,
    architecture,
    cached_choice,
    config_for,
    key,
    kinds,
    on_device,
)
from .decode import Weight

# BLOCK_M tokens, BLOCK_N rows and BLOCK_K columns of the weight in a tile. With SPLITS added: of the sum, at most.
_PRODUCT = {"BLOCK_N": 128, "BLOCK_K": 128, "num_warps": 8, "num_stages": 1}
TILES = (16, 32, 64)  # BLOCK_M; more tokens take several
CONFIGS: dict[str, Config] = {
    **{f"matmul_4bit/{tile}": {"BLOCK_M": tile, **_PRODUCT} for tile in TILES},
    "matmul_4bit_reduce": {"BLOCK_E": 1024, "num_warps": 4, "num_stages": 1},
}
# Programs that splitting is to bring about: several for each multiprocessor of a large GPU.
PROGRAMS = 512

TRITON_TYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


def heuristic(kernel: str, rows: int, columns: int) -> Config:
    """Chooses meta-parameters of `kernel`, such as `"matmul_4bit/16"`, where nothing was measured."""
    config = dict(CONFIGS[kernel])
    wanted = PROGRAMS // triton.cdiv(rows, config["BLOCK_N"])
    # Partial sums, written and read, are to be no more bytes than the packed weight; a split has four tiles or more.
    affordable = columns // (16 * config["BLOCK_M"])
    return {**config, "SPLITS": max(1, min(wanted, affordable, columns // (4 * config["BLOCK_K"])))}


def operand_type(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Says what `dtype` tokens are multiplied in: under the interpreter float32, it has no 16-bit products."""
    return torch.float32 if architecture(device) == "cpu" else dtype


@triton.jit(do_not_specialize=["splits", "elements"])
def matmul_4bit_reduce_kernel(
    partial,  # [splits, tokens, width] float32, contiguous
    bias,  # [width], or None
    out,  # [tokens, width], contiguous
    # Shape
    splits,
    elements,  # tokens·width
    width,
    # Meta-parameters
    BLOCK_E: tl.constexpr,
):
    """Computes `out = Σ partial + bias`, split by split."""
    o_e = tl.program_id(0).to(tl.int64) * BLOCK_E + tl.arange(0, BLOCK_E)
    m_e = o_e < elements
    b_out = tl.zeros([BLOCK_E], tl.float32)
    for i_split in range(splits):
        b_out += tl.load(partial + tl.cast(i_split, tl.int64) * elements + o_e, mask=m_e, other=0.0)
    if bias is not None:
        b_out += tl.load(bias + o_e % width, mask=m_e, other=0.0).to(tl.float32)
    tl.store(out + o_e, b_out.to(out.dtype.element_ty), mask=m_e)


def run(kernel: Any, tokens: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
    """Launches `kernel` for `tokens` `[M, …]`, and adds up its splits if there are several.

    Returns `[M, rows]` in the type of `tokens`.
    """
    types = kinds(*weight[:5], tokens, bias)
    product, total, splits = _prepared(
        kernel, types, weight[6:], tokens.shape[0], tokens.stride(), tokens.dtype, tokens.device
    )
    out = tokens.new_empty(tokens.shape[0], weight.rows)
    with on_device(tokens):
        if total is None:
            product(*weight.pointers(), tokens, bias, out)
            return out
        partial = tokens.new_empty(splits, *out.shape, dtype=torch.float32)
        product(*weight.pointers(), tokens, None, partial)
        total(partial, bias, out)
    return out


@cached_choice
def _prepared(
    kernel: Any,
    kinds: tuple[Any, ...],
    sizes: tuple[int, ...],
    tokens: int,
    strides: Size,
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[Prepared, Prepared | None, int]:
    """Prepares the product and, where it is split, the sum; takes the smallest tile that holds the tokens, or the
    largest there is.
    """
    block_size, nested_block_size, rows, columns = sizes
    tile = next((size for size in TILES if tokens <= size), TILES[-1])
    name = f"matmul_4bit/{tile}"
    config = config_for(key(name, dtype), (rows, columns), device, heuristic(name, rows, columns))
    tiles = triton.cdiv(columns, config["BLOCK_K"])
    tiles_a_split = triton.cdiv(tiles, config["SPLITS"])
    splits = triton.cdiv(tiles, tiles_a_split)
    options = {
        **{name: value for name, value in config.items() if name != "SPLITS"},
        "BLOCK_SIZE": block_size,
        "NESTED_BLOCK_SIZE": nested_block_size,
        "OPERAND": TRITON_TYPES[operand_type(dtype, device)],
        "enable_fp_fusion": False,  # so that nested absmax is rounded as in a dequantisation
        **all_registers(device),  # the assembler otherwise spills a few on sm_80
    }
    grid = (triton.cdiv(rows, config["BLOCK_N"]), splits, triton.cdiv(tokens, config["BLOCK_M"]))
    product = Prepared(kernel, grid, (tokens, rows, columns, tiles_a_split, *strides), options, kinds)
    if splits == 1:
        return product, None, 1
    config, elements = CONFIGS["matmul_4bit_reduce"], tokens * rows
    sums = (triton.cdiv(elements, config["BLOCK_E"]),)
    return product, Prepared(matmul_4bit_reduce_kernel, sums, (splits, elements, rows), config, kinds), splits
