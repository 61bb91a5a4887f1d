"""Triton kernel of the input gradient of the product with a 4-bit weight, `grad_output·W`; the weight is frozen.

It computes `grad_inputᵀ = Wᵀ·grad_outputᵀ` with the decoded weights as the left operand, as the forward does. The
columns of a tile come in the order of the nibbles of a word, and are put into their own order when they are stored.
When this kernel is taken: see `four_bit_paths.py`; how its sums over W's rows are split: `four_bit_products.py`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .decode import WEIGHTS, absmax_of_words, levels_of_tile, load_tile
from .dequantize import dequantize_4bit
from .paths import FUSED, path_of
from .splits import Weight, run


@triton.jit
def _load_grad(grad_output, o_m, o_n, tokens, last, stride_grad_m, stride_grad_n):
    """`grad_output`'s rows `o_m`, columns `o_n`: `[BLOCK_M, BLOCK_N]`, zero from `tokens` and `last` on."""
    mask = (o_m < tokens)[:, None] & (o_n < last)[None, :]
    p_grad = grad_output + o_m[:, None] * stride_grad_m + o_n[None, :] * stride_grad_n
    return tl.load(p_grad, mask=mask, other=0.0)


@triton.jit(do_not_specialize=["tokens", "tiles"])
def matmul_4bit_backward_kernel(
    packed,  # [rows·columns / 2] bytes
    absmax,  # [blocks] float32, or uint8 where nested
    nested_absmax,  # [ceil(blocks / NESTED_BLOCK_SIZE)] float32, or None
    nested_code,  # [256] float32, or None
    nested_offset,  # [1] float32, or None
    levels,  # [16] float32
    grad_output,  # [tokens, rows]
    bias,  # None: as the forward's arguments
    grad_input,  # [splits, tokens, columns], contiguous: the result, or partial sums in float32
    # Shape
    tokens,
    rows,
    columns,
    tiles,  # of rows, in a split
    # Strides
    stride_grad_m,
    stride_grad_n,
    # Meta-parameters
    BLOCK_SIZE: tl.constexpr,
    NESTED_BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    OPERAND: tl.constexpr,
):
    """One tile of `grad_inputᵀ` over one split of the rows; the next tiles are loaded while one is multiplied."""
    WORDS: tl.constexpr = BLOCK_K // WEIGHTS
    nested = (nested_absmax, nested_code, nested_offset)
    column = tl.program_id(0).to(tl.int64) * BLOCK_K
    i_split = tl.program_id(1)
    o_m = tl.program_id(2).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    first = i_split * tiles * BLOCK_N
    last = tl.minimum(first + tiles * BLOCK_N, rows)

    o_n = tl.cast(first, tl.int64) + tl.arange(0, BLOCK_N)
    b_next = load_tile(
        packed, absmax, nested, o_n, column, last, columns, columns, BLOCK_K, BLOCK_SIZE, NESTED_BLOCK_SIZE
    )
    b_next_grad = _load_grad(grad_output, o_m, o_n, tokens, last, stride_grad_m, stride_grad_n)
    b_out = tl.zeros([BLOCK_K, BLOCK_M], tl.float32)
    for start in tl.range(first, last, BLOCK_N, num_stages=1):
        b_word, b_absmax = b_next
        b_grad = b_next_grad
        o_n = tl.cast(start, tl.int64) + BLOCK_N + tl.arange(0, BLOCK_N)
        b_next = load_tile(
            packed, absmax, nested, o_n, column, last, columns, columns, BLOCK_K, BLOCK_SIZE, NESTED_BLOCK_SIZE
        )
        b_next_grad = _load_grad(grad_output, o_m, o_n, tokens, last, stride_grad_m, stride_grad_n)
        b_absmax = absmax_of_words(b_absmax, b_word)[:, :, None, None, None]
        b_W = (levels_of_tile(levels, b_word) * b_absmax).to(OPERAND)  # [BLOCK_N, words, 2, 2, 2]
        b_W = tl.permute(tl.reshape(b_W, [BLOCK_N, WORDS, WEIGHTS]), [2, 1, 0])
        b_W = tl.reshape(b_W, [BLOCK_K, BLOCK_N])  # columns 0, 8, 16, …, then 1, 9, 17, …
        b_out = tl.dot(b_W, tl.trans(b_grad.to(OPERAND)), b_out, input_precision="ieee")

    o_k = column + tl.arange(0, BLOCK_K)
    b_out = tl.permute(tl.reshape(b_out, [WEIGHTS, WORDS, BLOCK_M]), [2, 1, 0])  # [BLOCK_M, WORDS, 8]
    p_grad = grad_input + (i_split.to(tl.int64) * tokens + o_m)[:, None] * columns + o_k[None, :]
    mask = (o_m < tokens)[:, None] & (o_k < columns)[None, :]
    tl.store(p_grad, tl.reshape(b_out, [BLOCK_M, BLOCK_K]).to(grad_input.dtype.element_ty), mask=mask)


def matmul_4bit_backward(
    grad_output: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_code: Tensor | None,
    nested_offset: Tensor | None,
    quant_type: str,
    block_size: int,
    nested_block_size: int,
    rows: int,
    columns: int,
) -> Tensor:
    """`ept_kernels.matmul_4bit_backward_reference`: one or two launches, or one and a library's product."""
    parts = (packed, absmax, nested_absmax, nested_code, nested_offset)
    weight = Weight(*parts, quant_type, block_size, nested_block_size, rows, columns)
    grad, shape = grad_output.detach(), (*grad_output.shape[:-1], columns)
    flat = grad[None] if grad.dim() == 1 else grad.flatten(0, -2)  # [tokens, rows]
    if path_of("matmul_4bit_backward", weight, flat.shape[0], grad.dtype) == FUSED:
        return run(matmul_4bit_backward_kernel, "matmul_4bit_backward", flat, weight, columns).view(shape)
    out = grad.new_empty(flat.shape[0], columns)
    return torch.mm(flat, dequantize_4bit(*weight, grad.dtype), out=out).view(shape)
