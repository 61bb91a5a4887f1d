"""Triton kernels of the joint prompt between the products and the expansion: nothing in them has width d.

The first computes whatever depends on one row of the prompt. Instead of weights it stores scores with their maximum and
the sum of their exponentials, so that one pass over a row is enough. In the backward, the second kernel sums the
gradients `δ` of the scores before their scale, over rows and over columns.
"""

import triton
import triton.language as tl

from ..frozen.activation import activated
from .tiles import INVERSE_RMS, INVERSE_SUM, MAX, MEAN_SLOPE, TILE, add_product, dot, layout, load, store


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """Computes φ(x) and φ'(x)."""
    if ACTIVATION == "tanh":  # with a sigmoid, but near 0, where that would cancel, with the power series
        y = x * x
        series = x * (1 + y * (-1 / 3 + y * (2 / 15 + y * (-17 / 315 + y * (62 / 2835)))))
        b_y = tl.where(y < 0.0625, series, 2.0 * tl.sigmoid(2.0 * x) - 1.0)
        b_slope = 4.0 * tl.sigmoid(2.0 * x) * tl.sigmoid(-2.0 * x)
    elif ACTIVATION == "linear":
        b_y, b_slope = x, tl.full(x.shape, 1.0, tl.float32)
    else:
        b_y, b_slope = activated(x, ACTIVATION)
    return b_y, b_slope


@triton.jit
def _take(w, b_max, b_sum, b_dot, b_S, b_e, o_s, o_j, is_column, score_scale, BACKWARD: tl.constexpr):
    """Stores a tile of scores and slopes; updates the scores' maximum, exponentials' sum, and its sum with slopes."""
    store((w.scores, w.score_width, 1), b_S, o_s, o_j)
    if BACKWARD:
        store((w.slopes, w.score_width, 1), b_e, o_s, o_j)
    b_x = tl.where(is_column[None, :], score_scale * b_S, float("-inf"))
    b_new = tl.maximum(b_max, tl.max(b_x, 1))
    b_scale, b_w = tl.exp(b_max - b_new), tl.exp(b_x - b_new[:, None])
    return b_new, b_sum * b_scale + tl.sum(b_w, 1), b_dot * b_scale + tl.sum(b_w * b_e, 1)


@triton.jit(do_not_specialize=["s", "m", "r", "a", "columns", "K"])
def joint_prompt_rows_kernel(
    A,  # [m, r]
    workspace,
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
    # Meta-parameters
    BLOCK_S: tl.constexpr,
    GATES: tl.constexpr,  # K padded to a power of two, at least 32; 0: no spaces
    ACTIVATION: tl.constexpr,
    FUSION: tl.constexpr,
    BACKWARD: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Computes scores, gates and spaces of a tile of rows, and in the backward their gradients."""
    o_t = tl.arange(0, TILE)
    o_s = tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)
    w = layout(workspace, s, m, r, a, columns, K)
    o_g = w.at_q + o_s  # rows of g
    products, inverse_rms = (w.products, w.width, 1), w.stats + INVERSE_RMS * w.at_B
    b_n = tl.load(inverse_rms + o_s)
    if FUSION:
        to_B, A_T, slope_scale = (w.products + w.at_B, w.width, 1), (A, 1, r, r, m), lowrank_scale * embedding_scale
        b_zero = tl.zeros([BLOCK_S, TILE], tl.float32)
        b_max = tl.full([BLOCK_S], float("-inf"), tl.float32)
        b_sum, b_dot = tl.zeros([BLOCK_S], tl.float32), tl.zeros([BLOCK_S], tl.float32)
        for first in range(0, m, TILE):
            o_m = first + o_t
            b_S = add_product(b_zero, to_B, o_s, A_T, o_m, r, PRECISION)
            b_S *= b_n[:, None] * (lowrank_scale * tl.load(w.norms + o_m))[None, :]
            b_e = slope_scale * add_product(b_zero, to_B, o_g, A_T, o_m, r, PRECISION) if BACKWARD else b_zero
            sums = _take(w, b_max, b_sum, b_dot, b_S, b_e, o_s, o_m, o_m < m, score_scale, BACKWARD)
            b_max, b_sum, b_dot = sums
        for first in range(0, s, TILE):
            o_j = first + o_t
            b_S = b_n[:, None] * load(products, o_s, o_j) * tl.load(inverse_rms + o_j)[None, :]
            b_e = embedding_scale * load(products, o_g, o_j) if BACKWARD else b_zero
            sums = _take(w, b_max, b_sum, b_dot, b_S, b_e, o_s, w.at_p + o_j, o_j < s, score_scale, BACKWARD)
            b_max, b_sum, b_dot = sums
        tl.store(w.stats + MAX * w.at_B + o_s, b_max)
        tl.store(w.stats + INVERSE_SUM * w.at_B + o_s, 1.0 / b_sum)
        tl.store(w.stats + MEAN_SLOPE * w.at_B + o_s, b_dot / b_sum)
    if GATES > 0:
        mix, sides = (w.mix, w.width, 1), (w.sides, w.width, 1)
        o_k = tl.arange(0, GATES)
        spaces = tl.maximum(K, 1)  # a single space has no gate
        h = columns // spaces
        b_x = tl.zeros([BLOCK_S, GATES], tl.float32)
        if K > 0:
            b_x = b_n[:, None] * load((w.products + w.at_G, w.width, 1, w.at_B, K), o_s, o_k)
        b_x = tl.where((o_k < spaces)[None, :], b_x, float("-inf"))
        b_gates = tl.exp(b_x - tl.max(b_x, 1)[:, None])
        b_gates /= tl.sum(b_gates, 1)[:, None]
        b_grad_gates = tl.zeros([BLOCK_S, GATES], tl.float32)
        for first in range(0, columns, TILE):
            o_c = first + o_t
            b_space = ((o_c // h)[:, None] == o_k[None, :]).to(tl.float32)  # [TILE, GATES]
            b_before = b_n[:, None] * load(products, o_s, w.at_D + o_c)
            b_gate = dot(b_gates, tl.trans(b_space), PRECISION)
            b_hidden, b_slope = activate(b_before, ACTIVATION)
            store(mix, embedding_scale * b_hidden * b_gate, o_s, w.at_U + o_c)
            if BACKWARD:
                b_grad = embedding_scale * load(products, o_g, w.at_U + o_c)
                store(sides, b_n[:, None] * b_grad * b_gate * b_slope, o_s, w.at_D + o_c)
                b_grad_gates += dot(b_grad * b_hidden, b_space, PRECISION)
        if BACKWARD:  # noqa: SIM102 - one is a constant, the other is not
            if K > 0:
                b_grad_x = b_gates * (b_grad_gates - tl.sum(b_gates * b_grad_gates, 1)[:, None])
                store((w.sides + w.at_G, w.width, 1, w.at_B, w.at_U - w.at_G), b_n[:, None] * b_grad_x, o_s, o_k)


@triton.jit
def weights(w, score_scale, o_i, o_j, is_column):
    """Computes the softmax's weights `[o_i, o_j]`, 0 where `is_column` is false; also returns the scores."""
    b_S = load((w.scores, w.score_width, 1), o_i, o_j)
    b_x = score_scale * b_S - tl.load(w.stats + MAX * w.at_B + o_i)[:, None]
    b_w = tl.exp(b_x) * tl.load(w.stats + INVERSE_SUM * w.at_B + o_i)[:, None]
    return tl.where(is_column[None, :], b_w, 0.0), b_S


@triton.jit
def _gradients(w, scales, o_i, o_j, is_column):
    """Computes `δ`, with the weights and the scores: `[o_i, o_j]` each. `scales`: the scale of the scores, and β."""
    score_scale, b_beta = scales
    b_w, b_S = weights(w, score_scale, o_i, o_j, is_column)
    b_e = load((w.slopes, w.score_width, 1), o_i, o_j)
    b_e -= tl.load(w.stats + MEAN_SLOPE * w.at_B + o_i)[:, None]
    return tl.where(is_column[None, :], b_beta * score_scale * b_w * b_e, 0.0), b_w, b_S


@triton.jit(do_not_specialize=["s", "m", "r", "a", "columns", "K"])
def joint_prompt_sides_kernel(
    A,  # [m, r]
    beta,  # [1]
    workspace,
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
    # Meta-parameters
    BLOCK_S: tl.constexpr,
    MAPS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Computes the sums for a tile of `A`'s rows (`grad_A`, norms' gradient), or of the prompt's (`sides`, `mix`)."""
    i = tl.program_id(0)
    o_t, o_b = tl.arange(0, TILE), tl.arange(0, BLOCK_S)
    w = layout(workspace, s, m, r, a, columns, K)
    products = (w.products, w.width, 1)
    b_beta = tl.load(beta).to(tl.float32)
    scales = (score_scale, b_beta)
    inverse_rms = w.stats + INVERSE_RMS * w.at_B
    if i < w.at_p // TILE:
        o_m = i * TILE + o_t
        b_n_C = tl.load(w.norms + o_m)
        b_total = tl.zeros([TILE], tl.float32)
        for first in range(0, s, BLOCK_S):
            b_delta, _, b_S = _gradients(w, scales, first + o_b, o_m, o_m < m)
            b_total += tl.sum(b_delta * b_S, 0)
        b_factor = (-lowrank_scale * lowrank_scale / d * b_n_C * b_n_C * b_total)[:, None]
        gram = (w.products + w.at_B * w.width + w.at_B, w.width, 1)
        for j in range(0, r, TILE):
            store((w.normed, w.at_q - w.at_B, 1), b_factor * load((A, r, 1, m, r), o_m, j + o_t), o_m, j + o_t)
            b_zero = tl.zeros([TILE, TILE], tl.float32)
            b_grad = b_factor * add_product(b_zero, (A, r, 1, m, r), o_m, gram, j + o_t, r, PRECISION)
            for first in range(0, s, BLOCK_S):
                o_i = first + o_b
                b_delta, b_w, _ = _gradients(w, scales, o_i, o_m, o_m < m)
                b_T = tl.load(inverse_rms + o_i)[:, None] * load(products, o_i, w.at_B + j + o_t)
                b_gB = b_beta * embedding_scale * load(products, w.at_q + o_i, w.at_B + j + o_t)
                b_grad += lowrank_scale * dot(tl.trans(b_delta * b_n_C[None, :]), b_T, PRECISION)
                b_grad += lowrank_scale * dot(tl.trans(b_w), b_gB, PRECISION)
            store((grad_A, r, 1, m, r), b_grad, o_m, j + o_t)
    else:
        sides, mix = (w.sides, w.width, 1), (w.mix, w.width, 1)
        o_s = (i - w.at_p // TILE) * BLOCK_S + o_b
        b_n = tl.load(inverse_rms + o_s)
        # Once without maps, else for a tile of their columns at a time; results that do not depend on it are the same.
        for q in range(0, a if MAPS else 1, TILE):
            b_q, b_k = tl.zeros([BLOCK_S, TILE], tl.float32), tl.zeros([BLOCK_S, TILE], tl.float32)
            for first in range(0, s, TILE):
                o_i = first + o_t
                b_n_i = tl.load(inverse_rms + o_i)
                b_delta, b_w, _ = _gradients(w, scales, o_s, w.at_p + o_i, o_i < s)
                b_to_us, _, _ = _gradients(w, scales, o_i, w.at_p + o_s, o_s < s)
                store(mix, b_beta * embedding_scale * b_w, o_s, o_i)
                b_delta *= b_n_i[None, :]
                b_to_us = tl.trans(b_to_us * b_n_i[:, None])
                if MAPS:
                    b_q += dot(b_delta, load(products, o_i, w.at_k + q + o_t), PRECISION)
                    b_k += dot(b_to_us, load(products, o_i, w.at_q + q + o_t), PRECISION)
                else:
                    store(sides, b_n[:, None] * (b_delta + b_to_us), o_s, o_i)
            for j in range(0, r, TILE):
                b_T, b_attended = tl.zeros([BLOCK_S, TILE], tl.float32), tl.zeros([BLOCK_S, TILE], tl.float32)
                for first in range(0, m, TILE):
                    o_m = first + o_t
                    b_delta, b_w, _ = _gradients(w, scales, o_s, o_m, o_m < m)
                    b_A = load((A, r, 1, m, r), o_m, j + o_t)
                    b_T += dot(b_delta * (lowrank_scale * tl.load(w.norms + o_m))[None, :], b_A, PRECISION)
                    b_attended += dot(b_w, b_A, PRECISION)
                store(sides, b_n[:, None] * b_T, o_s, w.at_B + j + o_t)
                store(mix, lowrank_scale * b_beta * embedding_scale * b_attended, o_s, w.at_B + j + o_t)
                if MAPS:
                    b_q += dot(b_T, load(products, w.at_B + j + o_t, w.at_k + q + o_t), PRECISION)
            if MAPS:
                store(sides, b_n[:, None] * b_q, o_s, w.at_q + q + o_t)
                store(sides, b_n[:, None] * b_k, o_s, w.at_k + q + o_t)
        if i == w.at_p // TILE:
            b_sum = tl.zeros([TILE], tl.float32)
            for first in range(0, s, TILE):
                b_sum += tl.load(w.stats + MEAN_SLOPE * w.at_B + first + o_t)
            tl.store(grad_beta, tl.sum(b_sum, 0).to(grad_beta.dtype.element_ty))
