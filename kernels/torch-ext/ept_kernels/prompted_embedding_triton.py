"""Triton kernels of the prompted input ``[P; W[id] + scale·A[pos]·B]``, padded and packed, and of its backward.

Forward: one launch. A program writes a tile of prompt rows, or a run of token tiles of one column tile: that tile of
``B`` is loaded once and serves the whole run. Backward: three launches, no atomics, every sum in a fixed order:

1. ``token_at[b, p]``: which token of row b stands at position p (each position occurs at most once in a row);
2. ``R = Σ_b grad[b, token_at[b, ·]]``, one tile in registers a program; prompt rows are written, position rows are
   multiplied into partial sums of ``grad_A = R·Bᵀ`` (over column tiles) and ``grad_B = Aᵀ·R`` (over position tiles);
3. the partial sums are added up and scaled.

Everything is accumulated in float32 and rounded once. Letters and arguments as in ``prompted_embedding.py``.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import AotCase, config_for, launch, on_device

# Meta-parameters by kernel, used where nothing was measured. ITERS: row tiles a program may take, one after another.
CONFIGS: dict[str, dict[str, int]] = {
    "prompted_embedding": {"BLOCK_T": 32, "BLOCK_D": 128, "ITERS": 4, "STAGES": 3, "num_warps": 4, "num_stages": 3},
    "prompted_embedding_packed": {
        "BLOCK_T": 32,
        "BLOCK_D": 128,
        "ITERS": 4,
        "STAGES": 3,
        "num_warps": 4,
        "num_stages": 3,
    },
    "prompted_embedding_token_at": {"BLOCK_M": 64, "BLOCK_N": 128, "num_warps": 4, "num_stages": 1},
    "prompted_embedding_backward": {
        "BLOCK_M": 64,
        "BLOCK_D": 64,
        "BLOCK_R": 16,
        "STAGES": 4,
        "num_warps": 4,
        "num_stages": 3,
    },
    "prompted_embedding_reduce": {"BLOCK_E": 256, "BLOCK_P": 16, "num_warps": 4, "num_stages": 2},
}

# Up to this width the backward takes smaller tiles: otherwise there are too few of them to fill a GPU.
NARROW = 1024


# Shared by the two forward kernels.


@triton.jit
def _load_B(B, o_r, o_d, r, d, stride_B_r, stride_B_d):
    """``B``'s rows ``o_r``, columns ``o_d`` in float32, zero beyond rank r and width d."""
    mask = (o_r < r)[:, None] & (o_d < d)[None, :]
    return tl.load(B + o_r[:, None] * stride_B_r + o_d[None, :] * stride_B_d, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _load_A(A, o_m, o_r, m_m, r, stride_A_m, stride_A_r):
    """``A``'s rows ``o_m``, columns ``o_r`` in float32, zero where ``m_m`` is false and beyond rank r."""
    mask = m_m[:, None] & (o_r < r)[None, :]
    return tl.load(A + o_m[:, None] * stride_A_m + o_r[None, :] * stride_A_r, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _write_prompt_rows(prompt, out, o_s, o_out, m_s, o_d, d, stride_prompt_s, stride_prompt_d):
    """Copies the prompt's rows ``o_s`` ``[BLOCK_T]``, columns ``o_d``, to rows ``o_out`` of the output."""
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
    """Writes ``W[id] + scale·A[pos]·B`` to one tile of the output."""
    mask = m_t[:, None] & (o_d < d)[None, :]
    p_W = table + b_id.to(tl.int64)[:, None] * stride_table_v + o_d[None, :] * stride_table_d
    b_E = tl.load(p_W, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_T, BLOCK_D]
    if RANK > 0:
        o_r = tl.arange(0, RANK).to(tl.int64)
        b_A = _load_A(A, b_position.to(tl.int64), o_r, m_update, r, stride_A_m, stride_A_r)  # [BLOCK_T, RANK]
        b_E += scale * tl.dot(b_A, b_B, input_precision=PRECISION)
    tl.store(out + o_out[:, None] * d + o_d[None, :], b_E.to(out.dtype.element_ty), mask=mask)


# Forward.


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
    """One tile of prompt rows, or a run of token tiles, of one batch row. Neighbours take neighbouring columns."""
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
            b_B = _load_B(B, o_r, o_d, r, d, stride_B_r, stride_B_d)  # [RANK, BLOCK_D]
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
    """The text each token belongs to: the last one that begins at or before it, by bisection in ``steps`` steps.

    Returns ``[tokens]`` the texts and where they begin, both int64.
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
    """The same over all texts: a tile holds prompt rows of several texts, or tokens of several texts."""
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
            b_B = _load_B(B, o_r, o_d, r, d, stride_B_r, stride_B_d)  # [RANK, BLOCK_D]
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


# Backward.


@triton.jit(do_not_specialize=["n", "stride_positions_b"])
def prompted_embedding_token_at_kernel(
    positions,  # [batch, n]
    token_at,  # [batch, m] int32, contiguous
    # Shape
    n,
    m,
    # Strides
    stride_positions_b,
    stride_positions_n,
    # Meta-parameters
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Inverts the positions of one batch row for one tile of them; −1 where no token has the position.

    By comparison: filling and then scattering would need stores of other threads to be visible after a barrier, which
    not every GPU promises. Token tiles without a position of this tile are passed over.
    """
    i_program = tl.program_id(0)
    tiles = tl.cdiv(m, BLOCK_M)
    first = (i_program % tiles) * BLOCK_M
    i_b = (i_program // tiles).to(tl.int64)
    o_m = first + tl.arange(0, BLOCK_M)
    b_token = tl.full([BLOCK_M], -1, tl.int32)
    for start in range(0, n, BLOCK_N):
        o_n = start + tl.arange(0, BLOCK_N)
        p_positions = positions + i_b * stride_positions_b + o_n.to(tl.int64) * stride_positions_n
        b_position = tl.load(p_positions, mask=o_n < n, other=-1)
        here = (b_position >= first) & (b_position < first + BLOCK_M)
        if tl.max(here.to(tl.int32), axis=0) > 0:
            found = tl.where(b_position[None, :] == o_m[:, None], o_n[None, :], -1)  # [BLOCK_M, BLOCK_N]
            b_token = tl.maximum(b_token, tl.max(found, axis=1))
    tl.store(token_at + i_b * m + o_m, b_token, mask=o_m < m)


@triton.jit
def _sum_over_batch(
    grad_output,
    token_at,  # [batch, m], or None: the rows are o_m themselves
    adapter_ids,
    i_a,
    o_m,  # [BLOCK_M]
    size,  # how many rows there are: s or m
    o_d,  # [BLOCK_D]
    m_d,
    batch,
    s,
    m,
    stride_grad_b,
    stride_grad_t,
    stride_grad_d,
    stride_adapter,
    STAGES: tl.constexpr,
):
    """Rows ``o_m`` of adapter ``i_a``'s gradients added up over the batch in order: float32 ``[BLOCK_M, BLOCK_D]``."""
    b_R = tl.zeros([o_m.shape[0], o_d.shape[0]], tl.float32)
    for b in tl.range(0, batch, num_stages=STAGES):
        i_b = tl.cast(b, tl.int64)
        taken = size  # rows that this text gives
        if adapter_ids is not None:
            taken = tl.where(tl.load(adapter_ids + i_b * stride_adapter) == i_a, size, 0)
        m_row = o_m < taken
        o_t = o_m
        if token_at is not None:
            b_token = tl.load(token_at + i_b * m + o_m, mask=m_row, other=-1)
            m_row = m_row & (b_token >= 0)
            o_t = s + b_token.to(tl.int64)
        p_grad = grad_output + i_b * stride_grad_b + o_t[:, None] * stride_grad_t + o_d[None, :] * stride_grad_d
        b_R += tl.load(p_grad, mask=m_row[:, None] & m_d[None, :], other=0.0).to(tl.float32)
    return b_R


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
    stride_A_a,
    stride_A_m,
    stride_A_r,
    stride_B_a,
    stride_B_r,
    stride_B_d,
    stride_adapter,
    # Meta-parameters
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One tile of prompt rows or of positions, one column tile, one adapter; reads its part of ``grad_output`` once."""
    i_program = tl.program_id(0)
    columns = tl.cdiv(d, BLOCK_D)
    i_d = i_program % columns
    i_tile = i_program // columns
    i_a = tl.program_id(1).to(tl.int64)
    prompt_tiles = tl.cdiv(s, BLOCK_M)

    o_d = i_d.to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    m_d = o_d < d
    if i_tile < prompt_tiles:
        o_s = i_tile.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
        m_s = o_s < s
        b_R = _sum_over_batch(
            grad_output,
            None,
            adapter_ids,
            i_a,
            o_s,
            s,
            o_d,
            m_d,
            batch,
            s,
            m,
            stride_grad_b,
            stride_grad_t,
            stride_grad_d,
            stride_adapter,
            STAGES,
        )  # [BLOCK_M, BLOCK_D]
        p_prompt = grad_prompt + (i_a * s + o_s)[:, None] * d + o_d[None, :]
        tl.store(p_prompt, b_R.to(grad_prompt.dtype.element_ty), mask=m_s[:, None] & m_d[None, :])
    else:
        i_m = (i_tile - prompt_tiles).to(tl.int64)
        o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
        m_m = o_m < m
        b_R = _sum_over_batch(
            grad_output,
            token_at,
            adapter_ids,
            i_a,
            o_m,
            m,
            o_d,
            m_d,
            batch,
            s,
            m,
            stride_grad_b,
            stride_grad_t,
            stride_grad_d,
            stride_adapter,
            STAGES,
        )  # [BLOCK_M, BLOCK_D]
        p_A = partial_A + ((i_a * columns + i_d) * m + o_m)[:, None] * r
        p_B = partial_B + (i_a * tl.cdiv(m, BLOCK_M) + i_m) * r * d + o_d[None, :]
        # Two loops, and BLOCK_R of the rank at a time: what an operand is split into has to fit into registers.
        for start in tl.range(0, r, BLOCK_R, num_stages=1):
            o_r = tl.cast(start, tl.int64) + tl.arange(0, BLOCK_R)
            b_B = _load_B(B + i_a * stride_B_a, o_r, o_d, r, d, stride_B_r, stride_B_d)  # [BLOCK_R, BLOCK_D]
            b_grad_A = tl.dot(b_R, tl.trans(b_B), input_precision=PRECISION)  # [BLOCK_M, BLOCK_R]
            tl.store(p_A + o_r[None, :], b_grad_A, mask=m_m[:, None] & (o_r < r)[None, :])
        for start in tl.range(0, r, BLOCK_R, num_stages=1):
            o_r = tl.cast(start, tl.int64) + tl.arange(0, BLOCK_R)
            b_A = _load_A(A + i_a * stride_A_a, o_m, o_r, m_m, r, stride_A_m, stride_A_r)  # [BLOCK_M, BLOCK_R]
            b_grad_B = tl.dot(tl.trans(b_A), b_R, input_precision=PRECISION)  # [BLOCK_R, BLOCK_D]
            tl.store(p_B + o_r[:, None] * d, b_grad_B, mask=(o_r < r)[:, None] & m_d[None, :])


@triton.jit
def _reduce(partial, grad, scale, i_a, i_tile, parts, size, BLOCK_E: tl.constexpr, BLOCK_P: tl.constexpr):
    """``grad[a, e] = scale·Σ_p partial[a, p, e]`` for one tile of elements, ``BLOCK_P`` parts at a time, in order."""
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
    """The first programs finish ``grad_A``, the others ``grad_B``."""
    i_tile = tl.program_id(0)
    i_a = tl.program_id(1).to(tl.int64)
    tiles_A = tl.cdiv(size_A, BLOCK_E)
    if i_tile < tiles_A:
        _reduce(partial_A, grad_A, scale, i_a, i_tile, parts_A, size_A, BLOCK_E, BLOCK_P)
    else:
        _reduce(partial_B, grad_B, scale, i_a, i_tile - tiles_A, parts_B, size_B, BLOCK_E, BLOCK_P)


# Launch choices.


def heuristic(kernel: str, d: int, r: int = 0, dtype: torch.dtype = torch.bfloat16) -> dict[str, int]:
    """Meta-parameters of ``kernel`` at width ``d``, rank ``r`` and the table's ``dtype`` where nothing was measured."""
    config = dict(CONFIGS[kernel])
    if kernel == "prompted_embedding_backward":
        if d <= NARROW:
            config.update(BLOCK_M=32, BLOCK_D=32)
    elif "BLOCK_D" in config:
        # B's tile [rank, BLOCK_D] is held throughout; of a float32 table's rows half as many fill a tile.
        config["BLOCK_D"] = max(16, min(config["BLOCK_D"], 4096 // _padded(r)))
        if dtype.itemsize > 2:
            config["BLOCK_T"] = max(16, config["BLOCK_T"] // 2)
    if "BLOCK_D" in config:
        config["BLOCK_D"] = min(config["BLOCK_D"], _padded(d))
    return config


def meta(kernel: str, config: dict[str, Any], r: int = 0, precision: str = "ieee") -> dict[str, Any]:
    """What ``kernel`` is launched or compiled with: ``config``, the padded rank and the precision of the products."""
    chosen = {name: value for name, value in config.items() if name != "ITERS"}
    if kernel in ("prompted_embedding", "prompted_embedding_packed"):
        chosen["RANK"] = _padded(r) if r else 0
    if "BLOCK_D" in config:
        chosen.setdefault("PRECISION", precision)
    return chosen


@functools.lru_cache(maxsize=256)
def _chosen(
    kernel: str, d: int, r: int, dtype: torch.dtype, device: torch.device
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Configuration and meta-parameters of ``kernel``; a tuner clears this cache after it has changed one."""
    config = config_for(kernel, d, device, heuristic(kernel, d, r, dtype))
    return config, meta(kernel, config, r, _precision(dtype, device))


def _padded(size: int) -> int:
    """The power of two from 16 up that holds ``size``: the least a matrix product takes."""
    return max(16, triton.next_power_of_2(size))


def _precision(dtype: torch.dtype, device: torch.device) -> str:
    """Of products whose result is stored in ``dtype``.

    TF32 where the matrix units have it and the result is rounded to 16 bits anyway. Otherwise the operands in pieces of
    bfloat16, which all matrix units take: three products of two pieces, or, exact to float32, six of three. The plain
    float32 product would run on the scalar units of an NVIDIA GPU, and its operands overflow the registers.
    """
    if device.type != "cuda":  # ROCm's device type is cuda, too
        return "ieee"
    if dtype == torch.float32:
        return "bf16x6"
    if torch.version.hip and "gfx942" not in torch.cuda.get_device_properties(device).gcnArchName:
        return "bf16x3"
    return "tf32"


def _runs(tiles: int, longest: int) -> tuple[int, int]:
    """Splits ``tiles`` into runs of at most ``longest``, as even as possible: how many runs, tiles in each."""
    runs = triton.cdiv(tiles, longest)
    return runs, triton.cdiv(tiles, max(runs, 1))


def _adapter_stride(x: Tensor, adapter_ids: Tensor | None) -> int:
    return 0 if adapter_ids is None else x.stride(0)


# Launchers.


def prompted_embedding(
    input_ids: Tensor,
    positions: Tensor,
    table: Tensor,
    prompt: Tensor,
    A: Tensor,
    B: Tensor,
    scale: float,
    adapter_ids: Tensor | None = None,
) -> Tensor:
    """:func:`~ept_kernels.prompted_embedding_reference` in one launch."""
    batch, n = input_ids.shape
    s, d = prompt.shape[-2], table.shape[1]
    m, r = A.shape[-2:]
    out = table.new_empty(batch, s + n, d)
    config, options = _chosen("prompted_embedding", d, r, table.dtype, table.device)
    runs, tiles = _runs(triton.cdiv(n, config["BLOCK_T"]), config["ITERS"])
    groups = triton.cdiv(s, config["BLOCK_T"]) + runs
    grid = (triton.cdiv(d, config["BLOCK_D"]) * groups * batch,)
    with on_device(table):
        launch(
            prompted_embedding_kernel,
            grid,
            input_ids,
            positions,
            table,
            prompt,
            A,
            B,
            adapter_ids,
            out,
            float(scale),
            n,
            s,
            d,
            m,
            r,
            A.shape[0],
            groups,
            tiles,
            *input_ids.stride(),
            *positions.stride(),
            *table.stride(),
            _adapter_stride(prompt, adapter_ids),
            *prompt.stride()[-2:],
            _adapter_stride(A, adapter_ids),
            *A.stride()[-2:],
            _adapter_stride(B, adapter_ids),
            *B.stride()[-2:],
            0 if adapter_ids is None else adapter_ids.stride(0),
            **options,
        )
    return out


def prompted_embedding_packed(
    input_ids: Tensor, cu_seqlens: Tensor, table: Tensor, prompt: Tensor, A: Tensor, B: Tensor, scale: float
) -> Tensor:
    """:func:`~ept_kernels.prompted_embedding_packed_reference` in one launch."""
    texts = cu_seqlens.shape[0] - 1
    s, d = prompt.shape[0], table.shape[1]
    m, r = A.shape
    tokens = input_ids.shape[0]
    out = table.new_empty(tokens + texts * s, d)
    config, options = _chosen("prompted_embedding_packed", d, r, table.dtype, table.device)
    runs, tiles = _runs(triton.cdiv(tokens, config["BLOCK_T"]), config["ITERS"])
    prompt_tiles = triton.cdiv(texts * s, config["BLOCK_T"])
    grid = (triton.cdiv(d, config["BLOCK_D"]) * (prompt_tiles + runs),)
    with on_device(table):
        launch(
            prompted_embedding_packed_kernel,
            grid,
            input_ids,
            cu_seqlens,
            table,
            prompt,
            A,
            B,
            out,
            float(scale),
            tokens,
            texts,
            s,
            d,
            m,
            r,
            prompt_tiles,
            tiles,
            texts.bit_length(),
            *input_ids.stride(),
            *cu_seqlens.stride(),
            *table.stride(),
            *prompt.stride(),
            *A.stride(),
            *B.stride(),
            **options,
        )
    return out


def prompted_embedding_backward(
    grad_output: Tensor, positions: Tensor, A: Tensor, B: Tensor, scale: float, adapter_ids: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`~ept_kernels.prompted_embedding_backward_reference` in three launches, one where there is no update."""
    batch, n = positions.shape
    s, d = grad_output.shape[1] - n, grad_output.shape[2]
    m, r = A.shape[-2:]
    adapters = 1 if adapter_ids is None else A.shape[0]
    device = grad_output.device
    grad_prompt = A.new_empty(*A.shape[:-2], s, d)
    if r == 0 or m == 0 or n == 0:
        r = 0
        grad_A, grad_B = A.new_zeros(A.shape), A.new_zeros(B.shape)
    else:
        grad_A, grad_B = A.new_empty(A.shape), A.new_empty(B.shape)

    config, options = _chosen("prompted_embedding_backward", d, r, A.dtype, device)
    columns = triton.cdiv(d, config["BLOCK_D"])
    prompt_tiles = triton.cdiv(s, config["BLOCK_M"])
    position_tiles = triton.cdiv(m, config["BLOCK_M"]) if r else 0
    token_at = A.new_empty((batch, m) if r else (0, 0), dtype=torch.int32)
    partial_A = A.new_empty((adapters, columns, m, r), dtype=torch.float32)
    partial_B = A.new_empty((adapters, position_tiles, r, d), dtype=torch.float32)
    with on_device(grad_output):
        if r:
            inverse, inverse_options = _chosen("prompted_embedding_token_at", d, r, A.dtype, device)
            launch(
                prompted_embedding_token_at_kernel,
                (triton.cdiv(m, inverse["BLOCK_M"]) * batch,),
                positions,
                token_at,
                n,
                m,
                *positions.stride(),
                **inverse_options,
            )
        launch(
            prompted_embedding_backward_kernel,
            (columns * (prompt_tiles + position_tiles), adapters),
            grad_output,
            token_at,
            A,
            B,
            adapter_ids,
            grad_prompt,
            partial_A,
            partial_B,
            batch,
            s,
            d,
            m,
            r,
            *grad_output.stride(),
            _adapter_stride(A, adapter_ids),
            *A.stride()[-2:],
            _adapter_stride(B, adapter_ids),
            *B.stride()[-2:],
            0 if adapter_ids is None else adapter_ids.stride(0),
            **options,
        )
        if r:
            reduce, reduce_options = _chosen("prompted_embedding_reduce", d, r, A.dtype, device)
            tiles = triton.cdiv(m * r, reduce["BLOCK_E"]) + triton.cdiv(r * d, reduce["BLOCK_E"])
            launch(
                prompted_embedding_reduce_kernel,
                (tiles, adapters),
                partial_A,
                partial_B,
                grad_A,
                grad_B,
                float(scale),
                columns,
                position_tiles,
                m * r,
                r * d,
                **reduce_options,
            )
    return grad_prompt, grad_A, grad_B


# Ahead of time.

# Table's and gradient's type, width d, rank r, mixed adapters.
_AOT_PROBLEMS = (
    ("bf16", 768, 30, False),
    ("bf16", 4096, 60, False),
    ("bf16", 4096, 30, True),
    ("fp16", 4096, 0, False),
    ("fp32", 768, 30, True),
    ("fp32", 4096, 60, False),
)
_ROW_STRIDES = ("d", "stride_table_v", "stride_prompt_s", "stride_grad_b", "stride_grad_t", "stride_B_r")
_UNIT_STRIDES = (
    "stride_ids",
    "stride_ids_n",
    "stride_positions_n",
    "stride_cu",
    "stride_table_d",
    "stride_prompt_d",
    "stride_grad_d",
    "stride_A_r",
    "stride_B_d",
    "stride_adapter",
)


def aot_cases() -> list[AotCase]:
    """Every kernel with representative signatures, for :mod:`ept_kernels.aot`."""
    cases = [
        _case("prompted_embedding_token_at", prompted_embedding_token_at_kernel, "int64", {"positions": "*i64"}),
        _case("prompted_embedding_token_at", prompted_embedding_token_at_kernel, "int32", {"positions": "*i32"}),
        _case("prompted_embedding_reduce", prompted_embedding_reduce_kernel, "fp32", {}),
    ]
    for dtype, d, r, mixed in _AOT_PROBLEMS:
        label = f"{dtype} d={d} r={r}" + (" mixed" if mixed else "")
        types = dict.fromkeys(("table", "out", "grad_output"), f"*{dtype}")
        types |= {"input_ids": "*i64", "positions": "*i64", "adapter_ids": "*i64" if mixed else "None"}
        cases.append(_case("prompted_embedding", prompted_embedding_kernel, label, types, d, r))
        cases.append(_case("prompted_embedding_backward", prompted_embedding_backward_kernel, label, types, d, r))
        if not mixed:
            cases.append(_case("prompted_embedding_packed", prompted_embedding_packed_kernel, label, types, d, r))
    return cases


def _case(kernel: str, fn: Any, label: str, types: dict[str, str], d: int = 4096, r: int = 30) -> AotCase:
    """One kernel for contiguous inputs; ``types`` names the pointers that are not float32, and what is ``None``.

    Width and row strides are given as constants: compiled at run time, they are known to be divisible by 16.
    """
    dtype = torch.float32 if types.get("table", "*fp32") == "*fp32" else torch.bfloat16
    precision = "bf16x6" if "table" not in fn.arg_names or dtype == torch.float32 else "tf32"
    options = meta(kernel, heuristic(kernel, d, r, dtype), r, precision)
    warps, stages = options.pop("num_warps"), options.pop("num_stages")
    options |= (
        dict.fromkeys(_UNIT_STRIDES, 1)
        | dict.fromkeys(_ROW_STRIDES, d)
        | {name: None for name, type_ in types.items() if type_ == "None"}
    )
    constants = {name: value for name, value in options.items() if name in fn.arg_names}
    pointers = dict.fromkeys(("prompt", "A", "B", "grad_prompt", "grad_A", "grad_B", "partial_A", "partial_B"), "*fp32")
    pointers |= {"token_at": "*i32", "cu_seqlens": "*i32", "scale": "fp32", **types}
    signature = {name: "constexpr" if name in constants else pointers.get(name, "i32") for name in fn.arg_names}
    return AotCase(f"{kernel} {label}", fn, signature, constants, warps, stages)
