"""Triton kernels of the prompted input's backward: three launches, no atomics, every sum in a fixed order.

1. `token_at[b, p]`: the token of row b at position p; the forward needs it too, and may pass it on;
2. `R = Σ_b grad[b, token_at[b, ·]]`, one tile per program, in registers; prompt rows are written, position rows are
   multiplied into partial sums of `grad_A = R·Bᵀ` (over column tiles) and `grad_B = Aᵀ·R` (over position tiles);
3. the partial sums are added up and scaled.

Everything is accumulated in float32 and rounded once. Letters and arguments as in `reference.py`.
"""

import triton
import triton.language as tl

from .forward import load


@triton.jit(do_not_specialize=["n", "m"])
def token_at_kernel(
    positions,  # [batch, n], contiguous
    token_at,  # [batch, m] int32, contiguous
    # Shape
    n,
    m,
    # Meta-parameters
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Inverts the positions of one batch row for one tile of positions; −1 if no token has the position.

    By comparison: after filling and scattering, other threads' stores would have to be visible after a barrier on any
    GPU.
    """
    i_program = tl.program_id(0)
    tiles = tl.cdiv(m, BLOCK_M)
    first = (i_program % tiles) * BLOCK_M
    i_b = (i_program // tiles).to(tl.int64)
    o_m = first + tl.arange(0, BLOCK_M)
    b_token = tl.full([BLOCK_M], -1, tl.int32)
    for start in range(0, n, BLOCK_N):
        o_n = start + tl.arange(0, BLOCK_N)
        b_position = tl.load(positions + i_b * n + o_n, mask=o_n < n, other=-1)
        here = (b_position >= first) & (b_position < first + BLOCK_M)
        if tl.max(here.to(tl.int32), axis=0) > 0:
            found = tl.where(b_position[None, :] == o_m[:, None], o_n[None, :], -1)  # [BLOCK_M, BLOCK_N]
            b_token = tl.maximum(b_token, tl.max(found, axis=1))
    tl.store(token_at + i_b * m + o_m, b_token, mask=o_m < m)


@triton.jit(do_not_specialize=["batch"])
def prompted_embedding_backward_kernel(
    grad_output,  # [batch, s + n, d]
    token_at,  # [batch, m], contiguous
    A,  # [m, r] or [adapters, m, r]
    B,  # [r, d] or [adapters, r, d]
    adapter_ids,  # [batch] or None
    grad_prompt,  # [s, d] or [adapters, s, d], contiguous
    partial_A,  # [adapters, column tiles, m, r] float32, contiguous
    partial_B,  # [adapters, position tiles, r, d] float32, contiguous
    # Shape
    batch,
    s,
    d,
    m,
    r,
    # Strides
    stride_grad_b,
    stride_grad_t,
    stride_grad_d,
    # Meta-parameters
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Handles one tile of prompt rows or of positions, one column tile and one adapter; reads its gradients once."""
    i_program = tl.program_id(0)
    columns = tl.cdiv(d, BLOCK_D)
    i_d = i_program % columns
    i_tile = i_program // columns
    i_a = tl.program_id(1).to(tl.int64)
    prompt_tiles = tl.cdiv(s, BLOCK_M)

    of_prompt = i_tile < prompt_tiles
    i_m = tl.where(of_prompt, i_tile, i_tile - prompt_tiles).to(tl.int64)
    size = tl.where(of_prompt, s, m)
    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)  # rows of the prompt, or positions
    o_d = i_d.to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    m_m, m_d = o_m < size, o_d < d
    m_prompt = o_m < tl.where(of_prompt, s, 0)
    b_R = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for b in tl.range(0, batch, num_stages=STAGES):
        i_b = tl.cast(b, tl.int64)
        taken = size  # number of rows in this text
        if adapter_ids is not None:
            taken = tl.where(tl.load(adapter_ids + i_b) == i_a, size, 0)
        b_token = tl.load(token_at + i_b * m + o_m, mask=(o_m < taken) & ~m_prompt, other=-1)
        m_row = (o_m < taken) & (m_prompt | (b_token >= 0))
        o_t = tl.where(m_prompt, o_m, s + b_token.to(tl.int64))
        p_grad = grad_output + i_b * stride_grad_b + o_t[:, None] * stride_grad_t + o_d[None, :] * stride_grad_d
        b_R += tl.load(p_grad, mask=m_row[:, None] & m_d[None, :], other=0.0).to(tl.float32)
    if of_prompt:
        p_prompt = grad_prompt + (i_a * s + o_m)[:, None] * d + o_d[None, :]
        tl.store(p_prompt, b_R.to(grad_prompt.dtype.element_ty), mask=m_m[:, None] & m_d[None, :])
    else:
        p_A = partial_A + ((i_a * columns + i_d) * m + o_m)[:, None] * r
        p_B = partial_B + (i_a * tl.cdiv(m, BLOCK_M) + i_m) * r * d + o_d[None, :]
        # Two loops, and BLOCK_R of the rank at a time: the pieces of operands must fit into registers.
        for start in tl.range(0, r, BLOCK_R, num_stages=1):
            o_r = tl.cast(start, tl.int64) + tl.arange(0, BLOCK_R)
            b_B = load(B + i_a * r * d, o_r, o_d, o_r < r, d)  # [BLOCK_R, BLOCK_D]
            b_grad_A = tl.dot(b_R, tl.trans(b_B), input_precision=PRECISION)  # [BLOCK_M, BLOCK_R]
            tl.store(p_A + o_r[None, :], b_grad_A, mask=m_m[:, None] & (o_r < r)[None, :])
        for start in tl.range(0, r, BLOCK_R, num_stages=1):
            o_r = tl.cast(start, tl.int64) + tl.arange(0, BLOCK_R)
            b_A = load(A + i_a * m * r, o_m, o_r, m_m, r)  # [BLOCK_M, BLOCK_R]
            b_grad_B = tl.dot(tl.trans(b_A), b_R, input_precision=PRECISION)  # [BLOCK_R, BLOCK_D]
            tl.store(p_B + o_r[:, None] * d, b_grad_B, mask=(o_r < r)[:, None] & m_d[None, :])


@triton.jit
def add_up(partial, grad, scale, i_a, i_tile, parts, size, BLOCK_E: tl.constexpr, BLOCK_P: tl.constexpr):
    """Computes `grad[a, e] = scale·Σ_p partial[a, p, e]` for a tile of elements, `BLOCK_P` parts at a time in order."""
    o_e = i_tile.to(tl.int64) * BLOCK_E + tl.arange(0, BLOCK_E)
    m_e = o_e < size
    b_sum = tl.zeros([BLOCK_E], tl.float32)
    for start in range(0, parts, BLOCK_P):
        o_p = start + tl.arange(0, BLOCK_P)
        p_partial = partial + (i_a * parts + o_p)[:, None] * size + o_e[None, :]
        b_sum += tl.sum(tl.load(p_partial, mask=(o_p < parts)[:, None] & m_e[None, :], other=0.0), axis=0)
    tl.store(grad + i_a * size + o_e, (scale * b_sum).to(grad.dtype.element_ty), mask=m_e)


@triton.jit
def prompted_embedding_reduce_kernel(
    partial_A,  # [adapters, parts_A, size_A] float32, contiguous
    partial_B,  # [adapters, parts_B, size_B] float32, contiguous
    grad_A,  # [adapters, size_A], contiguous
    grad_B,  # [adapters, size_B], contiguous
    scale,
    # Shape
    parts_A,
    parts_B,
    size_A,  # m·r
    size_B,  # r·d
    # Meta-parameters
    BLOCK_E: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Adds up the partial sums: the first programs finish `grad_A`, the others `grad_B`."""
    i_tile = tl.program_id(0)
    i_a = tl.program_id(1).to(tl.int64)
    tiles_A = tl.cdiv(size_A, BLOCK_E)
    if i_tile < tiles_A:
        add_up(partial_A, grad_A, scale, i_a, i_tile, parts_A, size_A, BLOCK_E, BLOCK_P)
    else:
        add_up(partial_B, grad_B, scale, i_a, i_tile - tiles_A, parts_B, size_B, BLOCK_E, BLOCK_P)
