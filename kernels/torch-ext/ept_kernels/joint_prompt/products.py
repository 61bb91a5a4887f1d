"""Triton kernels of the joint prompt's inner products: everything that is reduced over the width d.

The rows `[p; B; g]` are multiplied with `[p; B; W_qᵀ; W_kᵀ; Dᵀ; Gᵀ; U]` (`g` and `U` belong to the backward). The width
is split into parts, to fill a GPU; a second launch adds them up in order, which gives the same bits on every run, and
computes the norms of the rows of C.
"""

import triton
import triton.language as tl

from .tiles import EPS, INVERSE_RMS, TILE, add_product, dot, layout, load, store


@triton.jit
def _is_needed(w, row, column):
    """Checks whether anything reads the tile at `row`, `column` of the products."""
    of_p, of_g, to_U = row < w.at_B, row >= w.at_q, column >= w.at_U
    to_B = (column >= w.at_B) & (column < w.at_q)
    to_k = (column >= w.at_k) & (column < w.at_D)
    return (of_p & ~to_U) | (of_g & ((column < w.at_q) | to_U)) | (~of_p & ~of_g & (to_B | to_k))


@triton.jit(do_not_specialize=["s", "m", "r", "a", "columns", "K"])
def joint_prompt_products_kernel(
    prompt,  # [s, d]
    grad_output,  # [s, d], or the prompt in the forward
    B,  # [r, d]
    W_q,  # [d, a]
    W_k,  # [d, a]
    D,  # [d, columns]
    U,  # [columns, d]
    G,  # [d, K]
    workspace,
    # Shape
    s,
    m,
    r,
    a,
    columns,  # K·h
    K,
    d,
    depth,  # columns of d per part
    # Meta-parameters
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Computes one tile of one part of the inner products."""
    column, row, i_part = tl.program_id(0) * TILE, tl.program_id(1) * TILE, tl.program_id(2)
    w = layout(workspace, s, m, r, a, columns, K)
    if _is_needed(w, row, column):
        # `where` instead of branches: Triton 3.6 cannot compile a pointer that leaves a branch for AMD GPUs.
        of_B, of_g = (row >= w.at_B) & (row < w.at_q), row >= w.at_q
        x = (tl.where(of_g, grad_output, tl.where(of_B, B, prompt)), d, 1, tl.where(of_B, r, s), d)
        o_i = row - tl.where(of_g, w.at_q, tl.where(of_B, w.at_B, 0)) + tl.arange(0, TILE)
        begin, end = i_part * depth, tl.minimum(i_part * depth + depth, d)
        b_sum = tl.zeros([TILE, TILE], tl.float32)
        if (column < w.at_q) | (column >= w.at_U):
            to_B, to_U = (column >= w.at_B) & (column < w.at_q), column >= w.at_U
            y = tl.where(to_U, U, tl.where(to_B, B, prompt))
            count = tl.where(to_U, columns, tl.where(to_B, r, s))
            o_j = column - tl.where(to_U, w.at_U, tl.where(to_B, w.at_B, 0)) + tl.arange(0, TILE)
            b_sum = add_product(b_sum, x, o_i, (y, 1, d, d, count), o_j, end, PRECISION, begin, BLOCK_K)
        else:
            to_k, to_D, to_G = column >= w.at_k, column >= w.at_D, column >= w.at_G
            y = tl.where(to_G, G, tl.where(to_D, D, tl.where(to_k, W_k, W_q)))
            count = tl.where(to_G, K, tl.where(to_D, columns, a))
            start = tl.where(to_G, w.at_G, tl.where(to_D, w.at_D, tl.where(to_k, w.at_k, w.at_q)))
            o_j = column - start + tl.arange(0, TILE)
            b_sum = add_product(b_sum, x, o_i, (y, count, 1, d, count), o_j, end, PRECISION, begin, BLOCK_K)
        part = w.partial + i_part.to(tl.int64) * (w.at_q + w.at_B) * w.width
        o_t = tl.arange(0, TILE)
        store((part, w.width, 1), b_sum, row + o_t, column + o_t)


@triton.jit
def _add_parts(w, row, column, parts):
    """Adds up the parts of the tile at `row`, `column`, in order."""
    o_t = tl.arange(0, TILE)
    b_sum = load((w.partial, w.width, 1), row + o_t, column + o_t)
    for i in range(1, parts):
        part = w.partial + tl.cast(i, tl.int64) * (w.at_q + w.at_B) * w.width
        b_sum += load((part, w.width, 1), row + o_t, column + o_t)
    return b_sum


@triton.jit(do_not_specialize=["s", "m", "r", "a", "columns", "K", "parts", "across", "tiles"])
def joint_prompt_sum_kernel(
    A,  # [m, r]
    workspace,
    lowrank_scale,
    # Shape
    s,
    m,
    r,
    a,
    columns,
    K,
    d,
    parts,
    across,  # tiles of products in a row, and in total
    tiles,
    # Meta-parameters
    MAPS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Adds up the parts of one tile, or computes the norms of a tile of the rows of C, `c²·A·(B·Bᵀ)·Aᵀ/d` for each.

    With maps, the products of p's rows with those of p and B become those of queries and keys: `(p·W_q)·(p·W_k)ᵀ` and
    `(p·W_q)·(B·W_k)ᵀ`.
    """
    i = tl.program_id(0)
    column, row = i % across * TILE, i // across * TILE
    o_t = tl.arange(0, TILE)
    w = layout(workspace, s, m, r, a, columns, K)
    if i >= tiles:
        o_m = (i - tiles) * TILE + o_t
        b_square = tl.zeros([TILE], tl.float32)
        for j in range(0, r, TILE):
            b_C = tl.zeros([TILE, TILE], tl.float32)
            for k in range(0, r, TILE):
                b_gram = _add_parts(w, w.at_B + k, w.at_B + j, parts)
                b_C += dot(load((A, r, 1, m, r), o_m, k + o_t), b_gram, PRECISION)
            b_square += tl.sum(b_C * load((A, r, 1, m, r), o_m, j + o_t), 1)
        # If B's rows cancel, terms do too, and rounding may leave less than zero; NaN stays.
        b_square = tl.where(b_square < 0, 0.0, b_square)
        tl.store(w.norms + o_m, tl.rsqrt(lowrank_scale * lowrank_scale * b_square / d + EPS))
    elif _is_needed(w, row, column):
        b_sum = _add_parts(w, row, column, parts)
        if (row < w.at_B) & (column == row):
            b_square = tl.sum(tl.where(o_t[:, None] == o_t[None, :], b_sum, 0.0), 1)
            tl.store(w.stats + INVERSE_RMS * w.at_B + row + o_t, tl.rsqrt(b_square / d + EPS))
        if MAPS:  # noqa: SIM102 - one is a constant, the other is not
            if (row < w.at_B) & (column < w.at_q):
                b_sum = tl.zeros([TILE, TILE], tl.float32)
                for j in range(0, a, TILE):
                    b_q = _add_parts(w, row, w.at_q + j, parts)
                    b_k = _add_parts(w, column, w.at_k + j, parts)
                    b_sum += dot(b_q, tl.trans(b_k), PRECISION)
        store((w.products, w.width, 1), b_sum, row + o_t, column + o_t)
