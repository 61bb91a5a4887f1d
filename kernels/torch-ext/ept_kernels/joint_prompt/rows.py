"""Scores, softmaxes, gates and activations of a tile of rows: the joint prompt between its two products.

Helpers of the kernels. They read the inner products and rebuild the little that a program needs in registers; nothing
is kept in memory between them. Letters as in `reference.py`; `z` is the `Shape`. Rows beyond the last
are zero on both sides of every product, columns beyond the last have the score −∞.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .products import inner, inverse_rms, inverse_rms_of_p
from .shape import SPACE_COLUMNS

COLUMNS = tl.constexpr(SPACE_COLUMNS)

# Scores. b_n: one over the root mean square of the prompt's rows at hand.


@triton.jit
def queries(products, o_s, b_n, z: tl.constexpr):
    """Computes `P̂·W_q` `[rows, MAPS]`, only with maps."""
    MAPS: tl.constexpr = z.MAPS
    return b_n[:, None] * inner(products, o_s, tl.arange(0, MAPS), z.s, z.a, 0, z.column_q, z)


@triton.jit
def keys(products, o_s, b_n, z: tl.constexpr):
    """Computes `P̂·W_k` `[rows, MAPS]`, only with maps."""
    MAPS: tl.constexpr = z.MAPS
    return b_n[:, None] * inner(products, o_s, tl.arange(0, MAPS), z.s, z.a, 0, z.column_k, z)


@triton.jit
def keys_of_B(products, o_r, z: tl.constexpr):
    """Computes `B·W_k` `[o_r, MAPS]`, only with maps."""
    MAPS: tl.constexpr = z.MAPS
    return inner(products, o_r, tl.arange(0, MAPS), z.r, z.a, z.row_B, z.column_k, z)


@triton.jit
def scores_of_B(products, o_s, b_n, o_r, z: tl.constexpr):
    """Computes `T = q·key_Bᵀ` `[rows, o_r]`: scores in rank space."""
    if z.a > 0:
        b_q, b_k = queries(products, o_s, b_n, z), keys_of_B(products, o_r, z)
        b_T = tl.dot(b_q, tl.trans(b_k), input_precision=z.PRECISION)
    else:
        b_T = b_n[:, None] * inner(products, o_s, o_r, z.s, z.r, 0, z.s, z)
    return b_T


@triton.jit
def scores_of_p(products, o_s, b_n, o_i, z: tl.constexpr):
    """Computes `q·kᵀ` of the prompt's rows `o_s` on its rows `o_i`."""
    b_n_i = inverse_rms_of_p(products, o_i, z)
    if z.a > 0:
        b_q, b_k = queries(products, o_s, b_n, z), keys(products, o_i, b_n_i, z)
        b_scores = tl.dot(b_q, tl.trans(b_k), input_precision=z.PRECISION)
    else:
        b_scores = inner(products, o_s, o_i, z.s, z.s, 0, 0, z) * b_n[:, None] * b_n_i[None, :]
    return b_scores


@triton.jit
def exponents_of_p(b_scores, o_i, score_scale, z: tl.constexpr):
    """Computes the softmax's exponents of scores on the prompt's rows `o_i`."""
    return tl.where((o_i < z.s)[None, :], score_scale * b_scores, float("-inf"))


@triton.jit
def exponents_of_C(b_TA, b_n_C, o_m, scale, score_scale, z: tl.constexpr):
    """Computes the softmax's exponents of `T·Aᵀ` on the rows `o_m` of `C`; `b_n_C`: one over their root mean square."""
    return tl.where((o_m < z.m)[None, :], score_scale * scale * b_TA * b_n_C[None, :], float("-inf"))


@triton.jit
def inverse_rms_of_C(products, o_m, scale, z: tl.constexpr):
    """Computes one over the root mean square of the rows `o_m` of `C`."""
    return inverse_rms(products, z.squares, 1, o_m, z.m, scale, z)


# Spaces.


@triton.jit
def activate(x, z: tl.constexpr):
    """Computes φ(x)."""
    if z.activation == "relu":
        x = tl.maximum(x, 0.0)
    elif z.activation == "silu":
        x = x * tl.sigmoid(x)
    elif z.activation == "tanh":
        x = tanh(x)
    elif z.activation == "gelu":
        x = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    else:
        tl.static_assert(z.activation == "linear")
    return x


@triton.jit
def slope(x, z: tl.constexpr):
    """Computes φ'(x)."""
    if z.activation == "relu":
        x = tl.where(x > 0, 1.0, 0.0)
    elif z.activation == "silu":
        x = tl.sigmoid(x) * (1.0 + x * tl.sigmoid(-x))
    elif z.activation == "tanh":
        x = 4.0 * tl.sigmoid(2.0 * x) * tl.sigmoid(-2.0 * x)
    elif z.activation == "gelu":
        density = 0.3989422804014327 * tl.exp(-0.5 * x * x)
        x = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476)) + x * density
    else:
        tl.static_assert(z.activation == "linear")
        x = tl.full(x.shape, 1.0, tl.float32)
    return x


@triton.jit
def tanh(x):
    """Computes it by a sigmoid and near 0, where that would cancel, by its power series."""
    y = x * x
    series = x * (1 + y * (-1 / 3 + y * (2 / 15 + y * (-17 / 315 + y * (62 / 2835)))))
    return tl.where(y < 0.0625, series, 2.0 * tl.sigmoid(2.0 * x) - 1.0)


@triton.jit
def gates(products, o_s, b_n, z: tl.constexpr):
    """Computes `softmax(P̂·G)` `[rows, GATES]`, 0 beyond the last space, and `P̂·G`."""
    GATES: tl.constexpr = z.GATES
    o_k = tl.arange(0, GATES)
    b_pG = b_n[:, None] * inner(products, o_s, o_k, z.s, z.K, 0, z.column_G, z)
    b_x = tl.where((o_k < z.K)[None, :], b_pG, float("-inf"))
    b_w = tl.exp(b_x - tl.max(b_x, axis=1)[:, None])
    return b_w / tl.sum(b_w, axis=1)[:, None], b_pG


@triton.jit
def spaces_of_columns(o_c, z: tl.constexpr):
    """Marks `[columns, GATES]`: 1 where column `o_c` of `D` belongs to the space, else 0."""
    GATES: tl.constexpr = z.GATES
    return ((o_c // z.h)[:, None] == tl.arange(0, GATES)[None, :]).to(tl.float32)


@triton.jit
def gates_of_columns(b_gates, o_c, z: tl.constexpr):
    """Spreads the gates of the spaces that the columns `o_c` of `D` belong to: `[rows, columns]`."""
    return tl.dot(b_gates, tl.trans(spaces_of_columns(o_c, z)), input_precision=z.PRECISION)


@triton.jit
def before_activation(products, o_s, b_n, o_c, z: tl.constexpr):
    """Computes `P̂·D` `[rows, columns]`."""
    return b_n[:, None] * inner(products, o_s, o_c, z.s, z.columns, 0, z.column_D, z)
