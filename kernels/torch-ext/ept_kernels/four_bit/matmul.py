"""Triton kernel of a product with a 4-bit weight, `x·Wᵀ + bias`, for few tokens, and its launcher.

It computes `outᵀ = W·xᵀ`: the decoded weights are the left operand, which matrix units take from registers, and the
tokens are the narrow side. Columns of both W and x are taken in the order of the nibbles of a word (the first weights
of all words of a tile, then the second ones, …), so that a thread keeps the weights it has decoded. Weights are rounded
to x's type, like dequantised ones; products are accumulated in float32 and rounded once. If there are too few tiles to
fill a GPU, the sum is split; a second launch adds the splits' partial sums in a fixed order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import launch
from ..launch import Config, Kinds, Prepared, Size
from .decode import WEIGHTS, levels_of_tile, load_tile, split_8
from .weight import Weight

# BLOCK_M tokens, BLOCK_N rows and BLOCK_K columns of the weight in a tile. SPLITS, added below: most parts of the sum.
_PRODUCT = {"BLOCK_N": 128, "BLOCK_K": 128, "num_warps": 8, "num_stages": 1}
TILES = (16, 32, 64)  # BLOCK_M; more tokens take several tiles
CONFIGS: dict[str, Config] = {
    **{f"matmul_4bit/{tile}": {"BLOCK_M": tile, **_PRODUCT} for tile in TILES},
    "matmul_4bit_reduce": {"BLOCK_E": 1024, "num_warps": 4, "num_stages": 1},
}
# Number of programs to reach by splitting: several for each multiprocessor of a large GPU.
PROGRAMS = 512

TRITON_TYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


@triton.jit
def _load_x(x, o_m, start, tokens, last, stride_x_m, stride_x_k, BLOCK_K: tl.constexpr):
    """Loads rows `o_m` of `x`, columns from `start` on: `[BLOCK_M, BLOCK_K]`, zero from `tokens` and `last` on."""
    o_k = tl.cast(start, tl.int64) + tl.arange(0, BLOCK_K)
    mask = (o_m < tokens)[:, None] & (o_k < last)[None, :]
    return tl.load(x + o_m[:, None] * stride_x_m + o_k[None, :] * stride_x_k, mask=mask, other=0.0)


@triton.jit(do_not_specialize=["tokens", "tiles"])
def matmul_4bit_kernel(
    packed,  # [rows·columns / 2] bytes
    absmax,  # [blocks] float32, or uint8 if nested
    nested_absmax,  # [ceil(blocks / NESTED_BLOCK_SIZE)] float32, or None
    nested_code,  # [256] float32, or None
    nested_offset,  # [1] float32, or None
    levels,  # [16] float32
    x,  # [tokens, columns]
    bias,  # [rows], or None
    out,  # [splits, tokens, rows], contiguous: the result, or partial sums in float32
    # Shape
    tokens,
    rows,
    columns,
    tiles,  # of columns, per split
    # Strides
    stride_x_m,
    stride_x_k,
    # Meta-parameters
    BLOCK_SIZE: tl.constexpr,
    NESTED_BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    OPERAND: tl.constexpr,
):
    """Computes one tile of `outᵀ` over one split of the columns, loading the next tiles while one is multiplied."""
    nested = (nested_absmax, nested_code, nested_offset)
    o_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    i_split = tl.program_id(1)
    o_m = tl.program_id(2).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    first = i_split * tiles * BLOCK_K
    last = tl.minimum(first + tiles * BLOCK_K, columns)

    b_next = load_tile(packed, absmax, nested, o_n, first, rows, last, columns, BLOCK_K, BLOCK_SIZE, NESTED_BLOCK_SIZE)
    b_next_x = _load_x(x, o_m, first, tokens, last, stride_x_m, stride_x_k, BLOCK_K)
    b_out = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for start in tl.range(first, last, BLOCK_K, num_stages=1):
        b_word, b_absmax = b_next
        b_x = b_next_x
        following = start + BLOCK_K
        b_next = load_tile(
            packed, absmax, nested, o_n, following, rows, last, columns, BLOCK_K, BLOCK_SIZE, NESTED_BLOCK_SIZE
        )
        b_next_x = _load_x(x, o_m, following, tokens, last, stride_x_m, stride_x_k, BLOCK_K)
        GROUPS: tl.constexpr = b_absmax.shape[1]  # of words that share a scale
        b_absmax = tl.broadcast_to(b_absmax[:, :, None], [BLOCK_N, GROUPS, BLOCK_K // WEIGHTS // GROUPS])
        b_absmax = tl.reshape(b_absmax, [BLOCK_N, BLOCK_K // WEIGHTS])
        b_level = split_8(levels_of_tile(levels, b_word))
        b_x = split_8(tl.reshape(b_x.to(OPERAND), [BLOCK_M, BLOCK_K // WEIGHTS, 2, 2, 2]))
        for j in tl.static_range(WEIGHTS):  # columns j, j + 8, j + 16, …
            b_W = (b_level[j] * b_absmax).to(OPERAND)  # [BLOCK_N, words]
            b_out = tl.dot(b_W, tl.trans(b_x[j]), b_out, input_precision="ieee")

    if bias is not None:
        b_out += tl.load(bias + o_n, mask=o_n < rows, other=0.0).to(tl.float32)[:, None]
    p_out = out + (i_split.to(tl.int64) * tokens + o_m)[:, None] * rows + o_n[None, :]
    mask = (o_m < tokens)[:, None] & (o_n < rows)[None, :]
    tl.store(p_out, tl.trans(b_out).to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["splits"])
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


def fused_product(x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
    """Computes `x·Wᵀ + bias` for `x` `[tokens, columns]` in its type, in one launch or, with splits, in two."""
    product, total, splits = _prepared(launch.kinds(*weight[:5], x, bias), weight[6:], x.stride())
    out = x.new_empty(x.shape[0], weight.rows)
    with launch.on_device(x):
        if total is None:
            product(*weight.pointers(), x, bias, out)
            return out
        partial = x.new_empty(splits, *out.shape, dtype=torch.float32)
        product(*weight.pointers(), x, None, partial)
        total(partial, bias, out)
    return out


@launch.cached_choice
def _prepared(kinds: Kinds, sizes: tuple[int, ...], strides: Size) -> tuple[Prepared, Prepared | None, int]:
    """Prepares the product, in the smallest tile that holds the tokens (or the largest), and the sum of its splits."""
    block_size, nested_block_size, rows, columns = sizes
    _, (*_, dtype, _), device, (*_, (tokens, _), _) = kinds
    # In tensor memory each of the eight products of a step has its own columns: eight times 64 is all there is.
    tiles = TILES[:-1] if launch.has_tensor_memory(device) else TILES
    tile = next((size for size in tiles if tokens <= size), tiles[-1])
    name = f"matmul_4bit/{tile}"
    config = launch.config_for(launch.key(name, dtype), (rows, columns), device, heuristic(name, rows, columns))
    tiles_of_columns = triton.cdiv(columns, config["BLOCK_K"])
    tiles_a_split = triton.cdiv(tiles_of_columns, config["SPLITS"])
    splits = triton.cdiv(tiles_of_columns, tiles_a_split)
    options = {
        **{name: value for name, value in config.items() if name != "SPLITS"},
        "BLOCK_SIZE": block_size,
        "NESTED_BLOCK_SIZE": nested_block_size,
        "OPERAND": TRITON_TYPES[operand_type(dtype, device)],
        "enable_fp_fusion": False,  # nested absmax is rounded as in a dequantisation
        **launch.all_registers(device),  # otherwise the assembler spills a few on sm_80
    }
    grid = (triton.cdiv(rows, config["BLOCK_N"]), splits, triton.cdiv(tokens, config["BLOCK_M"]))
    product = Prepared(matmul_4bit_kernel, grid, (tokens, rows, columns, tiles_a_split, *strides), options, kinds)
    if splits == 1:
        return product, None, 1
    config, elements = CONFIGS["matmul_4bit_reduce"], tokens * rows
    sums = (triton.cdiv(elements, config["BLOCK_E"]),)
    return product, Prepared(matmul_4bit_reduce_kernel, sums, (splits, elements, rows), config, kinds), splits


def heuristic(kernel: str, rows: int, columns: int) -> Config:
    """Chooses meta-parameters of `kernel`, such as `"matmul_4bit/16"`, without a measurement."""
    config = dict(CONFIGS[kernel])
    wanted = PROGRAMS // triton.cdiv(rows, config["BLOCK_N"])
    # Partial sums, written and read, should not exceed the packed weight's bytes; a split has at least four tiles.
    affordable = columns // (16 * config["BLOCK_M"])
    return {**config, "SPLITS": max(1, min(wanted, affordable, columns // (4 * config["BLOCK_K"])))}


def operand_type(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Returns the type in which `dtype` tokens are multiplied: float32 in the interpreter, without 16-bit products."""
    return torch.float32 if launch.architecture(device) == "cpu" else dtype
