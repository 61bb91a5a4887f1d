"""Triton kernels of the prompted input with the token-dependent update: one launch forward, three backward.

No atomics, every sum in a fixed order, everything accumulated in float32 and rounded once. Letters and arguments as in
`reference.py`.
"""

import triton
import triton.language as tl

from ..prompted_embedding.backward import add_up
from ..prompted_embedding.forward import load, row_of


@triton.jit
def _has_update(positions, o_n, m_n):
    """Returns which of the tokens `o_n` of one text get the update."""
    return tl.load(positions + o_n, mask=m_n, other=-1) >= 0


@triton.jit(do_not_specialize=["n", "s", "vocabulary"])
def prompted_embedding_by_token_kernel(
    input_ids,  # [batch, n], contiguous
    positions,  # [batch, n], contiguous
    table,  # [vocabulary, d]
    prompt,  # [s, d], contiguous
    W_in,  # [d, r], contiguous
    b_in,  # [r], contiguous
    W_out,  # [r, d], contiguous
    b_out,  # [d], contiguous
    out,  # [batch, s + n, d], contiguous
    hidden,  # [batch, n, r] float32, contiguous
    scale,
    # Shape
    n,
    s,
    d,
    r,
    vocabulary,
    stride_table_v,
    stride_table_d,
    # Meta-parameters
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    RANK: tl.constexpr,  # r padded to a power of two, at least 16
    STEP: tl.constexpr,  # of RANK at a time in the second product: the pieces of operands must fit into registers
    PRECISION: tl.constexpr,
):
    """Writes some tokens of one text, or some rows of the prompt before it; an id outside the table gives NaN.

    A token's row is read twice, for the bottleneck and for the sum, the second time from a cache.
    """
    i_program = tl.program_id(0)
    tiles_n, tiles_s = tl.cdiv(n, BLOCK_T), tl.cdiv(s, BLOCK_T)
    i_b = (i_program // (tiles_n + tiles_s)).to(tl.int64)
    i_tile = i_program % (tiles_n + tiles_s)
    out += i_b * (s + n) * d
    if i_tile < tiles_n:
        o_n = i_tile.to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
        m_n = o_n < n
        b_id, is_read = row_of(input_ids + i_b * n, o_n, m_n, vocabulary)
        is_updated = _has_update(positions + i_b * n, o_n, m_n)
        p_W = table + b_id[:, None] * stride_table_v
        o_r = tl.arange(0, RANK).to(tl.int64)
        b_hidden = tl.zeros([BLOCK_T, RANK], tl.float32)
        end = tl.where(tl.max(is_updated.to(tl.int32), axis=0) > 0, d, 0)  # nothing for a tile of padding
        for start in range(0, end, BLOCK_D):
            o_d = tl.cast(start, tl.int64) + tl.arange(0, BLOCK_D)
            mask = (is_read & is_updated)[:, None] & (o_d < d)[None, :]
            b_W = tl.load(p_W + o_d[None, :] * stride_table_d, mask=mask, other=0.0).to(tl.float32)
            b_hidden += tl.dot(b_W, load(W_in, o_d, o_r, o_d < d, r), input_precision=PRECISION)
        b_hidden = b_hidden / scale + tl.load(b_in + o_r, mask=o_r < r, other=0.0).to(tl.float32)[None, :]
        # Not `maximum`, which would turn NaN into 0.
        b_hidden = tl.where(is_updated[:, None] & ~(b_hidden <= 0), b_hidden, 0.0)
        p_hidden = hidden + (i_b * n + o_n)[:, None] * r + o_r[None, :]
        tl.store(p_hidden, b_hidden, mask=m_n[:, None] & (o_r < r)[None, :])
        b_steps = tl.reshape(b_hidden, [BLOCK_T, RANK // STEP, STEP])
        o_step = tl.arange(0, RANK // STEP)[None, :, None]
        for start in range(0, d, BLOCK_D):
            o_d = tl.cast(start, tl.int64) + tl.arange(0, BLOCK_D)
            m_d = o_d < d
            mask = is_read[:, None] & m_d[None, :]
            b_W = tl.load(p_W + o_d[None, :] * stride_table_d, mask=mask, other=float("nan")).to(tl.float32)
            b_C = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
            b_C += tl.load(b_out + o_d, mask=m_d, other=0.0).to(tl.float32)[None, :]
            for step in tl.static_range(RANK // STEP):
                b_part = b_hidden
                if RANK > STEP:
                    b_part = tl.sum(tl.where(o_step == step, b_steps, 0.0), axis=1)
                o_part = (step * STEP + tl.arange(0, STEP)).to(tl.int64)
                b_C += tl.dot(b_part, load(W_out, o_part, o_d, o_part < r, d), input_precision=PRECISION)
            b_W = tl.where(is_updated[:, None], b_W + scale * b_C, b_W)
            p_out = out + (s + o_n)[:, None] * d + o_d[None, :]
            tl.store(p_out, b_W.to(out.dtype.element_ty), mask=m_n[:, None] & m_d[None, :])
    else:
        o_s = (i_tile - tiles_n).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
        for start in range(0, d, BLOCK_D):
            o_d = tl.cast(start, tl.int64) + tl.arange(0, BLOCK_D)
            b_P = load(prompt, o_s, o_d, o_s < s, d)
            p_out = out + o_s[:, None] * d + o_d[None, :]
            tl.store(p_out, b_P.to(out.dtype.element_ty), mask=(o_s < s)[:, None] & (o_d < d)[None, :])


@triton.jit(do_not_specialize=["n", "s"])
def prompted_embedding_by_token_before_kernel(
    grad_output,  # [batch, s + n, d]
    positions,  # [batch, n], contiguous
    W_out,  # [r, d], contiguous
    hidden,  # [batch, n, r] float32, contiguous
    before,  # [batch, n, r] float32, contiguous
    scale,
    # Shape
    n,
    s,
    d,
    r,
    # Strides
    stride_grad_b,
    stride_grad_t,
    stride_grad_d,
    # Meta-parameters
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    RANK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Propagates the gradients of some tokens of one text back through `W_out` and the activation."""
    i_program = tl.program_id(0)
    tiles_n = tl.cdiv(n, BLOCK_T)
    i_b = (i_program // tiles_n).to(tl.int64)
    o_n = (i_program % tiles_n).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    m_n = o_n < n
    is_updated = _has_update(positions + i_b * n, o_n, m_n)
    p_grad = grad_output + i_b * stride_grad_b + (s + o_n)[:, None] * stride_grad_t
    o_r = tl.arange(0, RANK).to(tl.int64)
    b_before = tl.zeros([BLOCK_T, RANK], tl.float32)
    end = tl.where(tl.max(is_updated.to(tl.int32), axis=0) > 0, d, 0)
    for start in range(0, end, BLOCK_D):
        o_d = tl.cast(start, tl.int64) + tl.arange(0, BLOCK_D)
        mask = is_updated[:, None] & (o_d < d)[None, :]
        b_grad = tl.load(p_grad + o_d[None, :] * stride_grad_d, mask=mask, other=0.0).to(tl.float32)
        b_W = load(W_out, o_r, o_d, o_r < r, d)  # [RANK, BLOCK_D]
        b_before += tl.dot(b_grad, tl.trans(b_W), input_precision=PRECISION)
    o_hidden = (i_b * n + o_n)[:, None] * r + o_r[None, :]
    m_hidden = m_n[:, None] & (o_r < r)[None, :]
    b_hidden = tl.load(hidden + o_hidden, mask=m_hidden, other=0.0)
    tl.store(before + o_hidden, tl.where(b_hidden > 0, scale * b_before, 0.0), mask=m_hidden)


@triton.jit(do_not_specialize=["batch", "n", "s", "r", "vocabulary", "tiles", "parts"])
def prompted_embedding_by_token_backward_kernel(
    grad_output,  # [batch, s + n, d]
    input_ids,  # [batch, n], contiguous
    positions,  # [batch, n], contiguous
    table,  # [vocabulary, d]
    hidden,  # [batch, n, r] float32, contiguous
    before,  # [batch, n, r] float32, contiguous
    grad_prompt,  # [s, d], contiguous
    partial_W_in,  # [parts, d, r] float32, contiguous
    partial_b_in,  # [parts, r] float32, contiguous
    partial_W_out,  # [parts, r, d] float32, contiguous
    partial_b_out,  # [parts, d] float32, contiguous
    # Shape
    batch,
    n,
    s,
    d,
    r,
    vocabulary,
    tiles,  # of tokens per program
    parts,  # programs that share a column tile
    # Strides
    stride_grad_b,
    stride_grad_t,
    stride_grad_d,
    stride_table_v,
    stride_table_d,
    # Meta-parameters
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    RANK: tl.constexpr,  # rows of W_out, and columns of W_in, per program
    PRECISION: tl.constexpr,
):
    """Handles one column tile of the gradients of a run of tokens, across texts, or of some rows of the prompt.

    A rank that does not fit into registers is divided among programs.
    """
    i_program = tl.program_id(0)
    columns, ranks = tl.cdiv(d, BLOCK_D), tl.cdiv(tl.maximum(r, 1), RANK)  # b_out is summed even at rank 0
    i_d = i_program % columns
    i_tile = i_program // columns
    o_d = i_d.to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    m_d = o_d < d
    if i_tile < parts * ranks:
        i_part, i_r = i_tile % parts, i_tile // parts
        o_r = i_r.to(tl.int64) * RANK + tl.arange(0, RANK)
        tiles_n = tl.cdiv(n, BLOCK_T)
        b_W_in = tl.zeros([RANK, BLOCK_D], tl.float32)
        b_W_out = tl.zeros([RANK, BLOCK_D], tl.float32)
        b_b_in = tl.zeros([RANK], tl.float32)
        b_b_out = tl.zeros([BLOCK_D], tl.float32)
        for i in range(i_part * tiles, tl.minimum((i_part + 1) * tiles, batch * tiles_n)):
            i_b = tl.cast(i // tiles_n, tl.int64)
            o_n = tl.cast(i % tiles_n, tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
            m_n = o_n < n
            is_updated = _has_update(positions + i_b * n, o_n, m_n)
            # Masked instead of a branch, which would keep the loads out of the software pipeline.
            b_id, is_read = row_of(input_ids + i_b * n, o_n, is_updated, vocabulary)
            p_W = table + b_id[:, None] * stride_table_v + o_d[None, :] * stride_table_d
            b_W = tl.load(p_W, mask=is_read[:, None] & m_d[None, :], other=0.0).to(tl.float32)
            p_grad = grad_output + i_b * stride_grad_b + (s + o_n)[:, None] * stride_grad_t
            p_grad += o_d[None, :] * stride_grad_d
            b_grad = tl.load(p_grad, mask=is_updated[:, None] & m_d[None, :], other=0.0).to(tl.float32)
            b_before = load(before + i_b * n * r, o_n, o_r, is_updated, r)  # [BLOCK_T, RANK]
            b_W_in += tl.dot(tl.trans(b_before), b_W, input_precision=PRECISION)
            b_hidden = load(hidden + i_b * n * r, o_n, o_r, is_updated, r)
            b_W_out += tl.dot(tl.trans(b_hidden), b_grad, input_precision=PRECISION)
            b_b_in += tl.sum(b_before, axis=0)
            b_b_out += tl.sum(b_grad, axis=0)
        m_W = (o_r < r)[:, None] & m_d[None, :]
        part = tl.cast(i_part, tl.int64)
        tl.store(partial_W_in + part * r * d + o_d[None, :] * r + o_r[:, None], b_W_in, mask=m_W)
        tl.store(partial_W_out + part * r * d + o_r[:, None] * d + o_d[None, :], b_W_out, mask=m_W)
        tl.store(partial_b_out + part * d + o_d, b_b_out, mask=m_d & (i_r == 0))
        tl.store(partial_b_in + part * r + o_r, b_b_in, mask=(o_r < r) & (i_d == 0))
    else:
        o_s = (i_tile - parts * ranks).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
        mask = (o_s < s)[:, None] & m_d[None, :]
        p_grad = grad_output + o_s[:, None] * stride_grad_t + o_d[None, :] * stride_grad_d
        b_P = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
        for b in range(batch):
            b_P += tl.load(p_grad + tl.cast(b, tl.int64) * stride_grad_b, mask=mask, other=0.0).to(tl.float32)
        tl.store(grad_prompt + o_s[:, None] * d + o_d[None, :], b_P.to(grad_prompt.dtype.element_ty), mask=mask)


@triton.jit
def prompted_embedding_by_token_reduce_kernel(
    partial_W_in,  # [parts, d, r] float32, contiguous
    partial_b_in,  # [parts, r]
    partial_W_out,  # [parts, r, d]
    partial_b_out,  # [parts, d]
    grad_W_in,  # [d, r], contiguous
    grad_b_in,  # [r]
    grad_W_out,  # [r, d]
    grad_b_out,  # [d]
    scale,
    # Shape
    parts,
    d,
    r,
    # Meta-parameters
    BLOCK_E: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Adds up the partial sums: programs finish `grad_W_in`, then `grad_W_out`, `grad_b_out` and `grad_b_in`."""
    i_tile = tl.program_id(0)
    none = tl.cast(0, tl.int64)
    tiles_W, tiles_b = tl.cdiv(d * r, BLOCK_E), tl.cdiv(d, BLOCK_E)
    if i_tile < tiles_W:
        add_up(partial_W_in, grad_W_in, 1 / scale, none, i_tile, parts, d * r, BLOCK_E, BLOCK_P)
    elif i_tile < 2 * tiles_W:
        add_up(partial_W_out, grad_W_out, scale, none, i_tile - tiles_W, parts, d * r, BLOCK_E, BLOCK_P)
    elif i_tile < 2 * tiles_W + tiles_b:
        add_up(partial_b_out, grad_b_out, scale, none, i_tile - 2 * tiles_W, parts, d, BLOCK_E, BLOCK_P)
    else:
        add_up(partial_b_in, grad_b_in, 1.0, none, i_tile - 2 * tiles_W - tiles_b, parts, r, BLOCK_E, BLOCK_P)
