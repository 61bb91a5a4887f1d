"""Triton kernel that dequantises bitsandbytes' 4-bit weights in one launch, including nested absmax, with equal bits.

A program handles a run of tiles. In a tile each thread reads one word of four bytes and writes its eight weights, for a
16-bit type with the widest access there is; threads exchange nothing. Sizes that are not whole words are read by bytes.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import launch
from ..launch import Config, Kinds, Prepared
from .decode import decode, is_word_aligned, load_absmax
from .weight import Weight

# UNITS: words or bytes in a tile, one per thread; with more, a warp's loads have gaps, and words move between
# threads. ITERS: tiles per program; all their loads are started before anything is stored.
CONFIGS: dict[str, Config] = {"dequantize_4bit": {"UNITS": 128, "ITERS": 4, "num_warps": 4, "num_stages": 1}}


@triton.jit(do_not_specialize=["elements"])
def dequantize_4bit_kernel(
    packed,  # [ceil(elements / 2)] bytes
    absmax,  # [blocks] float32, or uint8 if nested
    nested_absmax,  # [ceil(blocks / NESTED_BLOCK_SIZE)] float32, or None
    nested_code,  # [256] float32, or None
    nested_offset,  # [1] float32, or None
    levels,  # [16] float32
    out,  # [elements]
    # Shape
    elements,
    # Meta-parameters
    BLOCK_SIZE: tl.constexpr,
    NESTED_BLOCK_SIZE: tl.constexpr,
    BYTES: tl.constexpr,  # per unit: 4, or 1 for any address and number of elements
    UNITS: tl.constexpr,
    ITERS: tl.constexpr,
):
    """Dequantises `ITERS` tiles of `UNITS·2·BYTES` neighbouring elements."""
    TILE: tl.constexpr = UNITS * 2 * BYTES
    first = tl.program_id(0).to(tl.int64) * (TILE * ITERS)
    left = tl.minimum(elements - first, TILE * ITERS).to(tl.int32)
    nested = (nested_absmax, nested_code, nested_offset)
    o_unit = tl.arange(0, UNITS) * (2 * BYTES)  # in elements, relative to the tile's first one
    o_weight = o_unit[:, None] + tl.arange(0, 2 * BYTES)[None, :]  # [UNITS, 2·BYTES]
    p_unit = packed + first // 2
    if BYTES > 1:
        p_unit = p_unit.to(tl.pointer_type(tl.uint32))
    p_unit += tl.arange(0, UNITS)
    p_weight = out + first + o_weight
    # Tiles differ by constants that are added last, so that they fit into loads and stores.
    units, scales = (), ()  # type: tuple[Any, ...], tuple[Any, ...]
    for i in tl.static_range(ITERS):
        m_unit = o_unit < left - i * TILE
        # Both are powers of two: a tile is part of one block, or whole blocks.
        if TILE < BLOCK_SIZE:
            o_block = (first + i * TILE) // BLOCK_SIZE + tl.zeros([UNITS], tl.int64)
        else:
            o_block = first // BLOCK_SIZE + o_unit // BLOCK_SIZE + i * (TILE // BLOCK_SIZE)
        units += (tl.load(p_unit + i * UNITS, mask=m_unit, other=0),)
        scales += (load_absmax(absmax, nested, o_block, m_unit, NESTED_BLOCK_SIZE),)
    for i in tl.static_range(ITERS):
        b_weight = decode(levels, units[i], scales[i], out.dtype.element_ty, BYTES)
        # The last byte may hold a single weight; words are full.
        m_weight = (o_weight if BYTES == 1 else o_unit[:, None]) < left - i * TILE
        tl.store(p_weight + i * TILE, tl.reshape(b_weight, [UNITS, 2 * BYTES]), mask=m_weight)


def heuristic(device: torch.device) -> Config:
    """Chooses meta-parameters without a measurement: one word per thread, where AMD's warps have 64 threads."""
    return {**CONFIGS["dequantize_4bit"], "UNITS": 256 if launch.architecture(device) in ("gfx942", "hip") else 128}


def dequantize_4bit(*arguments: Any) -> Tensor:
    """Computes `ept_kernels.dequantize_4bit_reference` of a weight's tensors and sizes and a type in one launch."""
    weight, dtype = Weight(*arguments[:-1]), arguments[-1]
    out = weight.packed.new_empty(weight.rows, weight.columns, dtype=dtype)
    unit = 4 if is_word_aligned(weight.packed, weight.rows * weight.columns) else 1
    run = _prepared(launch.kinds(*weight[:5]), unit, weight[6:], dtype)
    with launch.on_device(weight.packed):
        run(*weight.pointers(), out)
    return out


@launch.cached_choice
def _prepared(kinds: Kinds, unit: int, sizes: tuple[int, ...], dtype: torch.dtype) -> Prepared:
    block_size, nested_block_size, rows, columns = sizes
    device = kinds[2]
    kernel, elements = launch.key("dequantize_4bit", dtype), rows * columns
    config = launch.config_for(kernel, elements, device, heuristic(device))
    constants = {"BLOCK_SIZE": block_size, "NESTED_BLOCK_SIZE": nested_block_size, "BYTES": unit}
    options = {**config, **constants, "enable_fp_fusion": False}
    grid = (triton.cdiv(elements, config["UNITS"] * 2 * unit * config["ITERS"]),)
    return Prepared(dequantize_4bit_kernel, grid, (elements,), options, kinds)
