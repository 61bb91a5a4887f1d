"""Decoding of 4-bit weights, described in `weight.py`, for all kernels that use them.

Level times absmax is one float32 product, rounded once to the result's type. With nested absmax, product and sum are
rounded one after the other: launchers pass `enable_fp_fusion=False`, without which they fuse and give other bits.

The look-up of the level decides the speed, because ten instructions per weight take as long as the memory traffic:
tiles that are only written load it from a table, products gather it. `docs/kernels.md` counts the alternatives.
"""

import triton
import triton.language as tl
from torch import Tensor

WORD = tl.constexpr(4)  # bytes that the fast paths load at once
WEIGHTS = tl.constexpr(8)  # per word


def is_word_aligned(packed: Tensor, elements: int) -> bool:
    """Checks that `packed` is a whole number of words at a word-aligned address."""
    return elements % WEIGHTS.value == 0 and packed.data_ptr() % WORD.value == 0


@triton.jit
def weight_at(levels, b_unit, b_absmax, SHIFT: tl.constexpr, DTYPE: tl.constexpr):
    """Decodes the weight in the nibble at bit `SHIFT` of each unit: `DTYPE`, shaped like `b_unit` and `b_absmax`."""
    offset = ((b_unit >> (SHIFT - 2)) if SHIFT > 2 else (b_unit << (2 - SHIFT))) & 60  # nibble·4 bytes
    address = levels.to(tl.int64) | offset.to(tl.int64)
    b_level = tl.load(address.to(tl.pointer_type(tl.float32)))
    return (b_level * b_absmax).to(DTYPE)


@triton.jit
def join_8(b_0, b_1, b_2, b_3, b_4, b_5, b_6, b_7):
    """Joins eight tensors to `[..., 2, 2, 2]`, in the order in which it can be reshaped to `[..., 8]`."""
    b_even = tl.join(tl.join(b_0, b_4), tl.join(b_2, b_6))
    b_odd = tl.join(tl.join(b_1, b_5), tl.join(b_3, b_7))
    return tl.join(b_even, b_odd)


@triton.jit
def split_8(b):
    """Undoes `join_8`."""
    b_even, b_odd = tl.split(b)
    b_04, b_26 = tl.split(b_even)
    b_15, b_37 = tl.split(b_odd)
    b_0, b_4 = tl.split(b_04)
    b_1, b_5 = tl.split(b_15)
    b_2, b_6 = tl.split(b_26)
    b_3, b_7 = tl.split(b_37)
    return b_0, b_1, b_2, b_3, b_4, b_5, b_6, b_7


@triton.jit
def decode(levels, b_unit, b_absmax, DTYPE: tl.constexpr, BYTES: tl.constexpr):
    """Decodes the weights in each unit of `BYTES` bytes (1 or 4), in order, along new dimensions of 2: `DTYPE`
    `[..., 2]` or `[..., 2, 2, 2]`, to be reshaped to `[..., 2·BYTES]`. `b_absmax` is shaped like `b_unit`.
    """
    b_unit = b_unit.to(tl.uint32)
    if BYTES == 1:
        b_weight = tl.join(weight_at(levels, b_unit, b_absmax, 4, DTYPE), weight_at(levels, b_unit, b_absmax, 0, DTYPE))
    else:  # the lowest byte comes first, its high nibble before its low one
        b_weight = join_8(
            weight_at(levels, b_unit, b_absmax, 4, DTYPE),
            weight_at(levels, b_unit, b_absmax, 0, DTYPE),
            weight_at(levels, b_unit, b_absmax, 12, DTYPE),
            weight_at(levels, b_unit, b_absmax, 8, DTYPE),
            weight_at(levels, b_unit, b_absmax, 20, DTYPE),
            weight_at(levels, b_unit, b_absmax, 16, DTYPE),
            weight_at(levels, b_unit, b_absmax, 28, DTYPE),
            weight_at(levels, b_unit, b_absmax, 24, DTYPE),
        )
    return b_weight


@triton.jit
def levels_of_tile(levels, b_word):
    """Looks up the levels of the weights in words `[ROWS, WORDS]`, in order: float32 `[ROWS, WORDS, 2, 2, 2]`."""
    ROWS: tl.constexpr = b_word.shape[0]
    WORDS: tl.constexpr = b_word.shape[1]
    # The lowest byte comes first, its high nibble before its low one.
    b_nibble = join_8(
        b_word >> 4, b_word, b_word >> 12, b_word >> 8, b_word >> 20, b_word >> 16, b_word >> 28, b_word >> 24
    )
    # The whole tile at once: each gather writes the table to shared memory, between two barriers.
    b_table = tl.load(levels + tl.arange(0, 16))
    b_level = tl.gather(b_table, tl.reshape((b_nibble & 15).to(tl.int32), [ROWS * WORDS * WEIGHTS]), 0)
    return tl.reshape(b_level, [ROWS, WORDS, 2, 2, 2])


@triton.jit
def load_absmax(absmax, nested, o_block, mask, NESTED_BLOCK_SIZE: tl.constexpr):
    """Loads the scales of blocks `o_block` (int64) in float32, with its shape; `nested`: absmax, code and offset."""
    nested_absmax, nested_code, nested_offset = nested
    if nested_absmax is None:
        b_absmax = tl.load(absmax + o_block, mask=mask, other=0.0)
    else:
        b_code = tl.load(absmax + o_block, mask=mask, other=0).to(tl.int32)
        b_nested = tl.load(nested_absmax + o_block // NESTED_BLOCK_SIZE, mask=mask, other=0.0)
        b_absmax = tl.load(nested_code + b_code) * b_nested + tl.load(nested_offset)
    return b_absmax


@triton.jit
def load_tile(
    packed,
    absmax,
    nested,  # as in load_absmax
    o_n,  # [ROWS] int64
    start,  # first column: a multiple of COLUMNS
    rows,
    last,  # column at which to stop
    columns,  # per row: a multiple of BLOCK_SIZE
    COLUMNS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    NESTED_BLOCK_SIZE: tl.constexpr,
):
    """Loads one stored tile: words `[ROWS, COLUMNS / 8]` and the scales of their blocks `[ROWS, GROUPS]`.

    Weights beyond `rows` and `last` are not read; they decode to some finite value.
    """
    GROUPS: tl.constexpr = COLUMNS // BLOCK_SIZE if BLOCK_SIZE < COLUMNS else 1
    m_n = (o_n < rows)[:, None]
    o_word = start // WEIGHTS + tl.arange(0, COLUMNS // WEIGHTS)
    p_word = packed.to(tl.pointer_type(tl.uint32)) + o_n[:, None] * (columns // WEIGHTS) + o_word[None, :]
    b_word = tl.load(p_word, mask=m_n & (o_word * WEIGHTS < last)[None, :], other=0)
    o_group = start // BLOCK_SIZE + tl.arange(0, GROUPS)
    o_block = o_n[:, None] * (columns // BLOCK_SIZE) + o_group[None, :]
    m_block = m_n & (o_group * BLOCK_SIZE < last)[None, :]
    b_absmax = load_absmax(absmax, nested, o_block, m_block, NESTED_BLOCK_SIZE)  # [ROWS, GROUPS]
    return b_word, b_absmax
