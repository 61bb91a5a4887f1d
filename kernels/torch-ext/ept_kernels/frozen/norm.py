"""Triton kernels of RMSNorm, including the addition of the residual, and of its input gradient: one launch each.

A program handles whole rows, so that a row is read once. Letters and arguments as in `reference.py`.
"""

import triton
import triton.language as tl


@triton.jit
def _tile(rows, d, BLOCK_ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    """Returns this program's rows `[BLOCK_ROWS]`, the addresses of their elements, and which of these exist."""
    o_row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    o_d = tl.arange(0, BLOCK_D)
    mask = (o_row < rows)[:, None] & (o_d < d)[None, :]
    return o_row, o_row[:, None] * d + o_d[None, :], mask


@triton.jit
def _scale(weight, d, OFFSET: tl.constexpr, BLOCK_D: tl.constexpr):
    """Loads the factors of the normalised rows: `[1, BLOCK_D]` float32."""
    o_d = tl.arange(0, BLOCK_D)
    return OFFSET + tl.load(weight + o_d, mask=o_d < d, other=0.0).to(tl.float32)[None, :]


@triton.jit(do_not_specialize=["rows"])
def rms_norm_kernel(
    x,  # [rows, d], contiguous
    residual,  # [rows, d], contiguous, or None
    weight,  # [d], contiguous
    out,  # [rows, d], contiguous
    total,  # [rows, d], contiguous; written only with a residual
    rstd,  # [rows] float32
    eps,
    # Shape
    rows,
    d,
    # Meta-parameters
    OFFSET: tl.constexpr,
    ROUNDS_FIRST: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,  # at least d
):
    o_row, at, mask = _tile(rows, d, BLOCK_ROWS, BLOCK_D)
    b_h = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    if residual is not None:
        b_h += tl.load(residual + at, mask=mask, other=0.0).to(tl.float32)
        b_total = b_h.to(total.dtype.element_ty)
        tl.store(total + at, b_total, mask=mask)
        b_h = b_total.to(tl.float32)  # the model normalises the rounded sum
    b_rstd = tl.rsqrt(tl.sum(b_h * b_h, axis=1) / d + eps)
    tl.store(rstd + o_row, b_rstd, mask=o_row < rows)
    b_out = b_h * b_rstd[:, None]
    if ROUNDS_FIRST:
        b_out = b_out.to(out.dtype.element_ty).to(tl.float32)
    b_out = b_out * _scale(weight, d, OFFSET, BLOCK_D)
    tl.store(out + at, b_out.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows"])
def rms_norm_backward_kernel(
    grad_output,  # [rows, d], contiguous
    h,  # [rows, d], contiguous
    weight,  # [d], contiguous
    rstd,  # [rows] float32
    grad_h,  # [rows, d], contiguous, or None
    out,  # [rows, d], contiguous
    # Shape
    rows,
    d,
    # Meta-parameters
    OFFSET: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,  # at least d
):
    o_row, at, mask = _tile(rows, d, BLOCK_ROWS, BLOCK_D)
    b_rstd = tl.load(rstd + o_row, mask=o_row < rows, other=0.0)[:, None]
    b_normal = tl.load(h + at, mask=mask, other=0.0).to(tl.float32) * b_rstd
    b_grad = tl.load(grad_output + at, mask=mask, other=0.0).to(tl.float32) * _scale(weight, d, OFFSET, BLOCK_D)
    along = tl.sum(b_grad * b_normal, axis=1)[:, None] / d
    b_out = (b_grad - b_normal * along) * b_rstd
    if grad_h is not None:
        b_out += tl.load(grad_h + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + at, b_out.to(out.dtype.element_ty), mask=mask)
