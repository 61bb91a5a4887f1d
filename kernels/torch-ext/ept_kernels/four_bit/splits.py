"""Launch choices of the fused products with a 4-bit weight, and sums over splits.

Too few tiles to fill a GPU are split along the sum; the splits' partial sums are added in a fixed order by a second
launch. `paths.py` says when these kernels are taken, and what else there is.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import Config, all_registers, architecture, cached_choice, config_for, key, launch, on_device
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


class Plan(NamedTuple):
    """A product's launch but for the number of tokens."""

    tiles_across: int  # of the results of a token
    splits: int
    tiles: int  # in a split
    options: dict[str, Any]  # meta-parameters

    def grid(self, tokens: int) -> tuple[int, int, int]:
        return self.tiles_across, self.splits, triton.cdiv(tokens, self.options["BLOCK_M"])


def plan(tokens: int, weight: Weight, dtype: torch.dtype) -> Plan:
    """Takes the smallest tile that holds `tokens` of `dtype`, or the largest there is."""
    tile = next((size for size in TILES if tokens <= size), TILES[-1])
    sizes = (weight.block_size, weight.nested_block_size)
    return _plan(f"matmul_4bit/{tile}", weight.rows, weight.columns, sizes, dtype, weight.packed.device)


@cached_choice
def _plan(
    kernel: str, rows: int, columns: int, sizes: tuple[int, int], dtype: torch.dtype, device: torch.device
) -> Plan:
    config = config_for(key(kernel, dtype), (rows, columns), device, heuristic(kernel, rows, columns))
    tiles = triton.cdiv(columns, config["BLOCK_K"])
    tiles_a_split = triton.cdiv(tiles, config["SPLITS"])
    options = {
        **{name: value for name, value in config.items() if name != "SPLITS"},
        "BLOCK_SIZE": sizes[0],
        "NESTED_BLOCK_SIZE": sizes[1],
        "OPERAND": TRITON_TYPES[operand_type(dtype, device)],
        "enable_fp_fusion": False,  # so that nested absmax is rounded as in a dequantisation
        **all_registers(device),  # the assembler otherwise spills a few on sm_80
    }
    return Plan(triton.cdiv(rows, config["BLOCK_N"]), triton.cdiv(tiles, tiles_a_split), tiles_a_split, options)


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
    M, results = tokens.shape[0], weight.rows
    chosen = plan(M, weight, tokens.dtype)
    out = tokens.new_empty(M, results)
    shape, strides = (M, weight.rows, weight.columns, chosen.tiles), tokens.stride()
    with on_device(tokens):
        if chosen.splits == 1:
            launch(kernel, chosen.grid(M), *weight.pointers(), tokens, bias, out, *shape, *strides, **chosen.options)
            return out
        partial = tokens.new_empty(chosen.splits, M, results, dtype=torch.float32)
        launch(kernel, chosen.grid(M), *weight.pointers(), tokens, None, partial, *shape, *strides, **chosen.options)
        config = CONFIGS["matmul_4bit_reduce"]
        grid = (triton.cdiv(M * results, config["BLOCK_E"]),)
        launch(matmul_4bit_reduce_kernel, grid, partial, bias, out, chosen.splits, M * results, results, **config)
    return out
