"""Triton kernels of the joint prompt that write results as wide as d: the prompt, and the gradients but `A`'s and β's.

A program owns a tile of rows and of columns of a result, which is a sum of products of small matrices (`rows.py`,
`sides.py`) with rows of the parameters.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .products import TILE, columns_of, dot, load_columns, load_rows, up
from .rows import ALONG, INVERSE_RMS, load_tile, sides_of
from .sides import score_gradients, weights


@triton.jit
def _times_rows(b_sum, sides, o_s, column, x, o_d, rows, d, width, PRECISION: tl.constexpr):
    """Adds the product of `sides[o_s, column:]` with the rows of `x` `[rows, d]`."""
    for j in range(0, rows, TILE):
        o_j = j + tl.arange(0, TILE)
        b_side = load_tile(sides, o_s, column + o_j, width)
        b_sum += dot(b_side, load_rows(x, o_j, o_d, rows, d), PRECISION)
    return b_sum


@triton.jit
def _times_columns(b_sum, sides, o_s, column, x, o_d, columns, d, width, PRECISION: tl.constexpr):
    """Adds the product of `sides[o_s, column:]` with the columns of `x` `[d, columns]`."""
    for j in range(0, columns, TILE):
        o_j = j + tl.arange(0, TILE)
        b_side = load_tile(sides, o_s, column + o_j, width)
        b_sum += dot(b_side, load_columns(x, o_j, o_d, columns, d), PRECISION)
    return b_sum


@triton.jit(do_not_specialize=["s", "m", "r", "columns", "side_width"])
def joint_prompt_kernel(
    prompt,  # [s, d]
    A,  # [m, r]
    B,  # [r, d]
    U,  # [columns, d]
    beta,  # [1]
    scores,
    stats,
    sides,
    out,  # [s, d]
    lowrank_scale,
    embedding_scale,
    score_scale,
    # Shape
    s,
    m,
    r,
    columns,
    d,
    side_width,
    # Meta-parameters
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
    FUSION: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Writes one tile of the joint prompt."""
    o_s = tl.program_id(1) * BLOCK_S + tl.arange(0, BLOCK_S)
    o_d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    b_sum = tl.zeros([BLOCK_S, BLOCK_D], tl.float32)
    if FUSION:
        fusion = (scores, scores, stats, s, up(m) + up(s), score_scale, 0.0)
        for j in range(0, r, TILE):
            o_j = j + tl.arange(0, TILE)
            b_attended = tl.zeros([BLOCK_S, TILE], tl.float32)
            for first in range(0, m, TILE):
                o_m = first + tl.arange(0, TILE)
                b_w, _ = weights(fusion, o_s, o_m, o_m < m)
                b_attended += dot(b_w, load_rows(A, o_m, o_j, m, r), PRECISION)
            b_sum += dot(lowrank_scale * b_attended, load_rows(B, o_j, o_d, r, d), PRECISION)
        for first in range(0, s, TILE):
            o_j = first + tl.arange(0, TILE)
            b_w, _ = weights(fusion, o_s, up(m) + o_j, o_j < s)
            b_sum += dot(b_w, load_rows(prompt, o_j, o_d, s, d), PRECISION)
        b_sum *= tl.load(beta).to(tl.float32)
    b_sum = _times_rows(b_sum, sides, o_s, 0, U, o_d, columns, d, side_width, PRECISION)
    b_out = embedding_scale * (load_rows(prompt, o_s, o_d, s, d) + b_sum)
    mask = (o_s < s)[:, None] & (o_d < d)[None, :]
    tl.store(out + o_s.to(tl.int64)[:, None] * d + o_d[None, :], b_out.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _of_sides(sides, stats, column, o_i, x, o_d, s, d, width, NORMALISED: tl.constexpr, PRECISION: tl.constexpr):
    """Multiplies `sides[:, column + o_i]ᵀ` with the rows of `x` `[s, d]`, normalised as those of p if so asked."""
    b_sum = tl.zeros([TILE, o_d.shape[0]], tl.float32)
    for first in range(0, s, TILE):
        o_s = first + tl.arange(0, TILE)
        b_x = load_rows(x, o_s, o_d, s, d)
        if NORMALISED:
            b_x *= tl.load(stats + INVERSE_RMS * up(s) + o_s)[:, None]
        b_sum += dot(tl.trans(load_tile(sides, o_s, column + o_i, width)), b_x, PRECISION)
    return b_sum


@triton.jit
def _store_rows(x, b_x, o_i, o_d, rows, d):
    mask = (o_i < rows)[:, None] & (o_d < d)[None, :]
    tl.store(x + o_i.to(tl.int64)[:, None] * d + o_d[None, :], b_x.to(x.dtype.element_ty), mask=mask)


@triton.jit
def _store_columns(x, b_x, o_i, o_d, columns, d):
    mask = (o_d < d)[:, None] & (o_i < columns)[None, :]
    p_x = x + o_d.to(tl.int64)[:, None] * columns + o_i[None, :]
    tl.store(p_x, tl.trans(b_x).to(x.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["s", "m", "r", "a", "columns", "K", "side_width"])
def joint_prompt_backward_kernel(
    prompt,  # [s, d]
    grad_output,  # [s, d]
    A,  # [m, r]
    B,  # [r, d]
    beta,  # [1]
    W_q,  # [d, a]
    W_k,  # [d, a]
    D,  # [d, columns]
    G,  # [d, K]
    scores,
    slopes,
    stats,
    sides,
    gram_parts,
    grad_prompt,
    grad_B,
    grad_W_q,
    grad_W_k,
    grad_D,
    grad_U,
    grad_G,
    lowrank_scale,
    embedding_scale,
    score_scale,
    # Shape
    s,
    m,
    r,
    a,
    columns,
    K,
    d,
    side_width,
    # Meta-parameters
    BLOCK_D: tl.constexpr,
    FUSION: tl.constexpr,
    MAPS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Writes one tile of one gradient: first rows of p, then those of B, columns of W_q, W_k, D, G, rows of U."""
    i = tl.program_id(1) * TILE
    o_d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    o_t = tl.arange(0, TILE)
    side_of_D, side_of_G, side_of_T, side_of_attended, side_of_q, side_of_k = sides_of(r, a, columns, K)
    first_B, first_W_q, first_W_k, first_D, first_G, first_U = columns_of(s, r, a, columns, K)
    if i < first_B:
        o_s = i + o_t
        b_n = tl.load(stats + INVERSE_RMS * up(s) + o_s)
        b_p = load_rows(prompt, o_s, o_d, s, d)
        b_grad = embedding_scale * load_rows(grad_output, o_s, o_d, s, d)
        b_hat = tl.zeros([TILE, BLOCK_D], tl.float32)  # the gradient of p̂
        if FUSION:
            b_beta = tl.load(beta).to(tl.float32)
            fusion = (scores, slopes, stats, s, up(m) + up(s), score_scale, b_beta)
            b_attending = tl.zeros([TILE, BLOCK_D], tl.float32)
            for first in range(0, s, TILE):
                o_j = first + o_t
                b_delta, b_w, _ = score_gradients(fusion, o_j, up(m) + o_s, o_s < s)
                b_attending += dot(tl.trans(b_w), load_rows(grad_output, o_j, o_d, s, d), PRECISION)
                if not MAPS:
                    b_ours, _, _ = score_gradients(fusion, o_s, up(m) + o_j, o_j < s)
                    b_n_j = tl.load(stats + INVERSE_RMS * up(s) + o_j)
                    b_delta = (tl.trans(b_delta) + b_ours) * b_n_j[None, :]
                    b_hat += dot(b_delta, load_rows(prompt, o_j, o_d, s, d), PRECISION)
            b_grad += b_beta * embedding_scale * b_attending
            if MAPS:
                b_hat = _times_columns(b_hat, sides, o_s, side_of_q, W_q, o_d, a, d, side_width, PRECISION)
                b_hat = _times_columns(b_hat, sides, o_s, side_of_k, W_k, o_d, a, d, side_width, PRECISION)
            else:
                b_hat = _times_rows(b_hat, sides, o_s, side_of_T, B, o_d, r, d, side_width, PRECISION)
        b_hat = _times_columns(b_hat, sides, o_s, side_of_D, D, o_d, columns, d, side_width, PRECISION)
        b_hat = _times_columns(b_hat, sides, o_s, side_of_G, G, o_d, K, d, side_width, PRECISION)
        b_along = tl.load(stats + ALONG * up(s) + o_s) / d
        b_grad += b_n[:, None] * (b_hat - b_p * (b_n * b_along)[:, None])
        _store_rows(grad_prompt, b_grad, o_s, o_d, s, d)
    elif (i < first_W_q) | (i >= first_U):
        of_B = i < first_W_q
        o_i = o_t + tl.where(of_B, i - first_B, i - first_U)
        column = tl.where(of_B, side_of_attended, 0)
        b_grad = embedding_scale * _of_sides(
            sides, stats, column, o_i, grad_output, o_d, s, d, side_width, False, PRECISION
        )
        if of_B:
            tiles = tl.cdiv(m, TILE)
            gram_width = up(r) + up(a)
            for part in range(0, tiles):
                p_part = gram_parts + tl.cast(part, tl.int64) * up(r) * gram_width
                b_grad = _times_rows(b_grad, p_part, o_i, 0, B, o_d, r, d, gram_width, PRECISION)
                if MAPS:
                    b_grad = _times_columns(b_grad, p_part, o_i, up(r), W_k, o_d, a, d, gram_width, PRECISION)
            if not MAPS:
                b_grad += _of_sides(sides, stats, side_of_T, o_i, prompt, o_d, s, d, side_width, True, PRECISION)
            _store_rows(grad_B, b_grad, o_i, o_d, r, d)
        else:
            _store_rows(grad_U, b_grad, o_i, o_d, columns, d)
    else:
        start, column = first_W_q, side_of_q
        if i >= first_G:
            start, column = first_G, side_of_G
        elif i >= first_D:
            start, column = first_D, side_of_D
        elif i >= first_W_k:
            start, column = first_W_k, side_of_k
        o_i = i - start + o_t
        b_grad = _of_sides(sides, stats, column, o_i, prompt, o_d, s, d, side_width, True, PRECISION)
        if i >= first_G:
            _store_columns(grad_G, b_grad, o_i, o_d, K, d)
        elif i >= first_D:
            _store_columns(grad_D, b_grad, o_i, o_d, columns, d)
        elif i >= first_W_k:
            for part in range(0, tl.cdiv(m, TILE)):
                p_part = gram_parts + tl.cast(part, tl.int64) * up(r) * (up(r) + up(a))
                for j in range(0, r, TILE):
                    b_part = load_tile(p_part, j + o_t, up(r) + o_i, up(r) + up(a))
                    b_grad += dot(tl.trans(b_part), load_rows(B, j + o_t, o_d, r, d), PRECISION)
            _store_columns(grad_W_k, b_grad, o_i, o_d, a, d)
        else:
            _store_columns(grad_W_q, b_grad, o_i, o_d, a, d)
