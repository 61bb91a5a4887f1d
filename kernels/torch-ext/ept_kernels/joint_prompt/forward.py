"""The second launch of the joint prompt: small softmaxes from the inner products, then the product that expands to d.

A program writes one tile of the output. Its prompt rows' scores, on `C` and on the prompt, are rebuilt a tile at a
time, and the softmax is taken as they come; `[s, m + s]` is never in memory.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .products import inverse_rms_of_p, load_tile, store_tile
from .rows import (
    COLUMNS,
    activate,
    before_activation,
    exponents_of_C,
    exponents_of_p,
    gates,
    gates_of_columns,
    inverse_rms_of_C,
    scores_of_B,
    scores_of_p,
)


@triton.jit
def _fusion(products, prompt, A, B, o_s, b_n, o_d, scale, score_scale, z: tl.constexpr):
    """Computes `Z = ω·[c·A·B; p]` of rows `o_s`, columns `o_d`; the softmax ω in one pass, as it goes."""
    BLOCK_S: tl.constexpr = z.BLOCK_S
    BLOCK_D: tl.constexpr = z.BLOCK_D
    BLOCK_M: tl.constexpr = z.BLOCK_M
    RANK: tl.constexpr = z.RANK
    b_max = tl.full([BLOCK_S], float("-inf"), tl.float32)
    b_sum = tl.zeros([BLOCK_S], tl.float32)
    b_Z = tl.zeros([BLOCK_S, BLOCK_D], tl.float32)
    if z.m > 0:
        b_wA = tl.zeros([BLOCK_S, RANK], tl.float32)  # ω_C·A
        o_r = tl.arange(0, RANK)
        b_T = scores_of_B(products, o_s, b_n, o_r, z)
        for start in tl.range(0, z.m, BLOCK_M):
            o_m = start + tl.arange(0, BLOCK_M)
            b_A = load_tile(A, o_m, o_r, z.m, z.r)
            b_TA = tl.dot(b_T, tl.trans(b_A), input_precision=z.PRECISION)
            b_x = exponents_of_C(b_TA, inverse_rms_of_C(products, o_m, scale, z), o_m, scale, score_scale, z)
            b_new = tl.maximum(b_max, tl.max(b_x, axis=1))
            b_shrink = tl.exp(b_max - b_new)
            b_w = tl.exp(b_x - b_new[:, None])
            b_sum = b_sum * b_shrink + tl.sum(b_w, axis=1)
            b_wA = b_wA * b_shrink[:, None] + tl.dot(b_w, b_A, input_precision=z.PRECISION)
            b_max = b_new
        b_Z = scale * tl.dot(b_wA, load_tile(B, o_r, o_d, z.r, z.d), input_precision=z.PRECISION)
    for start in tl.range(0, z.s, BLOCK_S):
        o_i = start + tl.arange(0, BLOCK_S)
        b_x = exponents_of_p(scores_of_p(products, o_s, b_n, o_i, z), o_i, score_scale, z)
        b_new = tl.maximum(b_max, tl.max(b_x, axis=1))
        b_shrink = tl.exp(b_max - b_new)
        b_w = tl.exp(b_x - b_new[:, None])
        b_sum = b_sum * b_shrink + tl.sum(b_w, axis=1)
        b_p = load_tile(prompt, o_i, o_d, z.s, z.d)
        b_Z = b_Z * b_shrink[:, None] + tl.dot(b_w, b_p, input_precision=z.PRECISION)
        b_max = b_new
    return b_Z / b_sum[:, None]


@triton.jit
def joint_prompt_kernel(
    prompt,  # [s, d]
    A,  # [m, r]
    B,  # [r, d]
    beta,  # [1], or [0]
    U,  # [K·h, d]
    products,  # [parts, size] float32
    out,  # [s, d], contiguous
    lowrank_scale,
    embedding_scale,
    score_scale,
    z: tl.constexpr,
):
    """Writes one tile of `ρ·(p + β·Z + (φ(P̂·D) ⊙ gate)·U)`."""
    BLOCK_S: tl.constexpr = z.BLOCK_S
    BLOCK_D: tl.constexpr = z.BLOCK_D
    i_program = tl.program_id(0)
    tiles = tl.cdiv(z.d, BLOCK_D)
    o_s = i_program // tiles * BLOCK_S + tl.arange(0, BLOCK_S)
    o_d = i_program % tiles * BLOCK_D + tl.arange(0, BLOCK_D)
    b_P = load_tile(prompt, o_s, o_d, z.s, z.d)  # [BLOCK_S, BLOCK_D]
    if z.fusion:
        b_Z = _fusion(
            products, prompt, A, B, o_s, inverse_rms_of_p(products, o_s, z), o_d, lowrank_scale, score_scale, z
        )
        b_P += tl.load(beta).to(tl.float32) * b_Z
    if z.columns > 0:
        b_n = inverse_rms_of_p(products, o_s, z)
        b_gates = None
        if z.K > 0:
            b_gates, _b_pG = gates(products, o_s, b_n, z)
        for start in tl.range(0, z.columns, COLUMNS):
            o_c = start + tl.arange(0, COLUMNS)
            b_hidden = activate(before_activation(products, o_s, b_n, o_c, z), z)  # [BLOCK_S, COLUMNS]
            if z.K > 0:
                b_hidden *= gates_of_columns(b_gates, o_c, z)
            b_U = load_tile(U, o_c, o_d, z.columns, z.d)
            b_P += tl.dot(b_hidden, b_U, input_precision=z.PRECISION)
    store_tile(out, embedding_scale * b_P, o_s, o_d, z.s, z.d)
