"""The second launch of the joint prompt's backward: all gradients from the inner products, nothing else in memory.

A program writes one tile of one gradient. What it needs of the softmax ω it rebuilds: for some prompt rows j at a time
it goes through all scores once for their statistics (maximum, sum, and `δ = Σ ω·∂ω`), and adds what those rows give
to its tile. No program reads what another one of this launch has written. With `∂P` the gradient of the output times
ρ, and sums over the prompt's rows j unless said otherwise:

    ∂ω_C = c·(∂P·Bᵀ)·Aᵀ,  ∂ω_p = ∂P·pᵀ,  ∂x = σ·β·ω·(∂ω − δ),  ∂β = Σ δ
    ∂T = c·(∂x_C ⊙ n)·A                           [s, r]     n one over the root mean square of C's rows
    w = −(c³/d)·n³·Σ_j ∂x_C ⊙ (T·Aᵀ)              [m]        what the normalisation of C passes on
    ∂A = β·c·ω_Cᵀ·(∂P·Bᵀ) + c·(∂x_C ⊙ n)ᵀ·T + w·A·(B·Bᵀ)
    ∂B = β·c·(ω_C·A)ᵀ·∂P + ∂Tᵀ·P̂ + (Aᵀ·w·A)·B    with maps ∂Tᵀ·q·W_kᵀ in place of ∂Tᵀ·P̂
    ∂p = ∂P + β·ω_pᵀ·∂P + n_p·(∂P̂ − P̂·mean(∂P̂·P̂))
"""

from __future__ import annotations

import triton
import triton.language as tl

from .backward_spaces import grad_of_G, grads_of_spaces, spaces_to_p
from .products import inner, inverse_rms_of_p, load_tile, store_tile
from .rows import exponents_of_C, exponents_of_p, inverse_rms_of_C, keys, keys_of_B, queries, scores_of_B, scores_of_p

# Nothing is hoisted out of the loops (disable_licm): what they hold throughout would overflow the registers.

# The softmax of some prompt rows j. b_n: one over their root mean square; b_max, b_sum, b_delta: its statistics.


@triton.jit
def _statistics(products, A, o_j, b_n, c, rho, sigma, z: tl.constexpr):
    """Computes the maximum of the exponents, the sum of their exponentials and `δ`, `[rows]` each."""
    BLOCK_M: tl.constexpr = z.BLOCK_M
    BLOCK_S: tl.constexpr = z.BLOCK_S
    b_max = tl.full([BLOCK_S], float("-inf"), tl.float32)
    b_sum = tl.zeros([BLOCK_S], tl.float32)
    b_delta = tl.zeros([BLOCK_S], tl.float32)
    for start in tl.range(0, z.m, BLOCK_M, disable_licm=True):
        _b_n_C, _b_TA, b_x, b_gw = _on_C(products, A, o_j, b_n, start + tl.arange(0, BLOCK_M), c, rho, sigma, z)
        b_max, b_sum, b_delta = _update(b_max, b_sum, b_delta, b_x, b_gw)
    for start in tl.range(0, z.s, BLOCK_S, disable_licm=True):
        _b_scores, b_x, b_gw = _on_p(products, o_j, b_n, start + tl.arange(0, BLOCK_S), rho, sigma, z)
        b_max, b_sum, b_delta = _update(b_max, b_sum, b_delta, b_x, b_gw)
    return b_max, b_sum, b_delta / b_sum


@triton.jit
def _update(b_max, b_sum, b_delta, b_x, b_gw):
    """Updates the statistics with the exponents and `∂ω` of one more tile."""
    b_new = tl.maximum(b_max, tl.max(b_x, axis=1))
    b_shrink = tl.exp(b_max - b_new)
    b_w = tl.exp(b_x - b_new[:, None])
    return b_new, b_sum * b_shrink + tl.sum(b_w, axis=1), b_delta * b_shrink + tl.sum(b_w * b_gw, axis=1)


@triton.jit
def _grads_along_B(products, o_j, o_r, rho, z: tl.constexpr):
    """Computes `∂P·Bᵀ` `[rows, o_r]`."""
    return rho * inner(products, o_j, o_r, z.s, z.r, z.s, z.s, z)


@triton.jit
def _on_C(products, A, o_j, b_n, o_m, c, rho, sigma, z: tl.constexpr):
    """Computes one over the root mean square of `C`'s rows `o_m`; `T·Aᵀ`, exponents and `∂ω` on them `[rows, o_m]`.

    A piece of the rank at a time, read anew each time: held throughout, the operands would overflow the registers.
    """
    BLOCK_M: tl.constexpr = z.BLOCK_M
    BLOCK_R: tl.constexpr = z.BLOCK_R
    BLOCK_S: tl.constexpr = z.BLOCK_S
    b_TA = tl.zeros([BLOCK_S, BLOCK_M], tl.float32)
    b_gA = tl.zeros([BLOCK_S, BLOCK_M], tl.float32)
    for start in tl.range(0, z.r, BLOCK_R, disable_licm=True):
        o_r = start + tl.arange(0, BLOCK_R)
        b_A = tl.trans(load_tile(A, o_m, o_r, z.m, z.r))  # [BLOCK_R, BLOCK_M]
        b_TA += tl.dot(scores_of_B(products, o_j, b_n, o_r, z), b_A, input_precision=z.PRECISION)
        b_gA += tl.dot(_grads_along_B(products, o_j, o_r, rho, z), b_A, input_precision=z.PRECISION)
    b_n_C = inverse_rms_of_C(products, o_m, c, z)
    return b_n_C, b_TA, exponents_of_C(b_TA, b_n_C, o_m, c, sigma, z), c * b_gA


@triton.jit
def _on_p(products, o_j, b_n, o_i, rho, sigma, z: tl.constexpr):
    """Computes scores, exponents and `∂ω` on the prompt's rows `o_i`: `[rows, o_i]`."""
    b_scores = scores_of_p(products, o_j, b_n, o_i, z)
    b_gw = rho * inner(products, o_j, o_i, z.s, z.s, z.s, 0, z)
    return b_scores, exponents_of_p(b_scores, o_i, sigma, z), b_gw


@triton.jit
def _weights(b_x, b_gw, b_max, b_sum, b_delta, factor):
    """Computes `ω` and `∂x`; `factor`: σ·β."""
    b_w = tl.exp(b_x - b_max[:, None]) / b_sum[:, None]
    return b_w, factor * b_w * (b_gw - b_delta[:, None])


@triton.jit
def _weights_on_C(products, A, o_j, b_n, o_m, b_max, b_sum, b_delta, c, rho, sigma, factor, z: tl.constexpr):
    """Computes `ω` on `C`'s rows `o_m`; `c·∂x ⊙ n`; and what these prompt rows add to `w`."""
    b_n_C, b_TA, b_x, b_gw = _on_C(products, A, o_j, b_n, o_m, c, rho, sigma, z)
    b_w, b_gx = _weights(b_x, b_gw, b_max, b_sum, b_delta, factor)
    b_norms = (-c * c * c / z.d) * b_n_C * b_n_C * b_n_C * tl.sum(b_gx * b_TA, axis=0)
    return b_w, c * b_gx * b_n_C[None, :], b_norms


@triton.jit
def _grad_T(products, A, o_j, b_n, b_max, b_sum, b_delta, c, rho, sigma, factor, z: tl.constexpr):
    """Computes `∂T` `[rows, RANK]`."""
    BLOCK_M: tl.constexpr = z.BLOCK_M
    BLOCK_S: tl.constexpr = z.BLOCK_S
    RANK: tl.constexpr = z.RANK
    b_gT = tl.zeros([BLOCK_S, RANK], tl.float32)
    for start in tl.range(0, z.m, BLOCK_M, disable_licm=True):
        o_m = start + tl.arange(0, BLOCK_M)
        _b_w, b_gxn, _b_norms = _weights_on_C(
            products, A, o_j, b_n, o_m, b_max, b_sum, b_delta, c, rho, sigma, factor, z
        )
        b_gT += tl.dot(b_gxn, load_tile(A, o_m, tl.arange(0, RANK), z.m, z.r), input_precision=z.PRECISION)
    return b_gT


@triton.jit
def _keys_weighted(products, prompt, o_j, b_n, o_d, b_max, b_sum, b_delta, rho, sigma, factor, z: tl.constexpr):
    """Computes `Σ_i ∂x[j, i]·P̂_i`, columns `o_d`, and `Σ_i ∂x[j, i]·score[j, i]`."""
    BLOCK_S: tl.constexpr = z.BLOCK_S
    b_keys = tl.zeros([BLOCK_S, o_d.shape[0]], tl.float32)
    b_along = tl.zeros([BLOCK_S], tl.float32)
    for start in tl.range(0, z.s, BLOCK_S, disable_licm=True):
        o_i = start + tl.arange(0, BLOCK_S)
        b_scores, b_x, b_gw = _on_p(products, o_j, b_n, o_i, rho, sigma, z)
        _b_w, b_gx = _weights(b_x, b_gw, b_max, b_sum, b_delta, factor)
        b_p_hat = load_tile(prompt, o_i, o_d, z.s, z.d) * inverse_rms_of_p(products, o_i, z)[:, None]
        b_keys += tl.dot(b_gx, b_p_hat, input_precision=z.PRECISION)
        b_along += tl.sum(b_gx * b_scores, axis=1)
    return b_keys, b_along


@triton.jit
def _grad_queries(products, b_gT, o_j, b_n, b_max, b_sum, b_delta, rho, sigma, factor, z: tl.constexpr):
    """Computes `∂q` `[rows, MAPS]`, only with maps."""
    BLOCK_S: tl.constexpr = z.BLOCK_S
    RANK: tl.constexpr = z.RANK
    b_gq = tl.dot(b_gT, keys_of_B(products, tl.arange(0, RANK), z), input_precision=z.PRECISION)
    for start in tl.range(0, z.s, BLOCK_S, disable_licm=True):
        o_i = start + tl.arange(0, BLOCK_S)
        _b_scores, b_x, b_gw = _on_p(products, o_j, b_n, o_i, rho, sigma, z)
        _b_w, b_gx = _weights(b_x, b_gw, b_max, b_sum, b_delta, factor)
        b_keys = keys(products, o_i, inverse_rms_of_p(products, o_i, z), z)
        b_gq += tl.dot(b_gx, b_keys, input_precision=z.PRECISION)
    return b_gq


# The gradients, a tile each.


@triton.jit
def _fusion_to_p(
    products,
    prompt,
    grad_output,
    A,
    B,
    W_q,
    W_k,
    grad_beta,
    b_direct,
    b_hat,
    b_along,
    beta,
    i_s,
    o_s,
    i_d,
    o_d,
    c,
    rho,
    sigma,
    z: tl.constexpr,
):
    """Adds the fusion's part of `∂p`: directly, to `∂P̂`, and to the sum of `∂P̂·P̂` over d. One program writes
    `∂β`.
    """
    BLOCK_S: tl.constexpr = z.BLOCK_S
    RANK: tl.constexpr = z.RANK
    MAPS: tl.constexpr = z.MAPS
    factor = sigma * beta

    # The rows o_s as keys and values of the rows j; b_own_…: the statistics of the rows o_s themselves.
    b_gk = tl.zeros([BLOCK_S, MAPS], tl.float32)
    b_grad_beta = tl.zeros([BLOCK_S], tl.float32)
    b_own_max = tl.zeros([BLOCK_S], tl.float32)
    b_own_sum = tl.zeros([BLOCK_S], tl.float32)
    b_own_delta = tl.zeros([BLOCK_S], tl.float32)
    for i_j in tl.range(0, tl.cdiv(z.s, BLOCK_S), disable_licm=True):
        o_j = i_j * BLOCK_S + tl.arange(0, BLOCK_S)
        b_n = inverse_rms_of_p(products, o_j, z)
        b_max, b_sum, b_delta = _statistics(products, A, o_j, b_n, c, rho, sigma, z)
        b_grad_beta += b_delta
        b_own_max = tl.where(i_j == i_s, b_max, b_own_max)
        b_own_sum = tl.where(i_j == i_s, b_sum, b_own_sum)
        b_own_delta = tl.where(i_j == i_s, b_delta, b_own_delta)
        b_scores, b_x, b_gw = _on_p(products, o_j, b_n, o_s, rho, sigma, z)
        b_w, b_gx = _weights(b_x, b_gw, b_max, b_sum, b_delta, factor)
        b_gP = rho * load_tile(grad_output, o_j, o_d, z.s, z.d)
        b_direct += beta * tl.dot(tl.trans(b_w), b_gP, input_precision=z.PRECISION)
        if z.a > 0:
            b_gk += tl.dot(tl.trans(b_gx), queries(products, o_j, b_n, z), input_precision=z.PRECISION)
        else:
            b_p_hat = load_tile(prompt, o_j, o_d, z.s, z.d) * b_n[:, None]
            b_hat += tl.dot(tl.trans(b_gx), b_p_hat, input_precision=z.PRECISION)
            b_along += tl.sum(b_gx * b_scores, axis=0)
    if (i_s == 0) & (i_d == 0):
        tl.store(grad_beta, tl.sum(b_grad_beta).to(grad_beta.dtype.element_ty))
    b_n = inverse_rms_of_p(products, o_s, z)
    if z.a > 0:
        b_W = load_tile(W_k, o_d, tl.arange(0, MAPS), z.d, z.a)  # [BLOCK_D, MAPS]
        b_hat += tl.dot(b_gk, tl.trans(b_W), input_precision=z.PRECISION)
        b_along += tl.sum(b_gk * keys(products, o_s, b_n, z), axis=1)

    # The rows o_s as queries.
    b_gT = _grad_T(products, A, o_s, b_n, b_own_max, b_own_sum, b_own_delta, c, rho, sigma, factor, z)
    if z.a > 0:
        b_gq = _grad_queries(products, b_gT, o_s, b_n, b_own_max, b_own_sum, b_own_delta, rho, sigma, factor, z)
        b_W = load_tile(W_q, o_d, tl.arange(0, MAPS), z.d, z.a)
        b_hat += tl.dot(b_gq, tl.trans(b_W), input_precision=z.PRECISION)
        b_along += tl.sum(b_gq * queries(products, o_s, b_n, z), axis=1)
    else:
        b_keys, b_along_keys = _keys_weighted(
            products, prompt, o_s, b_n, o_d, b_own_max, b_own_sum, b_own_delta, rho, sigma, factor, z
        )
        b_hat += b_keys
        b_along += b_along_keys
        if z.m > 0:
            o_r = tl.arange(0, RANK)
            b_B = load_tile(B, o_r, o_d, z.r, z.d)
            b_hat += tl.dot(b_gT, b_B, input_precision=z.PRECISION)
            b_along += tl.sum(b_gT * scores_of_B(products, o_s, b_n, o_r, z), axis=1)
    return b_direct, b_hat, b_along


@triton.jit
def _grad_of_B(products, prompt, grad_output, A, B, W_k, grad_B, beta, i_r, o_d, c, rho, sigma, z: tl.constexpr):
    """Writes a tile of `∂B`."""
    BLOCK_D: tl.constexpr = z.BLOCK_D
    BLOCK_M: tl.constexpr = z.BLOCK_M
    BLOCK_R: tl.constexpr = z.BLOCK_R
    BLOCK_S: tl.constexpr = z.BLOCK_S
    RANK: tl.constexpr = z.RANK
    MAPS: tl.constexpr = z.MAPS
    o_r = i_r * BLOCK_R + tl.arange(0, BLOCK_R)
    b_grad = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    b_square = tl.zeros([BLOCK_R, RANK], tl.float32)  # Aᵀ·w·A
    b_gk = tl.zeros([BLOCK_R, MAPS], tl.float32)
    for start_j in tl.range(0, z.s, BLOCK_S, disable_licm=True):
        o_j = start_j + tl.arange(0, BLOCK_S)
        b_n = inverse_rms_of_p(products, o_j, z)
        b_max, b_sum, b_delta = _statistics(products, A, o_j, b_n, c, rho, sigma, z)
        b_wA = tl.zeros([BLOCK_R, BLOCK_S], tl.float32)  # (ω_C·A)ᵀ
        b_gT = tl.zeros([BLOCK_R, BLOCK_S], tl.float32)  # ∂Tᵀ
        for start_m in tl.range(0, z.m, BLOCK_M, disable_licm=True):
            o_m = start_m + tl.arange(0, BLOCK_M)
            b_w, b_gxn, b_norms = _weights_on_C(
                products, A, o_j, b_n, o_m, b_max, b_sum, b_delta, c, rho, sigma, sigma * beta, z
            )
            b_A = load_tile(A, o_m, tl.arange(0, RANK), z.m, z.r)
            b_own = tl.trans(load_tile(A, o_m, o_r, z.m, z.r))  # [BLOCK_R, BLOCK_M]
            b_wA += tl.dot(b_own, tl.trans(b_w), input_precision=z.PRECISION)
            b_gT += tl.dot(b_own, tl.trans(b_gxn), input_precision=z.PRECISION)
            b_square += tl.dot(b_own * b_norms[None, :], b_A, input_precision=z.PRECISION)
        b_gP = rho * load_tile(grad_output, o_j, o_d, z.s, z.d)
        b_grad += beta * c * tl.dot(b_wA, b_gP, input_precision=z.PRECISION)
        if z.a > 0:
            b_gk += tl.dot(b_gT, queries(products, o_j, b_n, z), input_precision=z.PRECISION)
        else:
            b_p_hat = load_tile(prompt, o_j, o_d, z.s, z.d) * b_n[:, None]
            b_grad += tl.dot(b_gT, b_p_hat, input_precision=z.PRECISION)
    b_B = load_tile(B, tl.arange(0, RANK), o_d, z.r, z.d)
    b_grad += tl.dot(b_square, b_B, input_precision=z.PRECISION)
    if z.a > 0:
        b_W = load_tile(W_k, o_d, tl.arange(0, MAPS), z.d, z.a)
        b_grad += tl.dot(b_gk, tl.trans(b_W), input_precision=z.PRECISION)
    store_tile(grad_B, b_grad, o_r, o_d, z.r, z.d)


@triton.jit
def _grad_of_A(products, A, grad_A, beta, i_m, c, rho, sigma, z: tl.constexpr):
    """Writes a tile of `∂A`."""
    BLOCK_M: tl.constexpr = z.BLOCK_M
    BLOCK_R: tl.constexpr = z.BLOCK_R
    BLOCK_S: tl.constexpr = z.BLOCK_S
    RANK: tl.constexpr = z.RANK
    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    o_r = tl.arange(0, RANK)
    b_grad = tl.zeros([BLOCK_M, RANK], tl.float32)
    b_w_sum = tl.zeros([BLOCK_M], tl.float32)
    for start in tl.range(0, z.s, BLOCK_S, disable_licm=True):
        o_j = start + tl.arange(0, BLOCK_S)
        b_n = inverse_rms_of_p(products, o_j, z)
        b_max, b_sum, b_delta = _statistics(products, A, o_j, b_n, c, rho, sigma, z)
        b_w, b_gxn, b_norms = _weights_on_C(
            products, A, o_j, b_n, o_m, b_max, b_sum, b_delta, c, rho, sigma, sigma * beta, z
        )
        b_gB, b_T = _grads_along_B(products, o_j, o_r, rho, z), scores_of_B(products, o_j, b_n, o_r, z)
        b_grad += beta * c * tl.dot(tl.trans(b_w), b_gB, input_precision=z.PRECISION)
        b_grad += tl.dot(tl.trans(b_gxn), b_T, input_precision=z.PRECISION)
        b_w_sum += b_norms
    for start in tl.range(0, z.r, BLOCK_R, disable_licm=True):
        o_i = start + tl.arange(0, BLOCK_R)
        b_wA = b_w_sum[:, None] * load_tile(A, o_m, o_i, z.m, z.r)
        b_BB = inner(products, o_i, o_r, z.r, z.r, z.row_B, z.s, z)  # [BLOCK_R, RANK]
        b_grad += tl.dot(b_wA, b_BB, input_precision=z.PRECISION)
    store_tile(grad_A, b_grad, o_m, o_r, z.m, z.r)


@triton.jit
def _grads_of_maps(products, prompt, A, B, grad_W_q, grad_W_k, beta, o_d, c, rho, sigma, z: tl.constexpr):
    """Writes tiles of `∂W_q = P̂ᵀ·∂q`, and `∂W_k = (∂x·K)ᵀ·q` with the rows K that are keys."""
    BLOCK_D: tl.constexpr = z.BLOCK_D
    BLOCK_S: tl.constexpr = z.BLOCK_S
    RANK: tl.constexpr = z.RANK
    MAPS: tl.constexpr = z.MAPS
    o_a = tl.arange(0, MAPS)
    factor = sigma * beta
    b_grad_q = tl.zeros([BLOCK_D, MAPS], tl.float32)
    b_grad_k = tl.zeros([BLOCK_D, MAPS], tl.float32)
    for start in tl.range(0, z.s, BLOCK_S, disable_licm=True):
        o_j = start + tl.arange(0, BLOCK_S)
        b_n = inverse_rms_of_p(products, o_j, z)
        b_max, b_sum, b_delta = _statistics(products, A, o_j, b_n, c, rho, sigma, z)
        b_gT = _grad_T(products, A, o_j, b_n, b_max, b_sum, b_delta, c, rho, sigma, factor, z)
        b_gq = _grad_queries(products, b_gT, o_j, b_n, b_max, b_sum, b_delta, rho, sigma, factor, z)
        b_p_hat = load_tile(prompt, o_j, o_d, z.s, z.d) * b_n[:, None]
        b_grad_q += tl.dot(tl.trans(b_p_hat), b_gq, input_precision=z.PRECISION)
        b_keys, _b_along = _keys_weighted(products, prompt, o_j, b_n, o_d, b_max, b_sum, b_delta, rho, sigma, factor, z)
        b_keys += tl.dot(b_gT, load_tile(B, tl.arange(0, RANK), o_d, z.r, z.d), input_precision=z.PRECISION)
        b_grad_k += tl.dot(tl.trans(b_keys), queries(products, o_j, b_n, z), input_precision=z.PRECISION)
    store_tile(grad_W_q, b_grad_q, o_d, o_a, z.d, z.a)
    store_tile(grad_W_k, b_grad_k, o_d, o_a, z.d, z.a)


@triton.jit
def joint_prompt_backward_kernel(
    grad_output,  # [s, d]
    prompt,  # [s, d]
    A,  # [m, r]
    B,  # [r, d]
    beta,  # [1], or [0]
    W_q,  # [d, a]
    W_k,  # [d, a]
    D,  # [d, K·h]
    G,  # [d, K]
    products,  # [parts, size] float32
    grad_prompt,  # the gradients: contiguous, of the shapes of their parameters
    grad_A,
    grad_B,
    grad_beta,
    grad_W_q,
    grad_W_k,
    grad_D,
    grad_U,
    grad_G,
    lowrank_scale,
    embedding_scale,
    score_scale,
    z: tl.constexpr,
):
    """Writes one tile of one gradient: the first programs take `∂A`, the others each a column tile of `∂B`, the maps,
    the prompt, the gate or the spaces.
    """
    BLOCK_S: tl.constexpr = z.BLOCK_S
    BLOCK_D: tl.constexpr = z.BLOCK_D
    c, rho, sigma = lowrank_scale, embedding_scale, score_scale
    i_program = tl.program_id(0)
    columns = tl.cdiv(z.d, BLOCK_D)
    i_tile = (i_program - z.programs_A) // columns
    i_d = (i_program - z.programs_A) % columns
    o_d = i_d * BLOCK_D + tl.arange(0, BLOCK_D)
    b_beta = 0.0
    if z.fusion:
        b_beta = tl.load(beta).to(tl.float32)

    if i_program < z.programs_A:
        if z.m > 0:
            _grad_of_A(products, A, grad_A, b_beta, i_program, c, rho, sigma, z)
    elif i_tile < z.before_maps:
        if z.m > 0:
            _grad_of_B(products, prompt, grad_output, A, B, W_k, grad_B, b_beta, i_tile, o_d, c, rho, sigma, z)
    elif i_tile < z.before_prompt:
        if z.a > 0:
            _grads_of_maps(products, prompt, A, B, grad_W_q, grad_W_k, b_beta, o_d, c, rho, sigma, z)
    elif i_tile < z.before_gate:
        i_s = i_tile - z.before_prompt
        o_s = i_s * BLOCK_S + tl.arange(0, BLOCK_S)
        # What comes later adds to what came before: a part of its own, held throughout, would overflow the registers.
        b_grad = rho * load_tile(grad_output, o_s, o_d, z.s, z.d)
        b_hat = tl.zeros([BLOCK_S, BLOCK_D], tl.float32)  # ∂P̂
        b_along = tl.zeros([BLOCK_S], tl.float32)  # the sum of ∂P̂·P̂ over d
        if z.columns > 0:
            b_hat, b_along = spaces_to_p(products, D, G, o_s, inverse_rms_of_p(products, o_s, z), o_d, rho, z)
        if z.fusion:
            b_grad, b_hat, b_along = _fusion_to_p(
                products,
                prompt,
                grad_output,
                A,
                B,
                W_q,
                W_k,
                grad_beta,
                b_grad,
                b_hat,
                b_along,
                b_beta,
                i_s,
                o_s,
                i_d,
                o_d,
                c,
                rho,
                sigma,
                z,
            )
        if z.fusion or z.columns > 0:
            b_n = inverse_rms_of_p(products, o_s, z)
            b_p_hat = load_tile(prompt, o_s, o_d, z.s, z.d) * b_n[:, None]
            b_grad += b_n[:, None] * (b_hat - b_p_hat * (b_along / z.d)[:, None])
        store_tile(grad_prompt, b_grad, o_s, o_d, z.s, z.d)
    elif i_tile < z.before_spaces:
        if z.K > 0:
            grad_of_G(products, prompt, grad_G, o_d, rho, z)
    else:
        if z.columns > 0:
            grads_of_spaces(products, prompt, grad_output, grad_D, grad_U, i_tile - z.before_spaces, o_d, rho, z)
