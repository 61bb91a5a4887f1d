"""Tiles of matrices, and the layout of the joint prompt's workspace: the building blocks of all its kernels.

A matrix is a tuple: its pointer, the strides of its rows and columns, and their numbers, which are left out if they are
whole tiles, so that nothing needs a mask. Exchanging rows and columns gives its transpose.
"""

from collections import namedtuple

import triton
import triton.language as tl

from .reference import NORM_EPS

EPS = tl.constexpr(NORM_EPS)
UNIT = 32  # rows and columns of a tile
TILE = tl.constexpr(UNIT)
# Rows of `stats`: one over the root mean square of p's row; the largest of its scores and one over the sum of their
# exponentials; the mean slope of its scores.
INVERSE_RMS, MAX, INVERSE_SUM, MEAN_SLOPE = (tl.constexpr(i) for i in range(4))


# The workspace, in float32. Every group of rows or columns is padded with zeros to whole tiles, so that a tile belongs
# to one group. `products`, `mix` and `sides` have the same columns: for p from 0, for B from `at_B`, and so on to U.
#
# products: `[at_q + up(s), width]`, inner products over d of the rows of p, B and, from `at_q`, the incoming gradient.
#     With maps, the rows of p times p and B are queries times keys.
# mix: `[up(s), width]`, coefficients of the rows of p, B and U in the joint prompt.
# sides: `[up(s), width]`, gradients of the products of the rows of p.
# scores: `[up(s), score_width]`, before their scale: for the rows of C, then from `at_p` for p.
# slopes: like scores, gradients of the weights, before β.
# stats: `[4, up(s)]`.
# norms: `[up(m)]`, one over the root mean square of the rows of C.
# normed: `[up(m), up(r)]`, the rows of A times the gradients of those mean squares.
# partial: `[parts, at_q + up(s), width]`, parts of the products.
Layout = namedtuple(
    "Layout",
    "at_B at_q at_k at_D at_G at_U width at_p score_width products mix sides scores slopes stats norms normed partial",
)


@triton.jit
def layout(workspace, s, m, r, a, columns, K, UNIT: tl.constexpr = 32):
    """Computes the start of everything in the workspace; as a Python function on the host, offsets from 0."""
    at_B = (s + UNIT - 1) // UNIT * UNIT
    at_q = at_B + (r + UNIT - 1) // UNIT * UNIT
    at_k = at_q + (a + UNIT - 1) // UNIT * UNIT
    at_D = at_k + at_k - at_q
    at_G = at_D + (columns + UNIT - 1) // UNIT * UNIT
    at_U = at_G + (K + UNIT - 1) // UNIT * UNIT
    width = at_U + at_G - at_D
    at_p = (m + UNIT - 1) // UNIT * UNIT
    score_width = at_p + at_B
    mix = workspace + (at_q + at_B) * width
    sides = mix + at_B * width
    scores = sides + at_B * width
    slopes = scores + at_B * score_width
    stats = slopes + at_B * score_width
    norms = stats + 4 * at_B
    normed = norms + at_p
    partial = normed + at_p * (at_q - at_B)
    starts = (at_B, at_q, at_k, at_D, at_G, at_U, width, at_p, score_width)
    return Layout(*starts, workspace, mix, sides, scores, slopes, stats, norms, normed, partial)


@triton.jit
def load(x, o_i, o_j):
    """Loads rows `o_i`, columns `o_j` of `x` in float32, zero beyond its edges."""
    p_x = x[0] + o_i.to(tl.int64)[:, None] * x[1] + o_j.to(tl.int64)[None, :] * x[2]
    if len(x) == 3:
        b_x = tl.load(p_x)
    else:
        b_x = tl.load(p_x, mask=(o_i < x[3])[:, None] & (o_j < x[4])[None, :], other=0.0)
    return b_x.to(tl.float32)


@triton.jit
def store(x, b_x, o_i, o_j):
    """Stores to the places that `load` would load."""
    p_x = x[0] + o_i.to(tl.int64)[:, None] * x[1] + o_j.to(tl.int64)[None, :] * x[2]
    if len(x) == 3:
        tl.store(p_x, b_x)
    else:
        tl.store(p_x, b_x.to(x[0].dtype.element_ty), mask=(o_i < x[3])[:, None] & (o_j < x[4])[None, :])


@triton.jit
def dot(a, b, PRECISION: tl.constexpr):
    """Multiplies two float32 tiles, accumulated in float32."""
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def add_product(b_sum, x, o_i, y, o_j, end, PRECISION: tl.constexpr, begin=0, BLOCK: tl.constexpr = UNIT):
    """Adds rows `o_i` of `x` times columns `o_j` of `y`, summed from `begin` to `end` in ascending order."""
    for k in range(begin, end, BLOCK):
        o_k = k + tl.arange(0, BLOCK)
        b_sum += dot(load(x, o_i, o_k), load(y, o_k, o_j), PRECISION)
    return b_sum


@triton.jit
def add_products(b_sum, x, o_i, y, middle, z, o_j, end, PRECISION: tl.constexpr):
    """Adds rows `o_i` of `x·y` (summed to `middle`) times columns `o_j` of `z` (summed to `end`), as `add_product`."""
    for k in range(0, end, TILE):
        o_k = k + tl.arange(0, TILE)
        b_xy = tl.zeros([o_i.shape[0], TILE], tl.float32)
        b_xy = add_product(b_xy, x, o_i, y, o_k, middle, PRECISION)
        b_sum += dot(b_xy, load(z, o_k, o_j), PRECISION)
    return b_sum
