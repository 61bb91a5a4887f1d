"""Which way a product with a 4-bit weight goes: measured for each device, number of tokens, shape and direction.

* `FUSED`: the kernel here, which decodes the weight as it multiplies. For few tokens.
* `BITSANDBYTES`: its `gemm_4bit`, by its own choice between a fused kernel and a dequantisation. Forward only, it
  has none of the input gradient. Where it is measured to be fastest, nothing is lost to it.
* `LIBRARY`: one launch that dequantises into a fresh tensor, and the library's product. For many tokens, blocks that
  straddle rows, and weights at an odd address. A buffer kept for the weight would have to know of streams and CUDA
  graphs; PyTorch's allocator does, and hands the same memory out again.

float32 tokens are never fused on a GPU: in pieces of bfloat16, as the matrix units would have to take them, neither
they nor the weights fit into registers.

The measured choice is `{"PATH": number}` by tokens, rows and columns, under `matmul_4bit.path/16-bit`,
`matmul_4bit.path/32-bit` and `matmul_4bit_backward.path/16-bit` in `configs/`.
"""

from __future__ import annotations

import bisect
import sys
from typing import Any

import torch
from torch import Tensor

from ..launch import architecture, cached_choice, config_for
from .decode import is_word_aligned
from .splits import Weight, key

LIBRARY, FUSED, BITSANDBYTES = 0, 1, 2

# Numbers of tokens at which paths are measured: ends of the fused kernel's tiles, and where bitsandbytes changes its
# own. A number in between goes the way of the next larger one; beyond the last, everyone dequantises.
COUNTS = (1, 4, 5, 7, 8, 16, 32, 64, 96, 128, 192, 256, 320, 384, 512, 1024, 1536)
# Where nothing was measured: the fused kernel up to so many tokens, a cautious guess; and in float32 bitsandbytes' own
# product for as many as it has a fused kernel for.
FUSED_UP_TO, THEIRS_UP_TO = 32, 7

_THEIR_NESTED_BLOCK_SIZE = 256
_THEIR_MOST_WEIGHTS = 2**31 - 1  # they count in 32 bits


def path_of(operator: str, weight: Weight, tokens: int, dtype: torch.dtype) -> int:
    """The way that `operator` takes for `tokens` of `dtype`: the measured one where it can be gone."""
    packed, rows, columns = weight.packed, weight.rows, weight.columns
    if columns % weight.block_size or not is_word_aligned(packed, rows * columns) or not tokens * rows * columns:
        return LIBRARY
    if tokens > COUNTS[-1]:
        return LIBRARY
    count = COUNTS[bisect.bisect_left(COUNTS, tokens)]
    path = chosen_path(operator, count, rows, columns, dtype, packed.device)
    if path == BITSANDBYTES and not (operator == "matmul_4bit" and bitsandbytes_takes(weight)):
        path = FUSED if count <= FUSED_UP_TO else LIBRARY
    return LIBRARY if path == FUSED and not has_fused(dtype, packed.device) else path


def has_fused(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether there is a fused kernel for tokens of `dtype`."""
    return dtype.itemsize == 2 or architecture(device) == "cpu"


@cached_choice
def chosen_path(operator: str, count: int, rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> int:
    """The measured path for `count` tokens, one of `COUNTS`, or `heuristic_path`'s."""
    default = {"PATH": heuristic_path(operator, count, dtype, device)}
    return config_for(key(f"{operator}.path", dtype), (count, rows, columns), device, default)["PATH"]


def heuristic_path(operator: str, count: int, dtype: torch.dtype, device: torch.device) -> int:
    """The path where nothing was measured."""
    if has_fused(dtype, device):
        return FUSED if count <= FUSED_UP_TO else LIBRARY
    return BITSANDBYTES if operator == "matmul_4bit" and count <= THEIRS_UP_TO else LIBRARY


def has_bitsandbytes() -> bool:
    """Whether bitsandbytes is loaded and has the product. It is not loaded for its sake: whoever holds one of its
    weights has done so.
    """
    return "bitsandbytes" in sys.modules and hasattr(torch.ops.bitsandbytes, "gemm_4bit")


def bitsandbytes_takes(weight: Weight) -> bool:
    """Whether bitsandbytes' product takes `weight`, whose blocks do not straddle rows."""
    return (
        weight.nested_block_size in (0, _THEIR_NESTED_BLOCK_SIZE)
        and weight.rows * weight.columns <= _THEIR_MOST_WEIGHTS
        and weight.packed.data_ptr() % 16 == 0
        and has_bitsandbytes()
    )


def bitsandbytes_product(x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
    """`x·Wᵀ + bias` by bitsandbytes, `[tokens, rows]`."""
    product: Any = torch.ops.bitsandbytes.gemm_4bit.default
    bias = None if bias is None else bias.to(x.dtype)
    packed, shape = weight.packed.view(-1, 1), (weight.rows, weight.columns)
    kind = (weight.block_size, weight.quant_type)
    if weight.nested_absmax is None:
        return product(x, packed, shape, weight.absmax, *kind, bias)
    assert weight.nested_offset is not None
    nested = (weight.absmax, weight.nested_code, weight.nested_offset.view(()))
    return product(x, packed, shape, weight.nested_absmax, *kind, bias, *nested)
