"""Triton kernels of activations, element by element, one launch each. Arguments as in `reference.py`."""

import triton
import triton.language as tl


@triton.jit
def activated(x, ACTIVATION: tl.constexpr):
    """Computes φ(x) and φ'(x) in float32; the joint prompt's kernels use it too."""
    if ACTIVATION == "relu":
        value = tl.where(x <= 0, 0.0, x)  # no maximum, which would make 0 of NaN
        slope = tl.where(x <= 0, 0.0, 1.0)
    elif ACTIVATION == "silu":
        passed = tl.sigmoid(x)
        value = x * passed
        slope = passed * (1.0 + x * tl.sigmoid(-x))
    elif ACTIVATION == "gelu":
        passed = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
        value = x * passed
        slope = passed + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    else:
        tl.static_assert(ACTIVATION == "gelu_tanh")
        # (1 + tanh(y)) / 2 = sigmoid(2y), y = √(2/π)·(x + 0.044715·x³)
        y2 = 1.5957691216057308 * x * (1.0 + 0.044715 * x * x)
        passed = tl.sigmoid(y2)
        value = x * passed
        slope = passed + x * passed * tl.sigmoid(-y2) * 1.5957691216057308 * (1.0 + 0.134145 * x * x)
    return value, slope


@triton.jit
def gated_activation_kernel(
    gate,  # [elements]; all are contiguous
    up,
    out,
    elements,
    # Meta-parameters
    ACTIVATION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < elements
    value, _ = activated(tl.load(gate + at, mask=mask, other=0.0).to(tl.float32), ACTIVATION)
    value = value * tl.load(up + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + at, value.to(out.dtype.element_ty), mask=mask)


@triton.jit
def gated_activation_backward_kernel(
    grad_output,  # [elements]; all are contiguous
    gate,
    up,
    grad_gate,
    grad_up,
    elements,
    # Meta-parameters
    ACTIVATION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < elements
    value, slope = activated(tl.load(gate + at, mask=mask, other=0.0).to(tl.float32), ACTIVATION)
    b_grad = tl.load(grad_output + at, mask=mask, other=0.0).to(tl.float32)
    b_up = tl.load(up + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(grad_gate + at, (b_grad * b_up * slope).to(grad_gate.dtype.element_ty), mask=mask)
    tl.store(grad_up + at, (b_grad * value).to(grad_up.dtype.element_ty), mask=mask)


@triton.jit
def relu_kernel(
    x,  # [elements]; all are contiguous
    out,
    passes,  # [⌈elements / 8⌉] uint8
    elements,
    # Meta-parameters
    BLOCK: tl.constexpr,
):
    o_byte = tl.program_id(0).to(tl.int64) * (BLOCK // 8) + tl.arange(0, BLOCK // 8)
    bit = tl.arange(0, 8)[None, :]
    at = o_byte[:, None] * 8 + bit
    b_x = tl.load(x + at, mask=at < elements, other=0.0).to(tl.float32)
    stops = b_x <= 0  # NaN passes
    tl.store(out + at, tl.where(stops, 0.0, b_x).to(out.dtype.element_ty), mask=at < elements)
    tl.store(passes + o_byte, tl.sum(tl.where(stops, 0, 1 << bit), axis=1).to(tl.uint8), mask=o_byte * 8 < elements)


@triton.jit
def relu_backward_kernel(
    grad_output,  # [elements]; all are contiguous
    passes,  # [⌈elements / 8⌉] uint8
    out,
    elements,
    # Meta-parameters
    BLOCK: tl.constexpr,
):
    o_byte = tl.program_id(0).to(tl.int64) * (BLOCK // 8) + tl.arange(0, BLOCK // 8)
    bit = tl.arange(0, 8)[None, :]
    at = o_byte[:, None] * 8 + bit
    b_passes = tl.load(passes + o_byte, mask=o_byte * 8 < elements, other=0).to(tl.int32)[:, None]
    b_grad = tl.load(grad_output + at, mask=at < elements, other=0.0)
    tl.store(out + at, tl.where((b_passes >> bit) & 1 != 0, b_grad, 0.0), mask=at < elements)
