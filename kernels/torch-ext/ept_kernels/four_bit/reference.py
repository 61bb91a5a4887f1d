"""`dequantize_4bit`: the weights of a `ept_kernels.FourBitWeight`, to the bits of bitsandbytes."""

from __future__ import annotations

import torch
from torch import Tensor

from ..library import register
from .weight import LEVELS, SCHEMA, FourBitWeight

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def dequantize_parts(
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
    dtype: torch.dtype,
) -> Tensor:
    """`dequantize_4bit_reference` of the parts of a weight: what the operator takes."""
    levels = torch.tensor(LEVELS[quant_type], dtype=torch.float32, device=packed.device)
    nibbles = torch.stack((packed >> 4, packed & 15), dim=1).flatten()[: rows * columns]  # [elements]
    if nested_absmax is not None:
        assert nested_code is not None
        assert nested_offset is not None
        group = torch.arange(absmax.shape[0], device=absmax.device) // nested_block_size  # [blocks]
        absmax = nested_code[absmax.int()] * nested_absmax[group]  # rounded on its own: addcmul would not do
        absmax = absmax + nested_offset
    scale = absmax.repeat_interleave(block_size)[: rows * columns]  # [elements]
    return (levels[nibbles.int()] * scale).to(dtype).view(rows, columns)


def dequantize_4bit_reference(weight: FourBitWeight, dtype: torch.dtype) -> Tensor:
    """`[rows, columns]` in `dtype`: level times absmax in float32, rounded once.

    Equal to `bitsandbytes.functional.dequantize_4bit` bit for bit. float64 holds the float32 values.
    """
    return dequantize_parts(*weight.tensors, *weight.sizes, _checked(dtype))


def dequantize_4bit(weight: FourBitWeight, dtype: torch.dtype) -> Tensor:
    """`dequantize_4bit_reference` through the operator `ept::dequantize_4bit`.

    Raises:
        ValueError: `dtype` is none of float32, float16, bfloat16 and float64.
    """
    return _dequantize_4bit(*weight.tensors, *weight.sizes, _checked(dtype))


def _checked(dtype: torch.dtype) -> torch.dtype:
    if dtype not in DTYPES:
        raise ValueError(f"cannot dequantise to {dtype}: use one of {', '.join(map(str, DTYPES))}")
    return dtype


def _fake(packed, *others):
    rows, columns, dtype = others[-3:]
    return packed.new_empty(rows, columns, dtype=dtype)


_dequantize_4bit = register(
    f"dequantize_4bit({SCHEMA.format('')}, ScalarType dtype) -> Tensor",
    dequantize_parts,
    _fake,
    launcher="four_bit.dequantize",
)
