"""Operators on a frozen `ept_kernels.FourBitWeight` `W`: bit-equal dequantisation, and two products."""

from typing import Any

import torch
from torch import Tensor

from ..library import compute_dtype, register
from .weight import LEVELS, SCHEMA, FourBitWeight, Weight

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def dequantize_parts(*arguments: Any) -> Tensor:
    """Computes `dequantize_4bit_reference` from the operator's arguments: the parts of a weight, and a dtype."""
    weight, dtype = Weight(*arguments[:-1]), arguments[-1]
    packed, absmax, elements = weight.packed, weight.absmax, weight.rows * weight.columns
    levels = torch.tensor(LEVELS[weight.quant_type], dtype=torch.float32, device=packed.device)
    nibbles = torch.stack((packed >> 4, packed & 15), dim=1).flatten()[:elements]
    if weight.nested_absmax is not None:
        assert weight.nested_code is not None
        assert weight.nested_offset is not None
        group = torch.arange(absmax.shape[0], device=absmax.device) // weight.nested_block_size  # [blocks]
        absmax = weight.nested_code[absmax.int()] * weight.nested_absmax[group]  # rounded separately, not with addcmul
        absmax = absmax + weight.nested_offset
    scale = absmax.repeat_interleave(weight.block_size)[:elements]
    return (levels[nibbles.int()] * scale).to(dtype).view(weight.rows, weight.columns)


def dequantize_4bit_reference(weight: FourBitWeight, dtype: torch.dtype) -> Tensor:
    """Dequantises to `[rows, columns]` in `dtype`: level times absmax in float32, rounded once.

    Equal to `bitsandbytes.functional.dequantize_4bit` bit for bit. float64 holds the float32 values.

    Raises:
        ValueError: `dtype` is not float32, float16, bfloat16 or float64.
    """
    return dequantize_parts(*weight.tensors, *weight.sizes, _checked(dtype))


def dequantize_4bit(weight: FourBitWeight, dtype: torch.dtype) -> Tensor:
    """Computes `dequantize_4bit_reference` through the operator `ept::dequantize_4bit`; raises as it does."""
    return _dequantize_4bit(*weight.tensors, *weight.sizes, _checked(dtype))


def matmul_parts(x: Tensor, *arguments: Any) -> Tensor:
    """Computes `matmul_4bit_reference` from the operator's arguments: a weight's tensors, the bias, and the sizes."""
    dtype, weight, bias = compute_dtype(x), (*arguments[:5], *arguments[6:], x.dtype), arguments[5]
    out = x.to(dtype) @ dequantize_parts(*weight).to(dtype).mT
    return (out if bias is None else out + bias.to(dtype)).to(x.dtype)


def matmul_backward_parts(grad_output: Tensor, *arguments: Any) -> Tensor:
    """Computes `matmul_4bit_backward_reference` from the operator's arguments, which include the parts of a weight."""
    dtype, weight = compute_dtype(grad_output), (*arguments, grad_output.dtype)
    return (grad_output.to(dtype) @ dequantize_parts(*weight).to(dtype)).to(grad_output.dtype)


def matmul_4bit_reference(x: Tensor, weight: FourBitWeight, bias: Tensor | None = None) -> Tensor:
    """Computes `x·Wᵀ + bias`.

    Args:
        x: `[..., columns]` float32, float16, bfloat16 or float64.
        weight: `W`, `[rows, columns]`; rounded to x's dtype, as a dequantised weight would be.
        bias: `[rows]`, any floating dtype.

    Returns:
        `[..., rows]` in x's dtype, accumulated in float32 (float64 for float64 inputs), rounded once.

    Raises:
        ValueError: shapes, dtypes or devices do not fit.
    """
    check_operands(x, weight, bias)
    return matmul_parts(x, *weight.tensors, bias, *weight.sizes)


def matmul_4bit(x: Tensor, weight: FourBitWeight, bias: Tensor | None = None) -> Tensor:
    """Computes `matmul_4bit_reference` through the operator `ept::matmul_4bit`; raises as it does."""
    check_operands(x, weight, bias)
    return _matmul_4bit(x, *weight.tensors, bias, *weight.sizes)


def matmul_4bit_backward_reference(grad_output: Tensor, weight: FourBitWeight) -> Tensor:
    """Computes `grad_output·W`, the gradient of x; the weight is frozen and gets none.

    Args:
        grad_output: `[..., rows]`, gradient of the product, in its dtype.

    Returns:
        `[..., columns]` in grad_output's dtype, accumulated in float32 (float64 for float64 inputs), rounded once.

    Raises:
        ValueError: shapes, dtypes or devices do not fit.
    """
    _check("grad_output", grad_output, weight.rows, weight)
    return matmul_backward_parts(grad_output, *weight.tensors, *weight.sizes)


def matmul_4bit_backward(grad_output: Tensor, weight: FourBitWeight) -> Tensor:
    """Computes `matmul_4bit_backward_reference` through the operator `ept::matmul_4bit_backward`; raises alike."""
    _check("grad_output", grad_output, weight.rows, weight)
    return _matmul_4bit_backward(grad_output, *weight.tensors, *weight.sizes)


def check_operands(x: Tensor, weight: FourBitWeight, bias: Tensor | None) -> None:
    """Raises ValueError for operands that `matmul_4bit` cannot multiply."""
    _check("x", x, weight.columns, weight)
    if bias is None:
        return
    if tuple(bias.shape) != (weight.rows,) or not bias.is_floating_point():
        raise ValueError(
            f"bias is {bias.dtype} {tuple(bias.shape)}, but the 4-bit weight needs ({weight.rows},) floats"
        )
    _check_device("bias", bias, weight)


def _check(name: str, tensor: Tensor, width: int, weight: FourBitWeight) -> None:
    if tensor.dim() == 0 or tensor.shape[-1] != width:
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)}, but the 4-bit weight [{weight.rows}, {weight.columns}] needs "
            f"[..., {width}]"
        )
    if tensor.dtype not in DTYPES:
        raise ValueError(f"{name} is {tensor.dtype}: use one of {', '.join(map(str, DTYPES))}")
    _check_device(name, tensor, weight)


def _check_device(name: str, tensor: Tensor, weight: FourBitWeight) -> None:
    if tensor.device != weight.packed.device:
        raise ValueError(
            f"{name} is on {tensor.device}, but the 4-bit weight on {weight.packed.device}: move one of them"
        )


def _checked(dtype: torch.dtype) -> torch.dtype:
    if dtype not in DTYPES:
        raise ValueError(f"cannot dequantise to {dtype}: use one of {', '.join(map(str, DTYPES))}")
    return dtype


_dequantize_4bit = register(
    f"dequantize_4bit({SCHEMA.format('')}, ScalarType dtype) -> Tensor",
    dequantize_parts,
    lambda packed, *others: packed.new_empty(others[-3:-1], dtype=others[-1]),
    "four_bit.dequantize",
)
_matmul_4bit = register(
    f"matmul_4bit(Tensor x, {SCHEMA.format('Tensor? bias,')}) -> Tensor",
    matmul_parts,
    lambda x, *weight: x.new_empty(*x.shape[:-1], weight[-2]),
    "four_bit.paths",
)
_matmul_4bit_backward = register(
    f"matmul_4bit_backward(Tensor grad_output, {SCHEMA.format('')}) -> Tensor",
    matmul_backward_parts,
    lambda grad_output, *weight: grad_output.new_empty(*grad_output.shape[:-1], weight[-1]),
    "four_bit.paths",
)
