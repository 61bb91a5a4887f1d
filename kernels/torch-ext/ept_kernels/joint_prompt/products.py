"""Triton kernels of the joint prompt's inner products: everything that has to be reduced over the width d.

The left rows `[p; B; g]` are multiplied with the right rows `[p; B; W_qᵀ; W_kᵀ; Dᵀ; Gᵀ; U]` (`g` and `U` belong to the
backward). Each of these groups is padded to whole tiles of `UNIT` rows, with zeros, so that a tile belongs to one group
and whatever reads the result needs no mask. The width is split into parts, to fill a GPU; a second launch adds them up
in order, which gives the same bits on every run.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .reference import NORM_EPS

EPS = tl.constexpr(NORM_EPS)
UNIT = 32  # rows and columns of a tile of the inner products: what each group is padded to
TILE = tl.constexpr(UNIT)


@triton.jit
def up(size):
    """Pads `size` to whole tiles."""
    return tl.cdiv(size, TILE) * TILE


@triton.jit
def dot(a, b, PRECISION: tl.constexpr):
    """Multiplies two float32 tiles, accumulated in float32."""
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def load_rows(x, o_i, o_d, rows, d):
    """Loads rows `o_i`, columns `o_d` of `x` `[rows, d]` in float32, zero beyond its edges."""
    mask = (o_i < rows)[:, None] & (o_d < d)[None, :]
    return tl.load(x + o_i.to(tl.int64)[:, None] * d + o_d[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def load_columns(x, o_i, o_d, columns, d):
    """Loads `[o_i, o_d]` of the transpose of `x` `[d, columns]`, as `load_rows` would, reading along the columns."""
    mask = (o_d < d)[:, None] & (o_i < columns)[None, :]
    b_x = tl.load(x + o_d.to(tl.int64)[:, None] * columns + o_i[None, :], mask=mask, other=0.0)
    return tl.trans(b_x.to(tl.float32))


@triton.jit
def columns_of(s, r, a, columns, K):
    """Counts where the columns of B, W_q, W_k, D, G and U begin in the matrix of inner products; those of p are first.

    Its rows are those of p, B and, from where the columns of W_q begin, g.
    """
    first_B = up(s)
    first_q = first_B + up(r)
    first_D = first_q + 2 * up(a)
    first_G = first_D + up(columns)
    return first_B, first_q, first_q + up(a), first_D, first_G, first_G + up(K)


@triton.jit
def _is_needed(row, column, s, r, a, columns, K):
    """Tells whether anything reads the tile at `row`, `column` of the matrix."""
    first_B, first_q, first_k, first_D, _, first_U = columns_of(s, r, a, columns, K)
    of_p, of_g, to_U = row < first_B, row >= first_q, column >= first_U
    to_B = (column >= first_B) & (column < first_q)
    to_k = (column >= first_k) & (column < first_D)
    return (of_p & ~to_U) | (of_g & ((column < first_q) | to_U)) | (~of_p & ~of_g & (to_B | to_k))


@triton.jit(do_not_specialize=["s", "r", "a", "columns", "K", "depth"])
def joint_prompt_products_kernel(
    prompt,  # [s, d]
    B,  # [r, d]
    grad_output,  # [s, d], or the prompt in the forward
    W_q,  # [d, a]
    W_k,  # [d, a]
    D,  # [d, columns]
    G,  # [d, K]
    U,  # [columns, d]
    partial,  # [parts, rows, width] float32
    # Shape
    s,
    r,
    a,
    columns,  # K·h
    K,
    d,
    depth,  # columns of d in a part
    # Meta-parameters
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Computes one tile of one part of the inner products."""
    row, column = tl.program_id(1) * TILE, tl.program_id(0) * TILE
    i_part = tl.program_id(2)
    width = tl.num_programs(0) * TILE
    first_B, first_q, first_k, first_D, first_G, first_U = columns_of(s, r, a, columns, K)
    if _is_needed(row, column, s, r, a, columns, K):
        # Chosen by `where`, not by branches: Triton 3.6 cannot compile a pointer that leaves a branch for AMD GPUs.
        of_B, of_g = (row >= first_B) & (row < first_q), row >= first_q
        x = tl.where(of_g, grad_output, tl.where(of_B, B, prompt))
        rows = tl.where(of_B, r, s)
        o_i = row - tl.where(of_g, first_q, tl.where(of_B, first_B, 0)) + tl.arange(0, TILE)
        begin, end = i_part * depth, tl.minimum(i_part * depth + depth, d)
        b_sum = tl.zeros([TILE, TILE], tl.float32)
        if (column < first_q) | (column >= first_U):
            to_B, to_U = (column >= first_B) & (column < first_q), column >= first_U
            y = tl.where(to_U, U, tl.where(to_B, B, prompt))
            count = tl.where(to_U, columns, tl.where(to_B, r, s))
            o_j = column - tl.where(to_U, first_U, tl.where(to_B, first_B, 0)) + tl.arange(0, TILE)
            for k in range(begin, end, BLOCK_K):
                o_d = k + tl.arange(0, BLOCK_K)
                b_x = load_rows(x, o_i, o_d, rows, d)
                b_sum += dot(b_x, tl.trans(load_rows(y, o_j, o_d, count, d)), PRECISION)
        else:
            to_k, to_D, to_G = column >= first_k, column >= first_D, column >= first_G
            z = tl.where(to_G, G, tl.where(to_D, D, tl.where(to_k, W_k, W_q)))
            count = tl.where(to_G, K, tl.where(to_D, columns, a))
            start = tl.where(to_G, first_G, tl.where(to_D, first_D, tl.where(to_k, first_k, first_q)))
            o_j = column - start + tl.arange(0, TILE)
            for k in range(begin, end, BLOCK_K):
                o_d = k + tl.arange(0, BLOCK_K)
                b_x = load_rows(x, o_i, o_d, rows, d)
                b_sum += dot(b_x, tl.trans(load_columns(z, o_j, o_d, count, d)), PRECISION)
        o_row = i_part.to(tl.int64) * tl.num_programs(1) * TILE + row + tl.arange(0, TILE)
        tl.store(partial + o_row[:, None] * width + column + tl.arange(0, TILE)[None, :], b_sum)


@triton.jit
def _add_parts(partial, row, column, parts, rows, width):
    """Loads the tile at `row`, `column`, its parts added up in order."""
    o_row = row.to(tl.int64) + tl.arange(0, TILE)
    p_part = partial + o_row[:, None] * width + column + tl.arange(0, TILE)[None, :]
    b_sum = tl.load(p_part)
    for i in range(1, parts):
        b_sum += tl.load(p_part + tl.cast(i, tl.int64) * rows * width)
    return b_sum


@triton.jit(do_not_specialize=["parts", "s", "r", "a", "columns", "K"])
def joint_prompt_sum_kernel(
    partial,  # [parts, rows, width] float32
    products,  # [rows, width] float32
    inverse_rms,  # [up(s)] float32, of the prompt's rows
    # Shape
    parts,
    s,
    r,
    a,
    columns,
    K,
    d,
    # Meta-parameters
    MAPS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Adds up the parts of one tile.

    With maps, the products of `p`'s rows with those of `p` and `B` become those of queries and keys:
    `(p·W_q)·(p·W_k)ᵀ` and `(p·W_q)·(B·W_k)ᵀ`.
    """
    column, row = tl.program_id(0) * TILE, tl.program_id(1) * TILE
    width, rows = tl.num_programs(0) * TILE, tl.num_programs(1) * TILE
    if _is_needed(row, column, s, r, a, columns, K):
        o_i = tl.arange(0, TILE)
        b_sum = _add_parts(partial, row, column, parts, rows, width)
        if (row < up(s)) & (column == row):
            b_square = tl.sum(tl.where(o_i[:, None] == o_i[None, :], b_sum, 0.0), 1)
            tl.store(inverse_rms + row + o_i, tl.rsqrt(b_square / d + EPS))
        first_B, first_q, first_k, _first_D, _first_G, _first_U = columns_of(s, r, a, columns, K)
        if MAPS:  # noqa: SIM102 - one is a constant, the other is not
            if (row < first_B) & (column < first_q):
                b_sum = tl.zeros([TILE, TILE], tl.float32)
                for j in range(0, a, TILE):
                    b_q = _add_parts(partial, row, first_q + j, parts, rows, width)
                    b_k = _add_parts(partial, column, first_k + j, parts, rows, width)
                    b_sum += dot(b_q, tl.trans(b_k), PRECISION)
        p_out = products + (row.to(tl.int64) + o_i)[:, None] * width + column + o_i[None, :]
        tl.store(p_out, b_sum)
