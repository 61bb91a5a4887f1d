"""The gated spaces' part of the joint prompt's gradients: of those of `p`, `D`, `U` and `G`, a tile each.

Helpers of the backward kernel; letters as in `backward.py`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .products import inner, inverse_rms_of_p, load_tile, store_tile
from .rows import COLUMNS, activate, before_activation, gates, gates_of_columns, slope, spaces_of_columns


@triton.jit
def _columns(products, o_s, b_n, b_gates, o_c, rho, z: tl.constexpr):
    """Computes, on the spaces' columns `o_c`, `P̂·D`, `φ(P̂·D) ⊙ gate`, `∂(P̂·D)`, and `∂gate` as far as a column goes."""
    b_before = before_activation(products, o_s, b_n, o_c, z)
    b_hidden = activate(b_before, z)
    b_gU = rho * inner(products, o_s, o_c, z.s, z.columns, z.s, z.column_U, z)  # ∂P·Uᵀ
    b_gated, b_g = b_hidden, b_gU * slope(b_before, z)
    if z.K > 0:
        b_gate = gates_of_columns(b_gates, o_c, z)
        b_gated *= b_gate
        b_g *= b_gate
    return b_before, b_gated, b_g, b_gU * b_hidden


@triton.jit
def spaces_to_p(products, D, G, o_s, b_n, o_d, rho, z: tl.constexpr):
    """Computes the spaces' part of `∂P̂`, and of the sum of `∂P̂·P̂` over d."""
    BLOCK_S: tl.constexpr = z.BLOCK_S
    BLOCK_D: tl.constexpr = z.BLOCK_D
    GATES: tl.constexpr = z.GATES
    b_hat = tl.zeros([BLOCK_S, BLOCK_D], tl.float32)
    b_along = tl.zeros([BLOCK_S], tl.float32)
    b_grad_gates = tl.zeros([BLOCK_S, GATES], tl.float32)
    b_gates = None
    if z.K > 0:
        b_gates, b_pG = gates(products, o_s, b_n, z)
    for start in tl.range(0, z.columns, COLUMNS, disable_licm=True):
        o_c = start + tl.arange(0, COLUMNS)
        b_before, _b_gated, b_g, b_grad_gate = _columns(products, o_s, b_n, b_gates, o_c, rho, z)
        b_D = load_tile(D, o_d, o_c, z.d, z.columns)  # [BLOCK_D, COLUMNS]
        b_hat += tl.dot(b_g, tl.trans(b_D), input_precision=z.PRECISION)
        b_along += tl.sum(b_g * b_before, axis=1)
        if z.K > 0:
            b_grad_gates += tl.dot(b_grad_gate, spaces_of_columns(o_c, z), input_precision=z.PRECISION)
    if z.K > 0:
        b_g = _through_softmax(b_gates, b_grad_gates)
        b_G = load_tile(G, o_d, tl.arange(0, GATES), z.d, z.K)
        b_hat += tl.dot(b_g, tl.trans(b_G), input_precision=z.PRECISION)
        b_along += tl.sum(b_g * b_pG, axis=1)
    return b_hat, b_along


@triton.jit
def _through_softmax(b_w, b_gw):
    """Computes the gradient of what the softmax with result `b_w` was taken of."""
    return b_w * (b_gw - tl.sum(b_w * b_gw, axis=1)[:, None])


@triton.jit
def grads_of_spaces(products, prompt, grad_output, grad_D, grad_U, i_c, o_d, rho, z: tl.constexpr):
    """Writes tiles of `∂D = P̂ᵀ·∂(P̂·D)` and `∂U = (φ(P̂·D) ⊙ gate)ᵀ·∂P`."""
    BLOCK_D: tl.constexpr = z.BLOCK_D
    BLOCK_S: tl.constexpr = z.BLOCK_S
    o_c = i_c * COLUMNS + tl.arange(0, COLUMNS)
    b_grad_D = tl.zeros([BLOCK_D, COLUMNS], tl.float32)
    b_grad_U = tl.zeros([COLUMNS, BLOCK_D], tl.float32)
    for start in tl.range(0, z.s, BLOCK_S, disable_licm=True):
        o_s = start + tl.arange(0, BLOCK_S)
        b_n = inverse_rms_of_p(products, o_s, z)
        b_gates = None
        if z.K > 0:
            b_gates, _b_pG = gates(products, o_s, b_n, z)
        _b_before, b_gated, b_g, _b_grad_gate = _columns(products, o_s, b_n, b_gates, o_c, rho, z)
        b_p_hat = load_tile(prompt, o_s, o_d, z.s, z.d) * b_n[:, None]
        b_gP = rho * load_tile(grad_output, o_s, o_d, z.s, z.d)
        b_grad_D += tl.dot(tl.trans(b_p_hat), b_g, input_precision=z.PRECISION)
        b_grad_U += tl.dot(tl.trans(b_gated), b_gP, input_precision=z.PRECISION)
    store_tile(grad_D, b_grad_D, o_d, o_c, z.d, z.columns)
    store_tile(grad_U, b_grad_U, o_c, o_d, z.columns, z.d)


@triton.jit
def grad_of_G(products, prompt, grad_G, o_d, rho, z: tl.constexpr):
    """Writes a tile of `∂G = P̂ᵀ·∂(P̂·G)`."""
    BLOCK_D: tl.constexpr = z.BLOCK_D
    BLOCK_S: tl.constexpr = z.BLOCK_S
    GATES: tl.constexpr = z.GATES
    b_grad = tl.zeros([BLOCK_D, GATES], tl.float32)
    for start_s in tl.range(0, z.s, BLOCK_S, disable_licm=True):
        o_s = start_s + tl.arange(0, BLOCK_S)
        b_n = inverse_rms_of_p(products, o_s, z)
        b_gates, _b_pG = gates(products, o_s, b_n, z)
        b_grad_gates = tl.zeros([BLOCK_S, GATES], tl.float32)
        for start in tl.range(0, z.columns, COLUMNS, disable_licm=True):
            o_c = start + tl.arange(0, COLUMNS)
            _b_before, _b_gated, b_g, b_grad_gate = _columns(products, o_s, b_n, b_gates, o_c, rho, z)
            b_grad_gates += tl.dot(b_grad_gate, spaces_of_columns(o_c, z), input_precision=z.PRECISION)
        b_p_hat = load_tile(prompt, o_s, o_d, z.s, z.d) * b_n[:, None]
        b_g = _through_softmax(b_gates, b_grad_gates)
        b_grad += tl.dot(tl.trans(b_p_hat), b_g, input_precision=z.PRECISION)
    store_tile(grad_G, b_grad, o_d, tl.arange(0, GATES), z.d, z.K)
