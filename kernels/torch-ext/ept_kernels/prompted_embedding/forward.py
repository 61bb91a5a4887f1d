"""Triton kernels of the prompted input `[P; W[id] + scale·A[pos]·B]`, padded and packed: one launch.

A program writes a tile of prompt rows, or a run of token tiles of one column tile: that tile of `B` is loaded once
and serves the whole run. Everything is accumulated in float32 and rounded once. Letters and arguments as in
`reference.py`.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_B(B, o_r, o_d, r, d, stride_B_r, stride_B_d):
    """Loads `B`'s rows `o_r`, columns `o_d` in float32, zero beyond rank r and width d."""
    mask = (o_r < r)[:, None] & (o_d < d)[None, :]
    return tl.load(B + o_r[:, None] * stride_B_r + o_d[None, :] * stride_B_d, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def load_A(A, o_m, o_r, m_m, r, stride_A_m, stride_A_r):
    """Loads `A`'s rows `o_m`, columns `o_r` in float32, zero where `m_m` is false and beyond rank r."""
    mask = m_m[:, None] & (o_r < r)[None, :]
    return tl.load(A + o_m[:, None] * stride_A_m + o_r[None, :] * stride_A_r, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _write_prompt_rows(prompt, out, o_s, o_out, m_s, o_d, d, stride_prompt_s, stride_prompt_d):
    """Copies the prompt's rows `o_s` `[BLOCK_T]`, columns `o_d`, to rows `o_out` of the output."""
    mask = m_s[:, None] & (o_d < d)[None, :]
    b_P = tl.load(prompt + o_s[:, None] * stride_prompt_s + o_d[None, :] * stride_prompt_d, mask=mask, other=0.0)
    tl.store(out + o_out[:, None] * d + o_d[None, :], b_P.to(tl.float32).to(out.dtype.element_ty), mask=mask)


@triton.jit
def _write_token_rows(
    table,
    A,
    b_B,  # [RANK, BLOCK_D]
    out,
    scale,
    b_id,  # [BLOCK_T] rows of the table
    b_position,  # [BLOCK_T] rows of A
    m_update,  # [BLOCK_T] which of them count
    o_out,  # [BLOCK_T] rows of the output
    m_t,
    o_d,  # [BLOCK_D]
    d,
    r,
    stride_table_v,
    stride_table_d,
    stride_A_m,
    stride_A_r,
    RANK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Writes `W[id] + scale·A[pos]·B` to one tile of the output."""
    mask = m_t[:, None] & (o_d < d)[None, :]
    p_W = table + b_id.to(tl.int64)[:, None] * stride_table_v + o_d[None, :] * stride_table_d
    b_E = tl.load(p_W, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_T, BLOCK_D]
    if RANK > 0:
        o_r = tl.arange(0, RANK).to(tl.int64)
        b_A = load_A(A, b_position.to(tl.int64), o_r, m_update, r, stride_A_m, stride_A_r)  # [BLOCK_T, RANK]
        b_E += scale * tl.dot(b_A, b_B, input_precision=PRECISION)
    tl.store(out + o_out[:, None] * d + o_d[None, :], b_E.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["n", "groups", "tiles", "stride_ids_b", "stride_positions_b"])
def prompted_embedding_kernel(
    input_ids,  # [batch, n]
    positions,  # [batch, n]
    table,  # [vocabulary, d]
    prompt,  # [s, d] or [adapters, s, d]
    A,  # [m, r] or [adapters, m, r]
    B,  # [r, d] or [adapters, r, d]
    adapter_ids,  # [batch] or None
    out,  # [batch, s + n, d], contiguous
    scale,
    # Shape
    n,
    s,
    d,
    m,
    r,
    adapters,
    groups,  # programs that share one text: its prompt's row tiles, then runs of token tiles
    tiles,  # token tiles in a run
    # Strides
    stride_ids_b,
    stride_ids_n,
    stride_positions_b,
    stride_positions_n,
    stride_table_v,
    stride_table_d,
    stride_prompt_a,
    stride_prompt_s,
    stride_prompt_d,
    stride_A_a,
    stride_A_m,
    stride_A_r,
    stride_B_a,
    stride_B_r,
    stride_B_d,
    stride_adapter,
    # Meta-parameters
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
    RANK: tl.constexpr,  # r padded to a power of two from 16 up; 0: no update
    PRECISION: tl.constexpr,
):
    """Writes one tile of prompt rows, or a run of token tiles, of a batch row. Neighbours take neighbouring columns."""
    i_program = tl.program_id(0)
    columns = tl.cdiv(d, BLOCK_D)
    i_d = i_program % columns
    i_group = (i_program // columns) % groups
    i_b = (i_program // columns // groups).to(tl.int64)
    prompt_tiles = tl.cdiv(s, BLOCK_T)

    updated = m  # rows of A that count
    if adapter_ids is not None:
        i_a = tl.load(adapter_ids + i_b * stride_adapter).to(tl.int64)
        updated = tl.where(i_a >= 0, m, 0)
        i_a = tl.where(i_a >= 0, i_a, i_a + adapters)  # a negative one counts from the end, as indexing does
        prompt += i_a * stride_prompt_a
        A += i_a * stride_A_a
        B += i_a * stride_B_a

    o_d = i_d.to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    out += i_b * (s + n) * d
    if i_group < prompt_tiles:
        o_s = i_group.to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
        _write_prompt_rows(prompt, out, o_s, o_s, o_s < s, o_d, d, stride_prompt_s, stride_prompt_d)
    else:
        b_B = None
        if RANK > 0:
            o_r = tl.arange(0, RANK).to(tl.int64)
            b_B = load_B(B, o_r, o_d, r, d, stride_B_r, stride_B_d)  # [RANK, BLOCK_D]
        first = (i_group - prompt_tiles) * tiles * BLOCK_T
        last = tl.minimum(first + tiles * BLOCK_T, n)
        for start in tl.range(first, last, BLOCK_T, num_stages=STAGES):
            o_n = tl.cast(start, tl.int64) + tl.arange(0, BLOCK_T)
            m_n = o_n < n
            b_id = tl.load(input_ids + i_b * stride_ids_b + o_n * stride_ids_n, mask=m_n, other=0)
            b_position = tl.load(positions + i_b * stride_positions_b + o_n * stride_positions_n, mask=m_n, other=-1)
            _write_token_rows(
                table,
                A,
                b_B,
                out,
                scale,
                b_id,
                b_position,
                (b_position >= 0) & (b_position < updated),
                s + o_n,
                m_n,
                o_d,
                d,
                r,
                stride_table_v,
                stride_table_d,
                stride_A_m,
                stride_A_r,
                RANK,
                PRECISION,
            )


@triton.jit
def _text_of(cu_seqlens, o_n, m_n, texts, steps, stride_cu):
    """Finds the text each token belongs to: the last one that begins at or before it, by bisection in `steps` steps.

    Returns `[tokens]` the texts and where they begin, both int64.
    """
    low = tl.zeros_like(o_n).to(tl.int32)
    high = low + (texts - 1)
    for _ in range(steps):
        middle = (low + high + 1) // 2
        begun = tl.load(cu_seqlens + middle.to(tl.int64) * stride_cu, mask=m_n, other=0) <= o_n
        low = tl.where(begun, middle, low)
        high = tl.where(begun, high, middle - 1)
    i_text = low.to(tl.int64)
    return i_text, tl.load(cu_seqlens + i_text * stride_cu, mask=m_n, other=0).to(tl.int64)


@triton.jit(do_not_specialize=["tokens", "texts", "prompt_tiles", "tiles", "steps"])
def prompted_embedding_packed_kernel(
    input_ids,  # [tokens]
    cu_seqlens,  # [texts + 1]
    table,  # [vocabulary, d]
    prompt,  # [s, d]
    A,  # [m, r]
    B,  # [r, d]
    out,  # [tokens + texts·s, d], contiguous
    scale,
    # Shape
    tokens,
    texts,
    s,
    d,
    m,
    r,
    prompt_tiles,  # of all texts' prompt rows together
    tiles,  # token tiles in a run
    steps,  # of the bisection: ceil(log2(texts + 1))
    # Strides
    stride_ids,
    stride_cu,
    stride_table_v,
    stride_table_d,
    stride_prompt_s,
    stride_prompt_d,
    stride_A_m,
    stride_A_r,
    stride_B_r,
    stride_B_d,
    # Meta-parameters
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
    RANK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Does the same over all texts: a tile holds prompt rows of several texts, or tokens of several texts."""
    i_program = tl.program_id(0)
    columns = tl.cdiv(d, BLOCK_D)
    i_d = i_program % columns
    i_group = i_program // columns

    o_d = i_d.to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    if i_group < prompt_tiles:
        o_p = i_group * BLOCK_T + tl.arange(0, BLOCK_T)  # text·s + row of the prompt
        i_text = (o_p // s).to(tl.int64)
        m_p = i_text < texts
        begin = tl.load(cu_seqlens + i_text * stride_cu, mask=m_p, other=0).to(tl.int64)
        _write_prompt_rows(
            prompt, out, (o_p % s).to(tl.int64), begin + o_p, m_p, o_d, d, stride_prompt_s, stride_prompt_d
        )
    else:
        b_B = None
        if RANK > 0:
            o_r = tl.arange(0, RANK).to(tl.int64)
            b_B = load_B(B, o_r, o_d, r, d, stride_B_r, stride_B_d)  # [RANK, BLOCK_D]
        first = (i_group - prompt_tiles) * tiles * BLOCK_T
        last = tl.minimum(first + tiles * BLOCK_T, tokens)
        for start in tl.range(first, last, BLOCK_T, num_stages=STAGES):
            o_n = tl.cast(start, tl.int64) + tl.arange(0, BLOCK_T)
            m_n = o_n < tokens
            i_text, begin = _text_of(cu_seqlens, o_n, m_n, texts, steps, stride_cu)
            b_id = tl.load(input_ids + o_n * stride_ids, mask=m_n, other=0)
            _write_token_rows(
                table,
                A,
                b_B,
                out,
                scale,
                b_id,
                o_n - begin,
                m_n & (o_n - begin < m),
                o_n + (i_text + 1) * s,
                m_n,
                o_d,
                d,
                r,
                stride_table_v,
                stride_table_d,
                stride_A_m,
                stride_A_r,
                RANK,
                PRECISION,
            )
