"""Products with a 4-bit weight: the Triton kernel of `x·Wᵀ + bias`, and the launchers of both directions.

It computes `outᵀ = W·xᵀ`: the decoded weights are the left operand, which matrix units take from registers, and the
tokens are its narrow side. Columns are taken in the order of the nibbles of a word (the first weights of all words of a
tile, then the second ones, …), in W and in x alike, so that a thread keeps what it has decoded. Weights are rounded to
x's type, as dequantised ones are; products are added up in float32 and rounded once. `paths.py` says when it is taken.

The input gradient has no kernel of its own: in training a product has as many rows as a batch has tokens, for which a
dequantisation and the library's product are the fastest way.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .decode import WEIGHTS, absmax_of_words, levels_of_tile, load_tile, split_8
from .dequantize import dequantize_4bit
from .paths import BITSANDBYTES, FUSED, bitsandbytes_product, path_of
from .splits import Weight, run


@triton.jit
def _load_x(x, o_m, start, tokens, last, stride_x_m, stride_x_k, BLOCK_K: tl.constexpr):
    """Loads `x`'s rows `o_m`, columns from `start` on: `[BLOCK_M, BLOCK_K]`, zero from `tokens` and `last` on."""
    o_k = tl.cast(start, tl.int64) + tl.arange(0, BLOCK_K)
    mask = (o_m < tokens)[:, None] & (o_k < last)[None, :]
    return tl.load(x + o_m[:, None] * stride_x_m + o_k[None, :] * stride_x_k, mask=mask, other=0.0)


@triton.jit(do_not_specialize=["tokens", "tiles"])
def matmul_4bit_kernel(
    packed,  # [rows·columns / 2] bytes
    absmax,  # [blocks] float32, or uint8 where nested
    nested_absmax,  # [ceil(blocks / NESTED_BLOCK_SIZE)] float32, or None
    nested_code,  # [256] float32, or None
    nested_offset,  # [1] float32, or None
    levels,  # [16] float32
    x,  # [tokens, columns]
    bias,  # [rows], or None
    out,  # [splits, tokens, rows], contiguous: the result, or partial sums in float32
    # Shape
    tokens,
    rows,
    columns,
    tiles,  # of columns, in a split
    # Strides
    stride_x_m,
    stride_x_k,
    # Meta-parameters
    BLOCK_SIZE: tl.constexpr,
    NESTED_BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    OPERAND: tl.constexpr,
):
    """Computes one tile of `outᵀ` over one split of the columns; the next tiles are loaded while one is multiplied."""
    nested = (nested_absmax, nested_code, nested_offset)
    o_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    i_split = tl.program_id(1)
    o_m = tl.program_id(2).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    first = i_split * tiles * BLOCK_K
    last = tl.minimum(first + tiles * BLOCK_K, columns)

    b_next = load_tile(packed, absmax, nested, o_n, first, rows, last, columns, BLOCK_K, BLOCK_SIZE, NESTED_BLOCK_SIZE)
    b_next_x = _load_x(x, o_m, first, tokens, last, stride_x_m, stride_x_k, BLOCK_K)
    b_out = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for start in tl.range(first, last, BLOCK_K, num_stages=1):
        b_word, b_absmax = b_next
        b_x = b_next_x
        following = start + BLOCK_K
        b_next = load_tile(
            packed, absmax, nested, o_n, following, rows, last, columns, BLOCK_K, BLOCK_SIZE, NESTED_BLOCK_SIZE
        )
        b_next_x = _load_x(x, o_m, following, tokens, last, stride_x_m, stride_x_k, BLOCK_K)
        b_absmax = absmax_of_words(b_absmax, b_word)
        b_level = split_8(levels_of_tile(levels, b_word))
        b_x = split_8(tl.reshape(b_x.to(OPERAND), [BLOCK_M, BLOCK_K // WEIGHTS, 2, 2, 2]))
        for j in tl.static_range(WEIGHTS):  # columns j, j + 8, j + 16, …
            b_W = (b_level[j] * b_absmax).to(OPERAND)  # [BLOCK_N, words]
            b_out = tl.dot(b_W, tl.trans(b_x[j]), b_out, input_precision="ieee")

    if bias is not None:
        b_out += tl.load(bias + o_n, mask=o_n < rows, other=0.0).to(tl.float32)[:, None]
    p_out = out + (i_split.to(tl.int64) * tokens + o_m)[:, None] * rows + o_n[None, :]
    mask = (o_m < tokens)[:, None] & (o_n < rows)[None, :]
    tl.store(p_out, tl.trans(b_out).to(out.dtype.element_ty), mask=mask)


def matmul_4bit(x: Tensor, *arguments: Any) -> Tensor:
    """Computes `ept_kernels.matmul_4bit_reference` of a weight's tensors, the bias and the weight's sizes: in one or
    two launches, or in one and a library's product, or by bitsandbytes.
    """
    weight, bias = Weight(*arguments[:5], *arguments[6:]), arguments[5]
    x, shape = x.detach(), (*x.shape[:-1], weight.rows)
    flat = x[None] if x.dim() == 1 else x.flatten(0, -2)  # [tokens, columns]
    bias = None if bias is None else bias.detach()
    path = path_of(weight, flat.shape[0], x.dtype)
    if path == FUSED:
        return run(matmul_4bit_kernel, flat, weight, bias).view(shape)
    if path == BITSANDBYTES:
        return bitsandbytes_product(flat, weight, bias).view(shape)
    # Results go to a given tensor: that leaves autocast out, which would change the type.
    out = x.new_empty(flat.shape[0], weight.rows)
    W = dequantize_4bit(*weight, x.dtype)
    if bias is None:
        torch.mm(flat, W.t(), out=out)
    else:
        torch.addmm(bias.to(x.dtype), flat, W.t(), out=out)
    return out.view(shape)


def matmul_4bit_backward(grad_output: Tensor, *arguments: Any) -> Tensor:
    """Computes `ept_kernels.matmul_4bit_backward_reference` of a weight's tensors and sizes: a dequantisation and the
    library's product.
    """
    weight, grad = Weight(*arguments), grad_output.detach()
    flat = grad[None] if grad.dim() == 1 else grad.flatten(0, -2)  # [tokens, rows]
    out = grad.new_empty(flat.shape[0], weight.columns)
    torch.mm(flat, dequantize_4bit(*weight, grad.dtype), out=out)
    return out.view(*grad.shape[:-1], weight.columns)
