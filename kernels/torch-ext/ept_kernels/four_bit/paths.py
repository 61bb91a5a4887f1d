"""Launchers of the products with a 4-bit weight, and the choice of path, measured per device, tokens and shape.

* `FUSED`: the kernel in `matmul.py`, which decodes the weight as it multiplies. For few tokens.
* `BITSANDBYTES`: its `gemm_4bit`, which chooses its own kernel. For very few tokens, and wherever it is fastest.
* `LIBRARY`: one launch that dequantises into a fresh tensor, and the library's product. For many tokens, blocks that
  straddle rows, and weights at an unaligned address. A buffer kept for the weight would have to handle streams and CUDA
  graphs; PyTorch's allocator does, and reuses the same memory.

float32 tokens never take the fused path on a GPU: split into bfloat16 pieces, neither they nor the weights fit into
registers. Nor does the input gradient: in training a product has as many rows as a batch has tokens.

The measured choice is `{"PATH": number}` by tokens, rows and columns, under `matmul_4bit.path/…-bit` in `configs/`.
"""

import bisect
import sys
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import launch
from .decode import is_word_aligned
from .dequantize import dequantize_4bit
from .matmul import TILES, fused_product
from .weight import Weight

LIBRARY, FUSED, BITSANDBYTES = 0, 1, 2

# Numbers of tokens at which paths are measured: ends of the fused kernel's tiles, and where bitsandbytes changes its
# kernel. A number in between takes the path of the next larger one; beyond the last, the path is always LIBRARY.
COUNTS = (1, 4, 5, 7, 8, 16, 32, 64, 96, 128, 192, 256, 320, 384, 512, 1024, 1536)
# Without a measurement: bitsandbytes' product up to this many tokens, for which launching from Python costs more than
# the product (in float32, as many as it has a fused kernel for); then the fused kernel up to its largest tile.
THEIRS_UP_TO = {2: 4, 4: 7}  # by bytes per element of the tokens
FUSED_UP_TO = TILES[-1]

_THEIR_NESTED_BLOCK_SIZE = 256
_THEIR_MAX_WEIGHTS = 2**31 - 1  # it counts in 32 bits


def matmul_4bit(x: Tensor, *arguments: Any) -> Tensor:
    """Computes `ept_kernels.matmul_4bit_reference` from a weight's tensors, the bias and sizes, by the chosen path."""
    weight, bias = Weight(*arguments[:5], *arguments[6:]), arguments[5]
    flat = x[None] if x.dim() == 1 else x.flatten(0, -2)  # [tokens, columns]
    path = path_of(weight, flat.shape[0], x.dtype)
    if path == FUSED:
        out = fused_product(flat, weight, bias)
    elif path == BITSANDBYTES:
        out = bitsandbytes_product(flat, weight, bias)
    else:
        out = F.linear(flat, dequantize_4bit(*weight, x.dtype), None if bias is None else bias.to(x.dtype))
    return out.view(*x.shape[:-1], weight.rows)


def matmul_4bit_backward(grad_output: Tensor, *arguments: Any) -> Tensor:
    """Computes `ept_kernels.matmul_4bit_backward_reference` from a weight's tensors and sizes."""
    weight = Weight(*arguments)
    flat = grad_output[None] if grad_output.dim() == 1 else grad_output.flatten(0, -2)  # [tokens, rows]
    out = flat @ dequantize_4bit(*weight, grad_output.dtype)
    return out.view(*grad_output.shape[:-1], weight.columns)


def path_of(weight: Weight, tokens: int, dtype: torch.dtype) -> int:
    """Chooses the path of a product with `tokens` of `dtype`: the measured one if it is available."""
    packed, rows, columns = weight.packed, weight.rows, weight.columns
    is_whole = columns % weight.block_size == 0 and is_word_aligned(packed, rows * columns)
    if not is_whole or not tokens * rows * columns or tokens > COUNTS[-1]:
        return LIBRARY
    count = COUNTS[bisect.bisect_left(COUNTS, tokens)]
    path = chosen_path(count, rows, columns, dtype, packed.device)
    if path == BITSANDBYTES and not (
        has_bitsandbytes()
        and weight.nested_block_size in (0, _THEIR_NESTED_BLOCK_SIZE)
        and rows * columns <= _THEIR_MAX_WEIGHTS
        and packed.data_ptr() % 16 == 0
    ):
        path = FUSED if count <= FUSED_UP_TO else LIBRARY
    return LIBRARY if path == FUSED and not has_fused(dtype, packed.device) else path


def has_fused(dtype: torch.dtype, device: torch.device) -> bool:
    """Checks whether there is a fused kernel for tokens of `dtype`."""
    return dtype.itemsize == 2 or launch.architecture(device) == "cpu"


@launch.cached_choice
def chosen_path(count: int, rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> int:
    """Returns the measured path for `count` tokens, one of `COUNTS`, or `heuristic_path`'s."""
    default = {"PATH": heuristic_path(count, dtype, device)}
    kernel = launch.key("matmul_4bit.path", dtype)
    return launch.config_for(kernel, (count, rows, columns), device, default, exact=1)["PATH"]


def heuristic_path(count: int, dtype: torch.dtype, device: torch.device) -> int:
    """Chooses the path without a measurement."""
    if launch.architecture(device) != "cpu" and count <= THEIRS_UP_TO.get(dtype.itemsize, 0):
        return BITSANDBYTES
    return FUSED if has_fused(dtype, device) and count <= FUSED_UP_TO else LIBRARY


def has_bitsandbytes() -> bool:
    """Checks whether bitsandbytes is loaded, as it is if one of its weights is in use, and has the product."""
    return "bitsandbytes" in sys.modules and hasattr(torch.ops.bitsandbytes, "gemm_4bit")


def bitsandbytes_product(x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
    """Computes `x·Wᵀ + bias` with bitsandbytes, `[tokens, rows]`."""
    product: Any = torch.ops.bitsandbytes.gemm_4bit.default
    bias = None if bias is None else bias.to(x.dtype)
    packed, shape = weight.packed.view(-1, 1), (weight.rows, weight.columns)
    kind = (weight.block_size, weight.quant_type)
    if weight.nested_absmax is None:
        return product(x, packed, shape, weight.absmax, *kind, bias)
    assert weight.nested_offset is not None
    nested = (weight.absmax, weight.nested_code, weight.nested_offset.view(()))
    return product(x, packed, shape, weight.nested_absmax, *kind, bias, *nested)
