"""Triton kernel of the prompted input `[P; W[id] + scale·A[pos]·B]`, padded and packed: one launch.

Everything is accumulated in float32 and rounded once. Letters and arguments as in `reference.py`.
"""

import triton
import triton.language as tl


@triton.jit
def load(x, o_i, o_j, m_i, width):
    """Loads rows `o_i`, columns `o_j` of contiguous `x` in float32, zero if `m_i` is false and beyond its width."""
    mask = m_i[:, None] & (o_j < width)[None, :]
    return tl.load(x + o_i[:, None] * width + o_j[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _tokens_of(cu_seqlens, i_b, is_there, n, PACKED: tl.constexpr):
    """Returns the range of text `i_b`'s tokens: packed, among those of all texts; otherwise from 0 to n."""
    if PACKED:
        begin = tl.load(cu_seqlens + i_b, mask=is_there, other=0).to(tl.int64)
        end = tl.load(cu_seqlens + i_b + 1, mask=is_there, other=0).to(tl.int64)
    else:
        begin, end = 0, n
    return begin, end


@triton.jit
def row_of(input_ids, o_n, m_n, vocabulary):
    """Loads the table rows of the tokens `o_n` of one text, and which of them may be read."""
    b_id = tl.load(input_ids + o_n, mask=m_n, other=0).to(tl.int64)
    return b_id, m_n & (b_id >= 0) & (b_id < vocabulary)


@triton.jit
def _look_up(input_ids, token_at, i_b, is_there, o_m, n, m, vocabulary, PACKED: tl.constexpr):
    """Finds the tokens of text `i_b` at positions `o_m`, -1 if there is none, and their table rows."""
    if PACKED:
        begin, end = _tokens_of(token_at, i_b, is_there, n, PACKED)
        o_n = tl.where((o_m < m) & (o_m < end - begin), begin + o_m, -1)
    else:
        o_n = tl.load(token_at + i_b * m + o_m, mask=(o_m < m) & is_there, other=-1).to(tl.int64)
    b_id, is_read = row_of(input_ids + i_b * n, o_n, o_n >= 0, vocabulary)
    return o_n, b_id, is_read


@triton.jit(do_not_specialize=["batch", "n", "s", "m", "r", "rows", "runs", "vocabulary", "adapters"])
def prompted_embedding_kernel(
    input_ids,  # [batch, n], contiguous; packed: [tokens]
    positions,  # [batch, n], contiguous; packed: None
    token_at,  # [batch, m] int32, contiguous; packed: cu_seqlens [batch + 1]
    table,  # [vocabulary, d]
    prompt,  # [s, d] or [adapters, s, d], contiguous
    A,  # [m, r] or [adapters, m, r], contiguous
    B,  # [r, d] or [adapters, r, d], contiguous
    adapter_ids,  # [batch] or None, contiguous
    out,  # [batch, s + n, d], contiguous; packed: [batch·s + tokens, d]
    scale,
    # Shape
    batch,  # texts
    n,  # packed: tokens of the average text, rounded up
    s,
    d,
    m,  # 0 without an update
    r,
    rows,  # texts that a program writes, one after another; 1 with adapters
    runs,  # number of such runs of texts
    vocabulary,
    adapters,
    stride_table_v,
    stride_table_d,
    # Meta-parameters
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PACKED: tl.constexpr,
    RANK: tl.constexpr,  # r padded to a power of two, at least 16; 0: no update
    PRECISION: tl.constexpr,
):
    """Writes one column tile of some positions, or of some rows of the prompt, in a run of texts; or some tokens.

    The first programs own positions: a tile of `C = scale·A·B` is computed once and added to the tokens at these
    positions, text by text. The next ones own rows of the prompt. The last ones search for tokens without an update,
    and write all of their columns. An id outside the table, a position outside A and a nonexistent adapter read
    nothing and give NaN.
    """
    i_program = tl.program_id(0)
    columns = tl.cdiv(d, BLOCK_D)
    tiles_m, tiles_s, tiles_n = tl.cdiv(m, BLOCK_T), tl.cdiv(s, BLOCK_T), tl.cdiv(n, BLOCK_T)
    usual = n
    if PACKED:
        n = 0  # from here on, because tokens are counted through all texts
    owned = (tiles_m + tiles_s) * runs * columns
    width = tl.cast(s + n, tl.int64) * d  # from a text's rows to the next text's; packed: plus its tokens
    if i_program < owned:
        o_d = (i_program % columns).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
        m_d = (o_d < d)[None, :]
        i_tile = (i_program // columns) % (tiles_m + tiles_s)
        first = i_program // columns // (tiles_m + tiles_s) * rows
        last = tl.minimum(first + rows, batch)
        updated, rank = m, r  # number of rows of A, and of B, in use
        is_known = True
        if adapter_ids is not None:
            i_a = tl.load(adapter_ids + first).to(tl.int64)
            is_known = (i_a >= -adapters) & (i_a < adapters)
            updated = tl.where((i_a >= 0) & is_known, m, 0)
            rank = tl.where(updated > 0, r, 0)
            i_a = tl.where(i_a >= 0, i_a, i_a + adapters)  # negative ids count from the end, as in indexing
            i_a = tl.where(is_known, i_a, 0)
            prompt += i_a * s * d
            A += i_a * m * r
            B += i_a * r * d
        if i_tile < tiles_m:
            o_m = i_tile * BLOCK_T + tl.arange(0, BLOCK_T)
            # Few or no texts have such positions; if none has, nothing is read or written.
            if i_tile * BLOCK_T >= usual:
                b_last = tl.full([BLOCK_T], -1, tl.int64)
                for i in range(first, last):
                    i_b = tl.cast(i, tl.int64)
                    o_n, _, _ = _look_up(input_ids, token_at, i_b, True, o_m, n, m, vocabulary, PACKED)
                    b_last = tl.maximum(b_last, o_n)
                is_empty = tl.max(b_last, axis=0) < 0
                last, rank = tl.where(is_empty, first, last), tl.where(is_empty, 0, rank)
                updated = tl.where(is_empty, 0, updated)
            b_C = tl.full([BLOCK_T, BLOCK_D], tl.where(is_known, 0.0, float("nan")), tl.float32)
            if RANK > 0:
                # At most 64 of the rank at a time: the pieces of operands must fit into registers.
                STEP: tl.constexpr = RANK if RANK < 64 else 64
                for start in tl.range(0, RANK, STEP, num_stages=1):
                    o_r = (start + tl.arange(0, STEP)).to(tl.int64)
                    b_A = load(A, o_m.to(tl.int64), o_r, o_m < updated, r)  # [BLOCK_T, STEP]
                    b_C += scale * tl.dot(b_A, load(B, o_r, o_d, o_r < rank, d), input_precision=PRECISION)
                # An identity that converts C from the product's layout to the table rows' once, and not in every text.
                b_C = tl.gather(b_C, tl.broadcast_to(tl.arange(0, BLOCK_T)[:, None], [BLOCK_T, BLOCK_D]), 0)
            i_b = first.to(tl.int64)
            o_n, b_id, is_read = _look_up(input_ids, token_at, i_b, first < last, o_m, n, m, vocabulary, PACKED)
            for i in range(first, last):
                p_W = table + b_id[:, None] * stride_table_v + o_d[None, :] * stride_table_d
                b_W = tl.load(p_W, mask=is_read[:, None] & m_d, other=float("nan")).to(tl.float32)
                if PACKED:  # one row number, because an A100 has too few registers for two
                    p_out = out + (tl.cast(i, tl.int64) * s + s + o_n)[:, None] * d + o_d[None, :]
                else:
                    p_out = out + tl.cast(i, tl.int64) * width + (s + o_n)[:, None] * d + o_d[None, :]
                b_sum = b_W + b_C
                if adapter_ids is not None:  # −0.0 + 0.0 would be 0.0
                    b_sum = tl.where(is_known & (updated == 0), b_W, b_sum)
                m_out = (o_n >= 0)[:, None] & m_d
                # The next text's look-up, two dependent loads, runs while this text's embeddings are being loaded.
                i_b = tl.cast(i + 1, tl.int64)
                o_n, b_id, is_read = _look_up(input_ids, token_at, i_b, i_b < last, o_m, n, m, vocabulary, PACKED)
                tl.store(p_out, b_sum.to(out.dtype.element_ty), mask=m_out)
        else:
            o_s = ((i_tile - tiles_m) * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
            mask = (o_s < s)[:, None] & m_d
            b_P = tl.load(prompt + o_s[:, None] * d + o_d[None, :], mask=mask & is_known, other=float("nan"))
            for i in range(first, last):
                begin, _ = _tokens_of(token_at, i, True, n, PACKED)
                p_out = out + i * width + (begin + o_s)[:, None] * d + o_d[None, :]
                tl.store(p_out, b_P.to(tl.float32).to(out.dtype.element_ty), mask=mask)
    else:
        i_loose = i_program - owned
        i_b = (i_loose // tiles_n).to(tl.int64)
        begin, end = _tokens_of(token_at, i_b, True, n, PACKED)
        start_n = begin + (i_loose % tiles_n).to(tl.int64) * BLOCK_T
        tiles = 1
        if PACKED:  # tokens after a text's first m have no update, and may outnumber the programs
            start_n += m
            tiles = tl.cdiv(end - start_n, tiles_n * BLOCK_T)
        for i_n in range(tiles):
            o_n = start_n + tl.cast(i_n, tl.int64) * tiles_n * BLOCK_T + tl.arange(0, BLOCK_T)
            if PACKED:
                b_position, m_n = o_n - begin, o_n < end
            else:
                b_position = tl.load(positions + i_b * n + o_n, mask=o_n < n, other=0)
                is_owned = (b_position >= 0) & (b_position < m)
                b_owner = tl.load(token_at + i_b * m + b_position, mask=(o_n < n) & is_owned, other=-1)
                m_n = (o_n < n) & (b_owner != o_n)
            if tl.max(m_n.to(tl.int32), axis=0) > 0:
                b_id, is_read = row_of(input_ids + i_b * n, o_n, m_n, vocabulary)
                # Two tokens at one position, which no text has, leave the first without an owner, as does a position
                # beyond A: NaN rather than a wrong result.
                is_read = is_read & ((b_position < 0) | (m == 0))
                for start in range(0, d, BLOCK_D):
                    o_d = tl.cast(start, tl.int64) + tl.arange(0, BLOCK_D)
                    m_d = (o_d < d)[None, :]
                    p_W = table + b_id[:, None] * stride_table_v + o_d[None, :] * stride_table_d
                    b_W = tl.load(p_W, mask=is_read[:, None] & m_d, other=float("nan")).to(tl.float32)
                    p_out = out + i_b * width + (s + o_n)[:, None] * d + o_d[None, :]
                    tl.store(p_out, b_W.to(out.dtype.element_ty), mask=m_n[:, None] & m_d)
