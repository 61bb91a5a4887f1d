"""Triton kernel of the joint prompt's backward between the rows and the expansion: sums over rows and over columns.

With `δ` the gradient of the scores, `X_ij = c·δ_ij/rms(C_j)` what reaches `T_i·A_j`: a program owns some rows of `A`
(`grad_A`, and its part of the sums over m), or some rows of the prompt.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .products import TILE, columns_of, dot, load_rows, up
from .rows import ALONG, INVERSE_RMS, INVERSE_SUM, MAX, MEAN_SLOPE, load_tile, sides_of, store_tile


@triton.jit
def weights(fusion, o_i, o_j, is_column):
    """Computes the softmax's weights `[o_i, o_j]`, 0 where `is_column` is false, and loads the scores before their
    scale. `fusion`: scores, slopes, stats, s, width of the scores, scale of the scores, β.
    """
    scores, _, stats, s, width, score_scale, _ = fusion
    b_S = load_tile(scores, o_i, o_j, width)
    b_x = score_scale * b_S - tl.load(stats + MAX * up(s) + o_i)[:, None]
    b_w = tl.exp(b_x) * tl.load(stats + INVERSE_SUM * up(s) + o_i)[:, None]
    return tl.where(is_column[None, :], b_w, 0.0), b_S


@triton.jit
def score_gradients(fusion, o_i, o_j, is_column):
    """Computes `δ` of the scores before their scale, with the weights and the scores: `[o_i, o_j]` each."""
    _, slopes, stats, s, width, score_scale, b_beta = fusion
    b_w, b_S = weights(fusion, o_i, o_j, is_column)
    b_e = load_tile(slopes, o_i, o_j, width) - tl.load(stats + MEAN_SLOPE * up(s) + o_i)[:, None]
    return tl.where(is_column[None, :], b_beta * score_scale * b_w * b_e, 0.0), b_w, b_S


@triton.jit(do_not_specialize=["s", "m", "r", "a", "columns", "K", "width", "side_width"])
def joint_prompt_sides_kernel(
    products,  # [rows, width]
    A,  # [m, r]
    beta,  # [1]
    scores,
    slopes,
    inverse_rms_C,
    stats,
    sides,
    gram_parts,  # [tiles of m, up(r), up(r) + up(a)]: parts of Aᵀ·diag(·)·A, and of the gradient of B·W_k
    grad_A,  # [m, r]
    grad_beta,  # [1]
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
    width,
    side_width,
    # Meta-parameters
    BLOCK_S: tl.constexpr,
    MAPS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Sums what belongs to a tile of `A`'s rows, or of the prompt's."""
    i = tl.program_id(0)
    b_beta = tl.load(beta).to(tl.float32)
    fusion = (scores, slopes, stats, s, up(m) + up(s), score_scale, b_beta)
    first_B, first_q, first_k, _first_D, _first_G, _first_U = columns_of(s, r, a, columns, K)
    _of_D, _of_G, side_of_T, side_of_attended, side_of_q, side_of_k = sides_of(r, a, columns, K)
    tiles_m = tl.cdiv(m, TILE)
    o_t = tl.arange(0, TILE)
    if i < tiles_m:
        o_m = i * TILE + o_t
        m_m = o_m < m
        b_n_C = tl.load(inverse_rms_C + o_m)
        b_total = tl.zeros([TILE], tl.float32)
        for first in range(0, s, BLOCK_S):
            o_i = first + tl.arange(0, BLOCK_S)
            b_delta, _, b_S = score_gradients(fusion, o_i, o_m, m_m)
            b_total += tl.sum(b_delta * b_S, 0)
        # what reaches the mean square of C's row, times what that is of A: grad_A has w·A·(B·Bᵀ)
        b_w_A = -(lowrank_scale * lowrank_scale / d) * b_n_C * b_n_C * b_total
        part = gram_parts + i.to(tl.int64) * up(r) * (up(r) + up(a))
        for j in range(0, r, TILE):
            o_j = j + o_t
            b_A = load_rows(A, o_m, o_j, m, r)
            b_grad = tl.zeros([TILE, TILE], tl.float32)
            for first in range(0, s, BLOCK_S):
                o_i = first + tl.arange(0, BLOCK_S)
                b_delta, b_w, _ = score_gradients(fusion, o_i, o_m, m_m)
                b_n = tl.load(stats + INVERSE_RMS * up(s) + o_i)
                b_T = b_n[:, None] * load_tile(products, o_i, first_B + o_j, width)
                b_gB = load_tile(products, first_q + o_i, first_B + o_j, width)
                b_grad += lowrank_scale * dot(tl.trans(b_delta * b_n_C[None, :]), b_T, PRECISION)
                b_grad += lowrank_scale * b_beta * embedding_scale * dot(tl.trans(b_w), b_gB, PRECISION)
            for k in range(0, r, TILE):
                b_wA = b_w_A[:, None] * load_rows(A, o_m, k + o_t, m, r)
                b_gram = load_tile(products, first_B + k + o_t, first_B + o_j, width)
                b_grad += dot(b_wA, b_gram, PRECISION)
                store_tile(part, dot(tl.trans(b_wA), b_A, PRECISION), k + o_t, o_j, up(r) + up(a))
            p_grad = grad_A + o_m.to(tl.int64)[:, None] * r + o_j[None, :]
            tl.store(p_grad, b_grad.to(grad_A.dtype.element_ty), mask=m_m[:, None] & (o_j < r)[None, :])
        if MAPS:
            for j in range(0, a, TILE):
                b_V = tl.zeros([TILE, TILE], tl.float32)  # Σ_i X_ij·q_i
                for first in range(0, s, BLOCK_S):
                    o_i = first + tl.arange(0, BLOCK_S)
                    b_delta, _, _ = score_gradients(fusion, o_i, o_m, m_m)
                    b_n = tl.load(stats + INVERSE_RMS * up(s) + o_i)
                    b_q = b_n[:, None] * load_tile(products, o_i, first_q + j + o_t, width)
                    b_V += lowrank_scale * dot(tl.trans(b_delta * b_n_C[None, :]), b_q, PRECISION)
                for k in range(0, r, TILE):
                    b_A = load_rows(A, o_m, k + o_t, m, r)
                    b_part = dot(tl.trans(b_A), b_V, PRECISION)
                    store_tile(part, b_part, k + o_t, up(r) + j + o_t, up(r) + up(a))
    else:
        o_s = (i - tiles_m) * BLOCK_S + tl.arange(0, BLOCK_S)
        b_n = tl.load(stats + INVERSE_RMS * up(s) + o_s)
        b_along = tl.load(stats + ALONG * up(s) + o_s)
        for first in range(0, m, TILE):
            o_m = first + o_t
            b_delta, _, b_S = score_gradients(fusion, o_s, o_m, o_m < m)
            b_along += tl.sum(b_delta * b_S, 1)
        for first in range(0, s, BLOCK_S):
            o_i = first + tl.arange(0, BLOCK_S)
            b_delta, _, b_S = score_gradients(fusion, o_s, up(m) + o_i, o_i < s)
            b_along += tl.sum(b_delta * b_S, 1)
            b_delta, _, b_S = score_gradients(fusion, o_i, up(m) + o_s, o_s < s)
            b_along += tl.sum(b_delta * b_S, 0)
        tl.store(stats + ALONG * up(s) + o_s, b_along)
        for j in range(0, r, TILE):
            b_T, b_attended = tl.zeros([BLOCK_S, TILE], tl.float32), tl.zeros([BLOCK_S, TILE], tl.float32)
            for first in range(0, m, TILE):
                o_m = first + o_t
                b_delta, b_w, _ = score_gradients(fusion, o_s, o_m, o_m < m)
                b_A = load_rows(A, o_m, j + o_t, m, r)
                b_T += dot(b_delta * tl.load(inverse_rms_C + o_m)[None, :], b_A, PRECISION)
                b_attended += dot(b_w, b_A, PRECISION)
            store_tile(sides, lowrank_scale * b_T, o_s, side_of_T + j + o_t, side_width)
            b_attended *= lowrank_scale * b_beta
            store_tile(sides, b_attended, o_s, side_of_attended + j + o_t, side_width)
        if MAPS:
            for j in range(0, a, TILE):
                o_q, o_k = first_q + j + o_t, first_k + j + o_t
                b_q, b_k = tl.zeros([BLOCK_S, TILE], tl.float32), tl.zeros([BLOCK_S, TILE], tl.float32)
                for k in range(0, r, TILE):
                    b_T = tl.zeros([BLOCK_S, TILE], tl.float32)
                    for first in range(0, m, TILE):
                        o_m = first + o_t
                        b_delta, _, _ = score_gradients(fusion, o_s, o_m, o_m < m)
                        b_A = load_rows(A, o_m, k + o_t, m, r)
                        b_T += dot(b_delta * tl.load(inverse_rms_C + o_m)[None, :], b_A, PRECISION)
                    b_key_B = load_tile(products, first_B + k + o_t, o_k, width)
                    b_q += lowrank_scale * dot(b_T, b_key_B, PRECISION)
                for first in range(0, s, TILE):
                    o_i = first + o_t
                    b_n_i = tl.load(stats + INVERSE_RMS * up(s) + o_i)[:, None]
                    b_delta, _, _ = score_gradients(fusion, o_s, up(m) + o_i, o_i < s)
                    b_q += dot(b_delta, b_n_i * load_tile(products, o_i, o_k, width), PRECISION)
                    b_delta, _, _ = score_gradients(fusion, o_i, up(m) + o_s, o_s < s)
                    b_k += dot(tl.trans(b_delta), b_n_i * load_tile(products, o_i, o_q, width), PRECISION)
                store_tile(sides, b_q, o_s, side_of_q + j + o_t, side_width)
                store_tile(sides, b_k, o_s, side_of_k + j + o_t, side_width)
        if i == tiles_m:
            b_sum = tl.zeros([TILE], tl.float32)
            for first in range(0, s, TILE):
                b_sum += tl.load(stats + MEAN_SLOPE * up(s) + first + o_t)
            tl.store(grad_beta, tl.sum(b_sum, 0).to(grad_beta.dtype.element_ty))
