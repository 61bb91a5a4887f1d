"""Triton kernel of what a row of the prompt decides alone: its scores and their softmax, its gate and its spaces.

Everything here is small: the inner products over d are done (`products.py`), and nothing is as wide as d. Scores are
kept with their maximum and the sum of their exponentials in place of weights, so that one pass over a row is enough.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .products import EPS, TILE, columns_of, dot, load_rows, up

# Rows of `stats` `[STATS, up(s)]`, float32: one over the root mean square of p's row; the largest of its scores and one
# over the sum of their exponentials; the mean slope of its scores; the inner product of p̂ with its gradient.
INVERSE_RMS, MAX, INVERSE_SUM, MEAN_SLOPE, ALONG = (tl.constexpr(i) for i in range(5))
STATS = 5
NARROW = tl.constexpr(16)


@triton.jit
def load_tile(x, o_i, o_j, width):
    """Loads rows `o_i`, columns `o_j` of a padded float32 matrix that is `width` wide: nothing needs a mask."""
    return tl.load(x + o_i.to(tl.int64)[:, None] * width + o_j[None, :])


@triton.jit
def store_tile(x, b_x, o_i, o_j, width):
    tl.store(x + o_i.to(tl.int64)[:, None] * width + o_j[None, :], b_x)


@triton.jit
def sides_of(r, a, columns, K):
    """Counts where the columns of `sides` begin that the expansion multiplies with rows and columns of D, G, B (twice:
    the gradient of T, and what is attended), W_q and W_k; the gated spaces are first.
    """
    of_G = 2 * up(columns)
    of_T = of_G + up(K)
    of_q = of_T + 2 * up(r)
    return up(columns), of_G, of_T, of_T + up(r), of_q, of_q + up(a)


@triton.jit
def tanh(x):
    """Computes tanh by a sigmoid, and near 0, where that would cancel, by its power series."""
    y = x * x
    series = x * (1 + y * (-1 / 3 + y * (2 / 15 + y * (-17 / 315 + y * (62 / 2835)))))
    return tl.where(y < 0.0625, series, 2.0 * tl.sigmoid(2.0 * x) - 1.0)


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """Computes φ(x)."""
    if ACTIVATION == "relu":
        x = tl.maximum(x, 0.0)
    elif ACTIVATION == "silu":
        x = x * tl.sigmoid(x)
    elif ACTIVATION == "tanh":
        x = tanh(x)
    elif ACTIVATION == "gelu":
        x = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    else:
        tl.static_assert(ACTIVATION == "linear")
    return x


@triton.jit
def slope(x, ACTIVATION: tl.constexpr):
    """Computes φ'(x)."""
    if ACTIVATION == "relu":
        x = tl.where(x > 0, 1.0, 0.0)
    elif ACTIVATION == "silu":
        x = tl.sigmoid(x) * (1.0 + x * tl.sigmoid(-x))
    elif ACTIVATION == "tanh":
        x = 4.0 * tl.sigmoid(2.0 * x) * tl.sigmoid(-2.0 * x)
    elif ACTIVATION == "gelu":
        density = 0.3989422804014327 * tl.exp(-0.5 * x * x)
        x = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476)) + x * density
    else:
        tl.static_assert(ACTIVATION == "linear")
        x = tl.full(x.shape, 1.0, tl.float32)
    return x


@triton.jit
def _softmax_step(b_x, b_e, b_max, b_sum, b_dot):
    """Takes a tile's exponents `b_x` and slopes `b_e` into the running maximum, sum and weighted sum of the slopes."""
    b_new = tl.maximum(b_max, tl.max(b_x, 1))
    b_scale, b_w = tl.exp(b_max - b_new), tl.exp(b_x - b_new[:, None])
    return b_new, b_sum * b_scale + tl.sum(b_w, 1), b_dot * b_scale + tl.sum(b_w * b_e, 1)


@triton.jit(do_not_specialize=["s", "m", "r", "a", "columns", "K", "width", "side_width"])
def joint_prompt_rows_kernel(
    products,  # [rows, width]
    A,  # [m, r]
    scores,  # [up(s), up(m) + up(s)]: of the rows of C, then of p, before the scale
    slopes,  # as scores: the gradient of the weights, before β
    inverse_rms_C,  # [up(m)]
    stats,  # [STATS, up(s)]
    sides,  # [up(s), side_width]
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
    GATES: tl.constexpr,  # K padded to a power of two from 32 up; 0: no spaces
    ACTIVATION: tl.constexpr,
    FUSION: tl.constexpr,
    BACKWARD: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Computes all scores and spaces of a tile of the prompt's rows."""
    o_s = tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)
    o_t = tl.arange(0, TILE)
    first_B, first_q, _, first_D, first_G, first_U = columns_of(s, r, a, columns, K)
    side_of_D, side_of_G, _, _, _, _ = sides_of(r, a, columns, K)
    o_g = first_q + o_s  # rows of g
    b_n = tl.load(stats + INVERSE_RMS * up(s) + o_s)
    if FUSION:
        score_width = up(m) + up(s)
        b_max = tl.full([BLOCK_S], float("-inf"), tl.float32)
        b_sum, b_dot = tl.zeros([BLOCK_S], tl.float32), tl.zeros([BLOCK_S], tl.float32)
        for first in range(0, m, TILE):
            o_m = first + o_t
            # The norms of C's rows first, in a loop of their own and half a tile at a time: on sm_100 the registers do
            # not hold more, in the pieces of bfloat16 that it is multiplied in.
            b_square = tl.zeros([TILE], tl.float32)
            for j in range(0, r, TILE):
                b_C = tl.zeros([TILE, TILE], tl.float32)  # A·(B·Bᵀ)
                for k in range(0, r, NARROW):
                    o_k = k + tl.arange(0, NARROW)
                    b_gram = load_tile(products, first_B + o_k, first_B + j + o_t, width)
                    b_C += dot(load_rows(A, o_m, o_k, m, r), b_gram, PRECISION)
                b_square += tl.sum(b_C * load_rows(A, o_m, j + o_t, m, r), 1)
            b_n_C = tl.rsqrt(lowrank_scale * lowrank_scale * b_square / d + EPS)
            b_S, b_e = tl.zeros([BLOCK_S, TILE], tl.float32), tl.zeros([BLOCK_S, TILE], tl.float32)
            for j in range(0, r, TILE):
                o_j = first_B + j + o_t
                b_A = tl.trans(load_rows(A, o_m, j + o_t, m, r))
                b_S += dot(b_n[:, None] * load_tile(products, o_s, o_j, width), b_A, PRECISION)
                if BACKWARD:
                    b_e += dot(load_tile(products, o_g, o_j, width), b_A, PRECISION)
            b_S *= lowrank_scale * b_n_C[None, :]
            b_e *= embedding_scale * lowrank_scale
            store_tile(scores, b_S, o_s, o_m, score_width)
            tl.store(inverse_rms_C + o_m, b_n_C)  # every program writes the same
            if BACKWARD:
                store_tile(slopes, b_e, o_s, o_m, score_width)
            b_x = tl.where((o_m < m)[None, :], score_scale * b_S, float("-inf"))
            b_max, b_sum, b_dot = _softmax_step(b_x, b_e, b_max, b_sum, b_dot)
        for first in range(0, s, TILE):
            o_j = first + o_t
            b_S = b_n[:, None] * load_tile(products, o_s, o_j, width)
            b_S *= tl.load(stats + INVERSE_RMS * up(s) + o_j)[None, :]
            b_e = tl.zeros([BLOCK_S, TILE], tl.float32)
            store_tile(scores, b_S, o_s, up(m) + o_j, score_width)
            if BACKWARD:
                b_e = embedding_scale * load_tile(products, o_g, o_j, width)
                store_tile(slopes, b_e, o_s, up(m) + o_j, score_width)
            b_x = tl.where((o_j < s)[None, :], score_scale * b_S, float("-inf"))
            b_max, b_sum, b_dot = _softmax_step(b_x, b_e, b_max, b_sum, b_dot)
        tl.store(stats + MAX * up(s) + o_s, b_max)
        tl.store(stats + INVERSE_SUM * up(s) + o_s, 1.0 / b_sum)
        tl.store(stats + MEAN_SLOPE * up(s) + o_s, b_dot / b_sum)
    b_along = tl.zeros([BLOCK_S], tl.float32)
    if GATES > 0:
        o_k = tl.arange(0, GATES)
        spaces = tl.maximum(K, 1)  # a single space has no gate
        h = columns // spaces
        b_x = tl.zeros([BLOCK_S, GATES], tl.float32)
        if K > 0:
            p_x = products + o_s.to(tl.int64)[:, None] * width + first_G + o_k[None, :]
            b_x = b_n[:, None] * tl.load(p_x, mask=(o_k < K)[None, :], other=0.0)
        b_masked = tl.where((o_k < spaces)[None, :], b_x, float("-inf"))
        b_max = tl.max(b_masked, 1)
        b_log_sum = b_max + tl.log(tl.sum(tl.exp(b_masked - b_max[:, None]), 1))
        b_gates = tl.exp(b_masked - b_log_sum[:, None])
        b_grad_gates = tl.zeros([BLOCK_S, GATES], tl.float32)
        for first in range(0, columns, TILE):
            o_c = first + o_t
            b_space = ((o_c // h)[:, None] == o_k[None, :]).to(tl.float32)  # [TILE, GATES]
            b_before = b_n[:, None] * load_tile(products, o_s, first_D + o_c, width)
            b_gate = dot(b_gates, tl.trans(b_space), PRECISION)
            b_hidden = activate(b_before, ACTIVATION)
            store_tile(sides, b_hidden * b_gate, o_s, o_c, side_width)
            if BACKWARD:
                o_U = first_U + o_c
                b_grad = embedding_scale * load_tile(products, o_g, o_U, width)
                b_grad_before = b_grad * b_gate * slope(b_before, ACTIVATION)
                store_tile(sides, b_grad_before, o_s, side_of_D + o_c, side_width)
                b_along += tl.sum(b_grad_before * b_before, 1)
                b_grad_gates += dot(b_grad * b_hidden, b_space, PRECISION)
        if BACKWARD:  # noqa: SIM102 - one is a constant, the other is not
            if K > 0:
                b_grad_x = b_gates * (b_grad_gates - tl.sum(b_gates * b_grad_gates, 1)[:, None])
                p_grad = sides + o_s.to(tl.int64)[:, None] * side_width + side_of_G + o_k[None, :]
                tl.store(p_grad, b_grad_x, mask=(o_k < up(K))[None, :])
                b_along += tl.sum(b_grad_x * b_x, 1)
    if BACKWARD:
        tl.store(stats + ALONG * up(s) + o_s, b_along)
