"""Every inner product over d that the joint prompt needs, in one launch, and how the later launch reads them.

The left rows `[p; ∂P; B]` are multiplied with the right rows `[p; B; U; Dᵀ; Gᵀ; W_qᵀ; W_kᵀ]` tile by tile. Tiles
that nothing reads are left out; `∂P` and `U` belong to the backward. Beside them the squares of `A·B`'s rows are
summed, whose tiles live in registers only. The width d is split into parts, which the reader adds up in order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .reference import NORM_EPS

EPS = tl.constexpr(NORM_EPS)


@triton.jit
def load_tile(x, o_i, o_j, rows, columns):
    """Loads rows `o_i` and columns `o_j` of `x` `[rows, columns]`, contiguous, in float32; zero beyond its edges."""
    mask = (o_i < rows)[:, None] & (o_j < columns)[None, :]
    return tl.load(x + o_i.to(tl.int64)[:, None] * columns + o_j[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def store_tile(x, b_x, o_i, o_j, rows, columns):
    """Writes a tile of `x` `[rows, columns]`, contiguous, rounded to its dtype."""
    mask = (o_i < rows)[:, None] & (o_j < columns)[None, :]
    tl.store(x + o_i.to(tl.int64)[:, None] * columns + o_j[None, :], b_x.to(x.dtype.element_ty), mask=mask)


@triton.jit
def inner(products, o_i, o_j, rows, columns, row, column, z: tl.constexpr):
    """Reads inner products over all of d, the parts added up in order: `[o_i, o_j]` of those `rows` and `columns` of
    the matrix that begin at `row` and `column`; zero beyond them.
    """
    parts: tl.constexpr = z.parts
    mask = (o_i < rows)[:, None] & (o_j < columns)[None, :]
    p_inner = products + (row + o_i.to(tl.int64))[:, None] * z.width + (column + o_j)[None, :]
    b_sum = tl.load(p_inner, mask=mask, other=0.0)
    for i in tl.static_range(1, parts):
        b_sum += tl.load(p_inner + i * z.size, mask=mask, other=0.0)
    return b_sum


@triton.jit
def inverse_rms(products, first, step, o_n, rows, scale, z: tl.constexpr):
    """Reads one over the root mean square of rows `o_n` times `scale`; their squares' sums stand `step` apart."""
    parts: tl.constexpr = z.parts
    p_squares = products + first + o_n.to(tl.int64) * step
    b_sum = tl.load(p_squares, mask=o_n < rows, other=0.0)
    for i in tl.static_range(1, parts):
        b_sum += tl.load(p_squares + i * z.size, mask=o_n < rows, other=0.0)
    return tl.rsqrt(scale * scale * b_sum / z.d + EPS)


@triton.jit
def inverse_rms_of_p(products, o_s, z: tl.constexpr):
    """Reads it for the prompt's rows: their squares are the matrix's diagonal."""
    return inverse_rms(products, 0, z.width + 1, o_s, z.s, 1.0, z)


@triton.jit
def _store_products(products, b_sum, o_i, o_j, rows, columns, row, column, z: tl.constexpr):
    """Writes a tile of the matrix; as `inner` reads it."""
    mask = (o_i < rows)[:, None] & (o_j < columns)[None, :]
    tl.store(products + (row + o_i.to(tl.int64))[:, None] * z.width + (column + o_j)[None, :], b_sum, mask=mask)


@triton.jit
def _multiply(left, right, o_i, o_j, rows, columns, first, TRANSPOSED: tl.constexpr, z: tl.constexpr):
    """Computes `left[o_i]·right[o_j]` over the part of d from `first` on; `TRANSPOSED`: right is `[d, columns]`."""
    BLOCK_N: tl.constexpr = z.BLOCK_N
    BLOCK_K: tl.constexpr = z.BLOCK_K
    b_sum = tl.zeros([BLOCK_N, BLOCK_N], tl.float32)
    for start in tl.range(first, tl.minimum(first + z.part, z.d), BLOCK_K):
        o_d = start + tl.arange(0, BLOCK_K)
        b_left = load_tile(left, o_i, o_d, rows, z.d)  # [BLOCK_N, BLOCK_K]
        if TRANSPOSED:
            b_right = load_tile(right, o_d, o_j, z.d, columns)  # [BLOCK_K, BLOCK_N]
        else:
            b_right = tl.trans(load_tile(right, o_j, o_d, columns, z.d))
        b_sum = tl.dot(b_left, b_right, b_sum, input_precision=z.PRECISION)
    return b_sum


@triton.jit
def _squares_of_C(A, B, products, i_m, first, z: tl.constexpr):
    """Sums the squares of `A·B`'s rows over the part of d from `first` on."""
    BLOCK_M: tl.constexpr = z.BLOCK_M
    BLOCK_K: tl.constexpr = z.BLOCK_K
    RANK: tl.constexpr = z.RANK
    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    o_r = tl.arange(0, RANK)
    b_A = load_tile(A, o_m, o_r, z.m, z.r)  # [BLOCK_M, RANK]
    b_sum = tl.zeros([BLOCK_M], tl.float32)
    for start in tl.range(first, tl.minimum(first + z.part, z.d), BLOCK_K):
        b_B = load_tile(B, o_r, start + tl.arange(0, BLOCK_K), z.r, z.d)  # [RANK, BLOCK_K]
        b_C = tl.dot(b_A, b_B, input_precision=z.PRECISION)  # [BLOCK_M, BLOCK_K]
        b_sum += tl.sum(b_C * b_C, axis=1)
    tl.store(products + z.squares + o_m, b_sum, mask=o_m < z.m)


@triton.jit
def joint_prompt_products_kernel(
    prompt,  # [s, d]
    grad_output,  # [s, d], or None
    A,  # [m, r]
    B,  # [r, d]
    W_q,  # [d, a]
    W_k,  # [d, a]
    D,  # [d, K·h]
    U,  # [K·h, d]
    G,  # [d, K]
    products,  # [parts, size] float32
    z: tl.constexpr,
):
    """Writes one part of d of one tile of inner products, or of the squares of one tile of `A·B`'s rows."""
    i_program = tl.program_id(0)
    i_part = i_program % z.parts
    i_tile = i_program // z.parts
    first = i_part * z.part
    products += i_part.to(tl.int64) * z.size
    if i_tile < z.square_tiles:
        if z.m > 0:
            _squares_of_C(A, B, products, i_tile, first, z)
    else:
        i_row = (i_tile - z.square_tiles) // z.column_tiles
        i_column = (i_tile - z.square_tiles) % z.column_tiles
        BLOCK_N: tl.constexpr = z.BLOCK_N
        o_n = tl.arange(0, BLOCK_N)

        # The left rows; which of p, ∂P, B they are.
        left, rows, row = prompt, z.s, 0
        of_p, of_B = i_row < z.tiles_p, i_row >= z.row_tiles - z.tiles_r
        if z.backward:  # a constant: what follows is compiled only then
            of_grad = (i_row >= z.tiles_p) & (i_row < 2 * z.tiles_p)
            if of_grad:
                left, row, i_row = grad_output, z.s, i_row - z.tiles_p
        if of_B:
            left, rows, row, i_row = B, z.r, z.row_B, i_row - (z.row_tiles - z.tiles_r)
        o_i = i_row * BLOCK_N + o_n

        # The right rows [·, d]: every left row is multiplied with p or B, ∂P with U as well.
        rows_of_d = z.tiles_p + z.tiles_r + z.tiles_U
        if i_column < rows_of_d:
            right, columns, column = prompt, z.s, 0
            needed = (i_column < z.tiles_p) & (not of_B)
            if i_column >= z.tiles_p + z.tiles_r:
                right, columns, column = U, z.columns, z.column_U
                i_column -= z.tiles_p + z.tiles_r
                needed = (not of_p) & (not of_B)
            elif i_column >= z.tiles_p:
                right, columns, column = B, z.r, z.s
                i_column -= z.tiles_p
                needed = z.backward | (of_p & (z.a == 0))
            if needed:
                o_j = i_column * BLOCK_N + o_n
                b_sum = _multiply(left, right, o_i, o_j, rows, columns, first, False, z)
                _store_products(products, b_sum, o_i, o_j, rows, columns, row, column, z)
        else:
            # The right columns [d, ·]: p is multiplied with all of them, B with W_k.
            i_column -= rows_of_d
            right, columns, column = D, z.columns, z.column_D
            needed = of_p
            if i_column >= z.tiles_D + z.tiles_G + z.tiles_a:
                right, columns, column = W_k, z.a, z.column_k
                i_column -= z.tiles_D + z.tiles_G + z.tiles_a
                needed = of_p | of_B
            elif i_column >= z.tiles_D + z.tiles_G:
                right, columns, column = W_q, z.a, z.column_q
                i_column -= z.tiles_D + z.tiles_G
            elif i_column >= z.tiles_D:
                right, columns, column = G, z.K, z.column_G
                i_column -= z.tiles_D
            if needed:
                o_j = i_column * BLOCK_N + o_n
                b_sum = _multiply(left, right, o_i, o_j, rows, columns, first, True, z)
                _store_products(products, b_sum, o_i, o_j, rows, columns, row, column, z)
