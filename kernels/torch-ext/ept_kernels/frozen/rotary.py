"""Triton kernel of the rotary position embedding, queries and keys in one launch; its backward is the same kernel.

A program takes one token and a block of heads of the queries or of the keys. Arguments as in `reference.py`.
"""

import triton
import triton.language as tl


@triton.jit
def _rotate(
    x,  # [heads, width] of one token
    out,  # [heads, width], contiguous
    block,
    heads,
    width,
    x_h,
    b_cos,  # of the first and of the second columns of the pairs: [1, BLOCK_C] each
    b_sin,
    o_first,
    o_second,
    HALF: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_REST: tl.constexpr,
):
    """Rotates a block of heads, and copies their columns beyond the pairs."""
    o_h = block * BLOCK_H + tl.arange(0, BLOCK_H)[:, None]
    x, out = x + o_h.to(tl.int64) * x_h, out + o_h * width  # [BLOCK_H, 1]
    mask = (o_h < heads) & (tl.arange(0, BLOCK_C)[None, :] < HALF)
    b_a = tl.load(x + o_first, mask=mask, other=0.0).to(tl.float32)
    b_b = tl.load(x + o_second, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + o_first, (b_a * b_cos[0] - b_b * b_sin[0]).to(out.dtype.element_ty), mask=mask)
    tl.store(out + o_second, (b_b * b_cos[1] + b_a * b_sin[1]).to(out.dtype.element_ty), mask=mask)
    if BLOCK_REST:
        o_rest = 2 * HALF + tl.arange(0, BLOCK_REST)[None, :]
        mask = (o_h < heads) & (o_rest < width)
        tl.store(out + o_rest, tl.load(x + o_rest, mask=mask, other=0.0), mask=mask)


@triton.jit
def _angles(values, o_c, o_first, o_second, HALF: tl.constexpr):
    """Loads cosines or sines of the first and of the second columns."""
    b_first = tl.load(values + o_first, mask=o_c < HALF, other=0.0).to(tl.float32)
    b_second = tl.load(values + o_second, mask=o_c < HALF, other=0.0).to(tl.float32)
    return b_first, b_second


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
    HALF: tl.constexpr,  # of the columns that are rotated
    BLOCK_H: tl.constexpr,
    BLOCK_C: tl.constexpr,  # at least HALF
    BLOCK_REST: tl.constexpr,  # at least as many as the columns that are not; 0: there are none
):
    token = tl.program_id(0).to(tl.int64)
    b, i = token // n, token % n
    angle = (i if SHARED else token) * 2 * HALF
    o_c = tl.arange(0, BLOCK_C)[None, :]
    o_first = 2 * o_c if INTERLEAVED else o_c
    o_second = o_first + (1 if INTERLEAVED else HALF)
    b_cos = _angles(cos + angle, o_c, o_first, o_second, HALF)
    b_sin = _angles(sin + angle, o_c, o_first, o_second, HALF)
    if BACKWARD:  # the transposed matrix
        b_sin = (-b_sin[1], -b_sin[0])
    block, q_blocks = tl.program_id(1), tl.cdiv(q_heads, BLOCK_H)
    if block < q_blocks:
        x, out = q + b * q_b + i * q_n, out_q + token * q_heads * width
        _rotate(x, out, block, q_heads, width, q_h, b_cos, b_sin, o_first, o_second, HALF, BLOCK_H, BLOCK_C, BLOCK_REST)
    else:
        x, out, block = k + b * k_b + i * k_n, out_k + token * k_heads * width, block - q_blocks
        _rotate(x, out, block, k_heads, width, k_h, b_cos, b_sin, o_first, o_second, HALF, BLOCK_H, BLOCK_C, BLOCK_REST)
