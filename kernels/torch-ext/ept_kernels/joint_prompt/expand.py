"""Triton kernel of the joint prompt that writes the results of width d: the prompt, or all gradients but `A`'s and β's.

A program owns a tile of rows and columns of one result, which is a sum of products: of `mix` and `sides` with rows of
the parameters, or of their transposes with rows of p and of the incoming gradient.
"""

import triton
import triton.language as tl

from .scores import weights
from .tiles import INVERSE_RMS, TILE, add_product, add_products, dot, layout, load, store


@triton.jit(do_not_specialize=["s", "m", "r", "a", "columns", "K"])
def joint_prompt_expand_kernel(
    prompt,  # [s, d]
    grad_output,  # [s, d]
    A,  # [m, r]
    B,  # [r, d]
    beta,  # [1]
    W_q,  # [d, a]
    W_k,  # [d, a]
    D,  # [d, columns]
    U,  # [columns, d]
    G,  # [d, K]
    workspace,
    out,  # [s, d]: the joint prompt, or the gradient of p
    grad_B,  # this and the following: None in the forward
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
    # Meta-parameters
    BLOCK_D: tl.constexpr,
    FUSION: tl.constexpr,
    MAPS: tl.constexpr,
    BACKWARD: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Writes one tile of one result; the rows of the results are the columns of `mix` and `sides`: p, B, W_qᵀ, …"""
    i = tl.program_id(1) * TILE
    o_i = i + tl.arange(0, TILE)
    o_d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    w = layout(workspace, s, m, r, a, columns, K)
    p, g = (prompt, d, 1, s, d), (grad_output, d, 1, s, d)
    sides, sides_T, mix_T = (w.sides, w.width, 1), (w.sides, 1, w.width), (w.mix, 1, w.width)
    b_out = tl.zeros([TILE, BLOCK_D], tl.float32)
    if not BACKWARD:
        if FUSION:  # ω·[c·A·B; p] from the weights, as the forward's `mix` has no columns of p and B
            o_t = tl.arange(0, TILE)
            b_attended = tl.zeros([TILE, BLOCK_D], tl.float32)
            for j in range(0, r, TILE):
                b_A = tl.zeros([TILE, TILE], tl.float32)
                for first in range(0, m, TILE):
                    b_w, _ = weights(w, score_scale, o_i, first + o_t, first + o_t < m)
                    b_A += dot(b_w, load((A, r, 1, m, r), first + o_t, j + o_t), PRECISION)
                b_attended += dot(lowrank_scale * b_A, load((B, d, 1, r, d), j + o_t, o_d), PRECISION)
            for first in range(0, s, TILE):
                b_w, _ = weights(w, score_scale, o_i, w.at_p + first + o_t, first + o_t < s)
                b_attended += dot(b_w, load(p, first + o_t, o_d), PRECISION)
            b_out = embedding_scale * tl.load(beta).to(tl.float32) * b_attended
        b_out = add_product(b_out, (w.mix + w.at_U, w.width, 1), o_i, (U, d, 1, columns, d), o_d, columns, PRECISION)
        store((out, d, 1, s, d), b_out + embedding_scale * load(p, o_i, o_d), o_i, o_d)
    elif i < w.at_B:
        if FUSION:
            b_out = add_product(b_out, mix_T, o_i, g, o_d, s, PRECISION)
        if MAPS:
            b_out = add_product(b_out, (w.sides + w.at_q, w.width, 1), o_i, (W_q, 1, a, a, d), o_d, a, PRECISION)
            b_out = add_product(b_out, (w.sides + w.at_k, w.width, 1), o_i, (W_k, 1, a, a, d), o_d, a, PRECISION)
        elif FUSION:
            b_out = add_product(b_out, sides, o_i, p, o_d, s, PRECISION)
            b_out = add_product(b_out, (w.sides + w.at_B, w.width, 1), o_i, (B, d, 1, r, d), o_d, r, PRECISION)
        of_spaces = (w.sides + w.at_D, w.width, 1)
        b_out = add_product(b_out, of_spaces, o_i, (D, 1, columns, columns, d), o_d, columns, PRECISION)
        b_out = add_product(b_out, (w.sides + w.at_G, w.width, 1), o_i, (G, 1, K, K, d), o_d, K, PRECISION)
        # Normalisation removes the component along p: the sum of the products times their gradients.
        b_along = tl.zeros([TILE], tl.float32)
        for first in range(w.at_q if MAPS or not FUSION else 0, w.at_U, TILE):
            o_j = first + tl.arange(0, TILE)
            b_along += tl.sum(load((w.products, w.width, 1), o_i, o_j) * load(sides, o_i, o_j), 1)
        b_n = tl.load(w.stats + INVERSE_RMS * w.at_B + o_i)
        b_out += embedding_scale * load(g, o_i, o_d) - (b_n * b_n * b_along / d)[:, None] * load(p, o_i, o_d)
        store((out, d, 1, s, d), b_out, o_i, o_d)
    elif i >= w.at_U:
        b_out = add_product(b_out, mix_T, o_i, g, o_d, s, PRECISION)
        store((grad_U, d, 1, columns, d), b_out, o_i - w.at_U, o_d)
    elif i < w.at_q:
        o_r, A_T, normed = o_i - w.at_B, (A, 1, r, r, m), (w.normed, w.at_q - w.at_B, 1)
        b_out = add_product(b_out, mix_T, o_i, g, o_d, s, PRECISION)
        # First the gradient through B·Bᵀ, then through B·W_k.
        b_out = add_products(b_out, A_T, o_r, normed, m, (B, d, 1, r, d), o_d, r, PRECISION)
        if MAPS:
            queries = (w.products + w.at_q, w.width, 1)
            b_out = add_products(b_out, sides_T, o_i, queries, s, (W_k, 1, a, a, d), o_d, a, PRECISION)
        else:
            b_out = add_product(b_out, sides_T, o_i, p, o_d, s, PRECISION)
        store((grad_B, d, 1, r, d), b_out, o_r, o_d)
    else:
        b_out = add_product(b_out, sides_T, o_i, p, o_d, s, PRECISION)
        if i >= w.at_G:
            store((grad_G, 1, K, K, d), b_out, o_i - w.at_G, o_d)
        elif i >= w.at_D:
            store((grad_D, 1, columns, columns, d), b_out, o_i - w.at_D, o_d)
        elif i < w.at_k:
            store((grad_W_q, 1, a, a, d), b_out, o_i - w.at_q, o_d)
        else:
            o_a = o_i - w.at_k
            # Gradient through B·W_k, transposed.
            queries_T, to_B = (w.products + w.at_q, 1, w.width), (w.sides + w.at_B, w.width, 1)
            b_out = add_products(b_out, queries_T, o_a, to_B, s, (B, d, 1, r, d), o_d, r, PRECISION)
            store((grad_W_k, 1, a, a, d), b_out, o_a, o_d)
