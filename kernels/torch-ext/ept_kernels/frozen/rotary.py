"""Triton kernel of the rotary position embedding, queries and keys in one launch; the backward uses the same kernel.

A program handles one token and a block of heads of either queries or keys. Arguments as in `reference.py`.
"""

import triton
import triton.language as tl


@triton.jit
def _load_pairs(x, m_x, HALF: tl.constexpr, BLOCK_C: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Loads the first and second columns of the pairs in float32, for the rows at `x` selected by `m_x`."""
    if INTERLEAVED:  # neighbours, in one wide load
        o_c = tl.arange(0, 2 * BLOCK_C)[None, :]
        b_x = tl.load(x + o_c, mask=m_x & (o_c < 2 * HALF), other=0.0)
        b_a, b_b = tl.split(tl.reshape(b_x, [b_x.shape[0], BLOCK_C, 2]))
    else:
        o_c = tl.arange(0, BLOCK_C)[None, :]
        b_a = tl.load(x + o_c, mask=m_x & (o_c < HALF), other=0.0)
        b_b = tl.load(x + HALF + o_c, mask=m_x & (o_c < HALF), other=0.0)
    return b_a.to(tl.float32), b_b.to(tl.float32)


@triton.jit
def _rotate(
    x,  # [heads, width] of one token
    out,  # [heads, width], contiguous
    block,
    heads,
    width,
    x_h,
    b_cos,  # for the first and for the second columns of the pairs: [1, BLOCK_C] each
    b_sin,
    HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_REST: tl.constexpr,
):
    """Rotates a block of heads, and copies their unrotated columns."""
    o_h = block * BLOCK_H + tl.arange(0, BLOCK_H)[:, None]
    m_h = o_h < heads
    x, out = x + o_h.to(tl.int64) * x_h, out + o_h * width  # [BLOCK_H, 1]
    b_a, b_b = _load_pairs(x, m_h, HALF, BLOCK_C, INTERLEAVED)
    b_first = (b_a * b_cos[0] - b_b * b_sin[0]).to(out.dtype.element_ty)
    # `fma`, because in a plain sum the compiler fuses one product or the other, depending on the layout.
    if INTERLEAVED:
        b_second = tl.fma(b_a, b_sin[1], b_b * b_cos[1]).to(out.dtype.element_ty)
        o_c = tl.arange(0, 2 * BLOCK_C)[None, :]
        b_out = tl.reshape(tl.join(b_first, b_second), [BLOCK_H, 2 * BLOCK_C])
        tl.store(out + o_c, b_out, mask=m_h & (o_c < 2 * HALF))
    else:  # the second half is computed after the first is stored, which takes fewer registers
        o_c = tl.arange(0, BLOCK_C)[None, :]
        mask = m_h & (o_c < HALF)
        tl.store(out + o_c, b_first, mask=mask)
        b_second = tl.fma(b_a, b_sin[1], b_b * b_cos[1]).to(out.dtype.element_ty)
        tl.store(out + HALF + o_c, b_second, mask=mask)
    if BLOCK_REST:
        o_rest = 2 * HALF + tl.arange(0, BLOCK_REST)[None, :]
        mask = m_h & (o_rest < width)
        tl.store(out + o_rest, tl.load(x + o_rest, mask=mask, other=0.0), mask=mask)


@triton.jit(do_not_specialize=["n", "q_heads", "k_heads"])
def rotary_kernel(
    q,  # [batch, q_heads, n, width], the last stride 1
    k,  # [batch, k_heads, n, width], the last stride 1
    cos,  # [batch or 1, n, 2·HALF], contiguous
    sin,  # the same
    out_q,  # [batch, n, q_heads, width], contiguous
    out_k,  # [batch, n, k_heads, width], contiguous
    # Shape
    n,
    q_heads,
    k_heads,
    width,
    # Strides
    q_b,
    q_h,
    q_n,
    k_b,
    k_h,
    k_n,
    # Meta-parameters
    SHARED: tl.constexpr,  # all texts have the same angles
    INTERLEAVED: tl.constexpr,
    BACKWARD: tl.constexpr,
    HALF: tl.constexpr,  # rotated columns
    BLOCK_H: tl.constexpr,
    BLOCK_C: tl.constexpr,  # at least HALF
    BLOCK_REST: tl.constexpr,  # at least the number of unrotated columns; 0: there are none
):
    token = tl.program_id(0).to(tl.int64)
    b, i = token // n, token % n
    angle = (i if SHARED else token) * 2 * HALF
    m_angle = tl.full([1, 1], True, tl.int1)
    b_cos = _load_pairs(cos + angle, m_angle, HALF, BLOCK_C, INTERLEAVED)
    b_sin = _load_pairs(sin + angle, m_angle, HALF, BLOCK_C, INTERLEAVED)
    if BACKWARD:  # the transposed matrix
        b_sin = (-b_sin[1], -b_sin[0])
    block, q_blocks = tl.program_id(1), tl.cdiv(q_heads, BLOCK_H)
    if block < q_blocks:
        x, out = q + b * q_b + i * q_n, out_q + token * q_heads * width
        _rotate(x, out, block, q_heads, width, q_h, b_cos, b_sin, HALF, INTERLEAVED, BLOCK_H, BLOCK_C, BLOCK_REST)
    else:
        x, out, block = k + b * k_b + i * k_n, out_k + token * k_heads * width, block - q_blocks
        _rotate(x, out, block, k_heads, width, k_h, b_cos, b_sin, HALF, INTERLEAVED, BLOCK_H, BLOCK_C, BLOCK_REST)
